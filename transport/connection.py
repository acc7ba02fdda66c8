"""Frames in both directions over one stream, driven by the loop: a send queue and a receiver.

The control connection of every link is such a connection, and so is each lane of tcp.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from time import monotonic

from lamina.errors import PeerLostError, ProtocolError, TransportError
from lamina.transport.frames import HEADER_BYTES, Event, FrameReceiver
from lamina.transport.lanes import CHUNK_BYTES
from lamina.transport.stream import TcpStream

SEND_BYTES = CHUNK_BYTES + HEADER_BYTES
"""The most that one system call sends: a chunk and its header fit into one call."""
LAST_WORDS_S = 0.1
"""The time that an end spends on reading what a lost peer had sent before; kernels buffer some megabytes."""
MAX_GATHER = 1024
"""The most buffers that one sendmsg takes: IOV_MAX of Linux."""


class Connection:
    """Sends at once what the stream takes, and queues the rest without a copy.

    ``on_event`` is called with each complete frame. ``on_failed`` is called once, with the error that ended the
    connection, and never from within ``push``. An end that the peer announced is an error here too; the link can tell
    the difference.
    """

    def __init__(
        self,
        stream: TcpStream,
        receiver: FrameReceiver,
        on_event: Callable[[Event], None],
        on_failed: Callable[[TransportError], None],
    ) -> None:
        self._stream = stream
        self._receiver = receiver
        self._on_event = on_event
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._queue: deque[memoryview] = deque()
        self._drained: list[asyncio.Future[None]] = []
        self._ended = False
        self.pending_bytes = 0
        self.bytes_written = 0
        self.bytes_received = 0

    def adopt(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move to ``loop``. Called in that loop, before ``start_reading``, while the queue is empty."""
        self._loop = loop

    # -- sending

    def push(self, pieces: list[memoryview], nbytes: int) -> None:
        """Send ``pieces``, none of which is empty: at once if the queue is empty."""
        if self._ended:
            return
        queue = self._queue
        self.pending_bytes += nbytes
        if queue:
            queue.extend(pieces)
            return
        sent = self._send(pieces if nbytes <= SEND_BYTES and len(pieces) <= MAX_GATHER else _chunk(pieces))
        if sent != nbytes:
            queue.extend(pieces)
            self._drop(sent)
            try:
                self._loop.add_writer(self._stream.fileno(), self._send_rest)
            except RuntimeError:
                # uvloop drops a connection that the peer has reset before it reports the reset.
                self._fail_later(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

    async def drain(self) -> None:
        """Wait until the queue is empty; raises the error of ``close`` if that comes first."""
        if self._queue:
            waiter = self._loop.create_future()
            self._drained.append(waiter)
            await waiter

    def _send_rest(self) -> None:
        self._drop(self._send(_chunk(self._queue)))
        if self._queue:
            return
        self._loop.remove_writer(self._stream.fileno())
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_result(None)
        self._drained.clear()

    def _send(self, chunk: list[memoryview]) -> int:
        """Make one system call; returns the number of bytes that it took."""
        try:
            sent = self._stream.send(chunk)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._fail_later(error)
            return 0
        self.pending_bytes -= sent
        self.bytes_written += sent
        return sent

    def _drop(self, nbytes: int) -> None:
        queue = self._queue
        while nbytes:
            piece = queue[0]
            if nbytes < len(piece):
                queue[0] = piece[nbytes:]
                return
            nbytes -= len(piece)
            queue.popleft()

    # -- receiving

    def start_reading(self) -> None:
        self._loop.add_reader(self._stream.fileno(), self.receive)
        if self._stream.buffered():
            self._loop.call_soon(self.receive)

    def receive(self) -> bool:
        """Receive about one chunk and deliver the frame that it completes; True if anything arrived. It never waits."""
        taken = 0
        receiver, recv_into = self._receiver, self._stream.recv_into
        while taken < CHUNK_BYTES and not self._ended:
            try:
                nbytes = recv_into(receiver.next_buffer())
            except (BlockingIOError, InterruptedError):
                return taken > 0
            except OSError as error:
                self._fail(PeerLostError(f"is gone: {_words(error)}"))
                break
            if not nbytes:
                self._fail(PeerLostError("closed the connection"))
                break
            taken += nbytes
            self.bytes_received += nbytes
            try:
                event = receiver.received(nbytes)
            except TransportError as error:
                self._fail(ProtocolError(str(error)))
                break
            if event is not None:
                self._on_event(event)
                break  # usually nothing follows, and the loop finds that out more cheaply than a system call that fails
        if not self._ended and self._stream.buffered():
            self._loop.call_soon(self.receive)
        return taken > 0

    # -- the end

    def _fail_later(self, error: OSError) -> None:
        """Fail after reading what the peer sent before, perhaps its goodbye; not from within ``push``."""
        self._loop.call_soon(self._fail_when_read, PeerLostError(f"is gone: {_words(error)}"))

    def _fail_when_read(self, error: TransportError) -> None:
        hear_out(self.receive)
        self._fail(error)

    def _fail(self, error: TransportError) -> None:
        if not self._ended:
            self._stop()
            self._on_failed(error)

    def _stop(self) -> None:
        self._ended = True
        self._loop.remove_reader(self._stream.fileno())
        self._loop.remove_writer(self._stream.fileno())

    def close(self, error: TransportError) -> None:
        """Close the stream. Coroutines that wait in ``drain`` get ``error``. Called once."""
        if not self._ended:
            self._stop()
        self._stream.close()
        self._queue.clear()
        self.pending_bytes = 0
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # the coroutine may have been cancelled
        self._drained.clear()


def hear_out(hear: Callable[[], bool]) -> None:
    """Call ``hear`` until nothing is left that had arrived; for a bounded time, as some peers never stop sending."""
    until = monotonic() + LAST_WORDS_S
    while hear() and monotonic() < until:
        pass


def _chunk(pieces: Iterable[memoryview]) -> list[memoryview]:
    """The first pieces, as many as one system call sends."""
    chunk: list[memoryview] = []
    room = SEND_BYTES
    for piece in islice(pieces, MAX_GATHER):
        chunk.append(piece[:room])
        room -= len(piece)
        if room <= 0:
            break
    return chunk


def _words(error: OSError) -> str:
    """The operating system's text for an error, where it has one; loops add text of their own."""
    with suppress(TypeError, ValueError):
        if error.errno and not type(error).__module__.startswith("ssl"):
            return os.strerror(error.errno)
    return str(error)
