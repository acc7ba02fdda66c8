"""A link over TCP: one connection per lane, non-blocking sockets, and no copy between a region and the kernel.

The connection of the decode lane also carries control messages and heartbeats.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from lamina.errors import PeerLostError, ProtocolError, TransportError
from lamina.transport.base import Hello, Lane, Link, RemoteRegion, log
from lamina.transport.frames import (
    BYE_FRAME,
    CHUNK_BYTES,
    HEADER_BYTES,
    HEARTBEAT_FRAME,
    Event,
    FrameReceiver,
    Sign,
    message_frame,
    write_header,
)
from lamina.transport.messages import MAX_MESSAGE

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_GATHER = 1024
"""Linux's IOV_MAX: the most buffers that one sendmsg takes."""

HEARTBEATS_PER_TIMEOUT = 4
CLOSE_DEADLINE_S = 5.0


class TcpLink(Link):
    """See ``Link``. Made by ``connect`` and ``Listener``, which hand over two connected non-blocking sockets."""

    transport = "tcp"

    def __init__(
        self,
        local: Hello,
        peer: Hello,
        peer_address: str,
        sockets: tuple[socket.socket, socket.socket],
        *,
        peer_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        """``heartbeat_timeout`` is the silence in seconds that the peer tolerates, ``peer_timeout`` what we do."""
        super().__init__(local, peer, peer_address)
        self._loop = asyncio.get_running_loop()
        decode, bulk = sockets
        self._connections = (
            _Connection(self, decode, Lane.DECODE, FrameReceiver(self._regions, MAX_MESSAGE)),
            _Connection(self, bulk, Lane.BULK, FrameReceiver(self._regions, 0)),
        )
        self._reading = False
        self._ended = asyncio.Event()

        # Silence is counted in periods rather than seconds: while this process is stopped or its loop is blocked no
        # period passes, so the peer is not blamed for what it could not be heard saying.
        self.peer_timeout = peer_timeout
        self._period = min(peer_timeout, heartbeat_timeout) / HEARTBEATS_PER_TIMEOUT
        self._silent_periods = 0
        self._heard_bytes = 0
        self._timer = self._loop.call_later(self._period, self._each_period)

    # -- Link

    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        nbytes = 0
        pieces = [memoryview(b"")]
        for buffer in buffers:
            view = memoryview(buffer)
            if view.nbytes:
                pieces.append(view.cast("B"))
                nbytes += view.nbytes
        self._check_write(remote, offset, nbytes, tag)
        pieces[0] = memoryview(write_header(remote.key, offset, nbytes, tag))
        self._connections[lane].push(pieces, HEADER_BYTES + nbytes)

    def send(self, message: dict[str, Any]) -> None:
        self._check_open()
        frame = message_frame(message, MAX_MESSAGE)
        self._connections[Lane.DECODE].push([memoryview(frame)], len(frame))

    def poll(self) -> bool:
        decode, bulk = self._connections
        heard = decode.receive()
        return bulk.receive() or heard

    @property
    def pending_bytes(self) -> int:
        decode, bulk = self._connections
        return decode.pending_bytes + bulk.pending_bytes

    @property
    def bytes_written(self) -> tuple[int, int]:
        decode, bulk = self._connections
        return decode.bytes_written, bulk.bytes_written

    @property
    def bytes_received(self) -> tuple[int, int]:
        decode, bulk = self._connections
        return decode.bytes_received, bulk.bytes_received

    async def drain(self, lane: Lane = Lane.DECODE) -> None:
        if self.error is not None:
            raise self.error
        await self._connections[lane].drain()

    async def close(self) -> None:
        if self._open:
            self._open = False
            self._start_reading()
            for connection in self._connections:
                connection.push([memoryview(BYE_FRAME)], HEADER_BYTES)
                connection.finish()
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self._ended.wait()
        except TimeoutError:
            self.fail(TransportError(f"{self} did not close the link within {CLOSE_DEADLINE_S:g} s"))
        finally:
            self._end(TransportError(f"closing the link to {self} was cancelled"))

    def abort(self, reason: str) -> None:
        if self._end(TransportError(f"the link to {self} was aborted: {reason}")):
            log.warning('event=link_aborted transport=%s peer="%s" reason="%s"', self.transport, self, reason)

    # -- what the connections report

    def deliver(self, lane: Lane, event: Event) -> None:
        """Hand an event to the owner; what comes after the owner's ``close`` is only counted as a sign of life."""
        if not self._open:
            return
        try:
            if isinstance(event, int):
                if self._on_tag is not None:
                    self._on_tag(lane, event)
            elif isinstance(event, dict):
                if self._on_message is not None:
                    self._on_message(event)
            elif all(connection.said_bye for connection in self._connections):
                self.fail(PeerLostError(f"{self} closed the link"))
        except Exception as error:
            log.exception('event=callback_failed transport=%s peer="%s"', self.transport, self)
            lost = TransportError(f"what {self} sent could not be handled: {error!r}")
            lost.__cause__ = error
            self.fail(lost)

    def check_finished(self) -> None:
        """A direction of a connection was closed in good order; when all are, so is the link."""
        if all(connection.finished for connection in self._connections):
            self._end(None)

    def fail(self, error: TransportError) -> None:
        """End the link for a reason that the owner does not know yet."""
        was_open = self._open
        if not self._end(error):
            return
        if not was_open:
            log.warning('event=link_close_failed transport=%s peer="%s" reason="%s"', self.transport, self, error)
            return
        log.warning('event=link_lost transport=%s peer="%s" reason="%s"', self.transport, self, error)
        if self._on_lost is not None:
            try:
                self._on_lost(error)
            except Exception:
                log.exception('event=callback_failed transport=%s peer="%s"', self.transport, self)

    def fail_later(self, error: TransportError) -> None:
        """Sending failed. What the peer sent before, perhaps its goodbye, counts first; not from within ``write``."""
        self._loop.call_soon(self._fail_when_read, error)

    # -- inside

    def _fail_when_read(self, error: TransportError) -> None:
        while self.poll():
            pass
        self.fail(error)

    def _start_reading(self) -> None:
        if self._reading or self._ended.is_set():
            return
        self._reading = True
        for connection in self._connections:
            connection.start_reading()

    def _each_period(self) -> None:
        self._timer = self._loop.call_later(self._period, self._each_period)
        if self._reading:
            self.poll()  # on some loops timers run before sockets: look before judging
            if self._ended.is_set():
                return
            heard_bytes = sum(self.bytes_received)
            self._silent_periods = 0 if heard_bytes != self._heard_bytes else self._silent_periods + 1
            self._heard_bytes = heard_bytes
            if self._silent_periods * self._period >= self.peer_timeout:
                self.fail(PeerLostError(f"{self} has been silent for {self.peer_timeout:.1f} s"))
                return
        decode = self._connections[Lane.DECODE]
        if self._open and not decode.pending_bytes:
            decode.push([memoryview(HEARTBEAT_FRAME)], HEADER_BYTES)

    def _end(self, error: TransportError | None) -> bool:
        """Close the sockets and wake everybody who waits; False if that was done before."""
        if self._ended.is_set():
            return False
        self._open = False
        self.error = error
        self._ended.set()
        self._timer.cancel()
        for connection in self._connections:
            connection.close(error)
        self._regions.clear()
        return True


class _Connection:
    """One socket of a link: a queue of what is to be sent, and a receiver for what arrives.

    While the queue holds anything, the loop watches for room in the socket; otherwise it does not.
    """

    def __init__(self, link: TcpLink, sock: socket.socket, lane: Lane, receiver: FrameReceiver) -> None:
        self._link = link
        self._sock = sock
        self._lane = lane
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._queue: deque[memoryview] = deque()
        self._drained: list[asyncio.Future[None]] = []
        self._finishing = False
        self._at_end = False
        self.said_bye = False
        self.pending_bytes = 0
        self.bytes_written = 0
        self.bytes_received = 0

    # -- sending

    def push(self, pieces: list[memoryview], nbytes: int) -> None:
        """Send ``pieces``, none of them empty: at once if nothing is queued before them."""
        idle = not self._queue
        self._queue.extend(pieces)
        self.pending_bytes += nbytes
        if idle and not self._send():
            self._loop.add_writer(self._sock.fileno(), self._send_rest)

    def finish(self) -> None:
        """Close the sending direction once the queue is sent."""
        self._finishing = True
        if not self._queue:
            self._shut_down()

    async def drain(self) -> None:
        if self._queue:
            waiter = self._loop.create_future()
            self._drained.append(waiter)
            await waiter

    def _send(self) -> bool:
        """Make one system call with at most one chunk; True when the queue is empty."""
        queue = self._queue
        chunk: list[memoryview] = []
        room = CHUNK_BYTES
        for piece in islice(queue, MAX_GATHER):
            chunk.append(piece[:room])
            room -= len(piece)
            if room <= 0:
                break
        try:
            sent = self._sock.sendmsg(chunk)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._link.fail_later(PeerLostError(f"{self._link} is gone: {error.strerror}"))
            return False
        self.pending_bytes -= sent
        self.bytes_written += sent
        while sent:
            piece = queue[0]
            if sent < len(piece):
                queue[0] = piece[sent:]
                break
            sent -= len(piece)
            queue.popleft()
        return not queue

    def _send_rest(self) -> None:
        if not self._send():
            return
        self._loop.remove_writer(self._sock.fileno())
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_result(None)
        self._drained.clear()
        if self._finishing:
            self._shut_down()

    def _shut_down(self) -> None:
        with suppress(OSError):  # a dead connection: receiving says so
            self._sock.shutdown(socket.SHUT_WR)
        self._link.check_finished()

    # -- receiving

    def start_reading(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self.receive)

    def receive(self) -> bool:
        """Receive about one chunk and deliver what it completes, without waiting; True if anything arrived."""
        taken = 0
        while taken < CHUNK_BYTES and not self._at_end:
            buffer = self._receiver.next_buffer()
            try:
                nbytes = self._sock.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._link.fail(PeerLostError(f"{self._link} is gone: {error.strerror}"))
                break
            if not nbytes:
                self._reached_end()
                break
            taken += nbytes
            self.bytes_received += nbytes
            try:
                event = self._receiver.received(nbytes)
            except TransportError as error:
                self._link.fail(ProtocolError(f"{self._link}: {error}"))
                break
            if event is not None:
                self.said_bye = event is Sign.BYE
                self._link.deliver(self._lane, event)
            if nbytes < len(buffer):
                break  # the socket is empty: spare the system call that would say so
        return taken > 0

    def _reached_end(self) -> None:
        self._at_end = True
        self._loop.remove_reader(self._sock.fileno())
        if self.said_bye or self._finishing:
            self._link.check_finished()
        else:
            self._link.fail(PeerLostError(f"{self._link} closed the connection"))

    # -- the end

    @property
    def finished(self) -> bool:
        """Whether both directions are closed and everything queued was sent."""
        return self._finishing and self._at_end and not self._queue

    def close(self, error: TransportError | None) -> None:
        """Close the socket; who waits for the queue gets ``error``. It is None only if the queue is empty."""
        self._at_end = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._queue.clear()
        self.pending_bytes = 0
        for waiter in self._drained:
            if error is not None and not waiter.done():
                waiter.set_exception(error)
