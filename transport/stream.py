"""A connected TCP socket that never blocks: plain, or inside TLS.

Its methods raise BlockingIOError where they would have to wait, and OSError when the connection is broken.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

_TLS_RECORD = 16 << 10
_TLS_HANDSHAKE = b"\x16"


class TcpStream:
    """Plain TCP. The kernel receives straight into memory of the caller, and gathers from it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.recv_into = sock.recv_into
        """Receive into a buffer; 0 at the end of the connection."""
        self.send = sock.sendmsg
        """Send some of the bytes of the buffers, none of which is empty; returns how many."""
        self.fileno = sock.fileno

    binding = b""
    """What both ends know about the encryption and an attacker on the path cannot forge."""

    def buffered(self) -> bool:
        """Whether bytes wait in this process, which the readiness of the socket does not announce."""
        return False

    def peek(self, nbytes: int) -> bytes:
        """The next bytes, which stay in the socket; empty at the end of the connection."""
        return self._sock.recv(nbytes, socket.MSG_PEEK)

    def shut_down(self) -> None:
        """Tell the peer that nothing more will be sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()


class TlsStream(TcpStream):
    """TLS 1.3. It decrypts straight into memory of the caller, and gathers small pieces into one record."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock
        self.recv_into = self._recv_into  # type: ignore[assignment]
        self.send = self._send  # type: ignore[assignment]

    async def shake_hands(self) -> None:
        """Complete the TLS handshake. Raises OSError, which includes SSLError."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await wait_until_ready(self, reading=True)
            except ssl.SSLWantWriteError:
                await wait_until_ready(self, reading=False)

    def buffered(self) -> bool:
        return self._tls.pending() > 0

    def _recv_into(self, buffer: memoryview) -> int:
        try:
            return self._tls.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0

    def _send(self, pieces: Sequence[memoryview]) -> int:
        # After "try again" OpenSSL wants the same bytes again, or more; the send queue only grows, so it gets them.
        first = pieces[0]
        if len(first) < _TLS_RECORD and len(pieces) > 1:
            record = bytearray()
            for piece in pieces:
                record += piece[: _TLS_RECORD - len(record)]
                if len(record) == _TLS_RECORD:
                    break
            first = memoryview(record)
        try:
            return self._tls.send(first)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error


async def secure(sock: socket.socket, context: ssl.SSLContext, certificate: bytes, *, connecting: bool) -> TlsStream:
    """Put ``sock`` inside TLS. ``certificate`` is this end's, in DER."""
    tls = context.wrap_socket(
        sock, server_side=not connecting, do_handshake_on_connect=False, suppress_ragged_eofs=False
    )
    stream = TlsStream(tls)
    try:
        await stream.shake_hands()
    except ssl.SSLError:
        try:
            if not connecting:
                await hang_up(stream)
        finally:
            stream.close()
        raise
    except BaseException:
        stream.close()
        raise
    hashes = [hashlib.sha256(one).digest() for one in (certificate, tls.getpeercert(binary_form=True) or b"")]
    stream.binding = b"".join(hashes if connecting else reversed(hashes))
    return stream


async def wait_until_ready(stream: TcpStream, *, reading: bool) -> None:
    """Wait until the socket can be read or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    fd = stream.fileno()
    add, remove = (loop.add_reader, loop.remove_reader) if reading else (loop.add_writer, loop.remove_writer)

    def on_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, on_ready)
    try:
        await ready
    finally:
        remove(fd)


async def send_all(stream: TcpStream, data: bytes) -> None:
    """Send all of ``data``, waiting as needed."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[stream.send([rest]) :]
        except BlockingIOError:
            await wait_until_ready(stream, reading=False)


async def recv_into(stream: TcpStream, buffer: memoryview) -> int:
    """Wait until something can be received into ``buffer``; returns how many bytes, 0 at the end of the connection."""
    while True:
        try:
            return stream.recv_into(buffer)
        except BlockingIOError:
            await wait_until_ready(stream, reading=True)


async def starts_tls(stream: TcpStream) -> bool:
    """Whether the peer, which speaks first, uses TLS. Its bytes stay in the socket."""
    while True:
        await wait_until_ready(stream, reading=True)
        with suppress(BlockingIOError):
            # A connection that ends without a byte counts as TLS, because it did not speak plain text.
            return stream.peek(1) in (b"", _TLS_HANDSHAKE)


async def hang_up(stream: TcpStream) -> None:
    """Send nothing more, and wait until the peer has closed, so that it reads what was sent last.

    Closing with unread bytes would reset the connection and could destroy what was sent last.
    """
    buffer = memoryview(bytearray(4096))
    with suppress(OSError):
        stream.shut_down()
        while await recv_into(stream, buffer):
            pass
