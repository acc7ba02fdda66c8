"""Both lanes of a link over shared memory, and how they are set up."""

from __future__ import annotations

import asyncio
import mmap
import os
import platform
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from lamina.errors import CapacityError, ProtocolError, TransportError
from lamina.transport.base import Lane, Region, address_of
from lamina.transport.lanes import CHUNK_BYTES, Lanes, LanesOwner, UpgradeError
from lamina.transport.options import Options
from lamina.transport.shm.passing import check_memory, make_doorbell, make_memory, meet, receive, region_message, take
from lamina.transport.shm.ring import HEAD, NBYTES, RING_BYTES, SLOTS, STARVED, TAIL, Rings, RingWriter, fence, ring

if TYPE_CHECKING:
    from lamina.transport.handshake import Session


BATCH = 64
"""The most tags of a lane that are delivered at once."""
LINGER_S = 100e-6
NAPS = 16
"""Falling asleep and being woken takes some microseconds on either side. After so many naps of less than ``LINGER_S``
in a row, an end stays awake instead, until nothing has come for that long."""
_WRITE_COST = 4096
"""The bytes that can be copied in the time that a write takes beside its copy."""
_COMPARE_BYTES = 64 << 10
"""From this size on, checking whether bytes already lie at their destination costs little."""
_LANES = tuple(Lane)  # iterating over the class is slow
_Window = tuple[memoryview, mmap.mmap, int]
"""A region of the peer: its bytes, its mapping, and its address."""


def offer(options: Options) -> dict[str, Any]:
    """Name this host: shared memory needs one kernel, and one network namespace for the socket."""
    machine = platform.machine()
    if machine != "x86_64" or sys.maxsize < 2**32:
        # See ``ring``: other processors need barriers that Python does not have.
        raise UpgradeError(f"shared memory is only implemented for x86-64, this is {machine}")
    try:
        os.close(make_memory(RING_BYTES))
        os.close(make_doorbell())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = Path("/proc/self/ns/net")
        namespace = network.stat().st_ino if network.exists() else 0  # a kernel without namespaces
    except OSError as error:
        raise UpgradeError(f"this system has no memfd, eventfd or /proc to share memory with: {error}") from error
    return {"host": f"{boot}:{namespace}"}


async def upgrade(session: Session) -> Lanes:
    """Connect a Unix socket to the peer, with proofs, and exchange rings and doorbells."""
    with ExitStack() as stack:
        sock = stack.enter_context(await meet(session))
        sock.setblocking(False)

        def own(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        incoming, doorbell = own(make_memory(RING_BYTES)), own(make_doorbell())
        if session.connecting:
            theirs = [own(fd) for fd in await receive(sock, b"rings", 2)]
            socket.send_fds(sock, [b"rings"], [incoming, doorbell])
        else:
            socket.send_fds(sock, [b"rings"], [incoming, doorbell])
            theirs = [own(fd) for fd in await receive(sock, b"rings", 2)]
        outgoing, peer_doorbell = theirs
        check_memory(outgoing, RING_BYTES, "the peer's rings")
        if os.readlink(f"/proc/self/fd/{peer_doorbell}") != "anon_inode:[eventfd]":
            raise ProtocolError("the peer's doorbell is not an eventfd")
        os.set_blocking(peer_doorbell, False)
        lanes = ShmLanes(
            sock, Rings(incoming), Rings(outgoing), doorbell, peer_doorbell, busy_poll=session.options.busy_poll
        )
        stack.pop_all()
        os.close(incoming)
        os.close(outgoing)
        return lanes


class ShmLanes(Lanes):
    """Both lanes of a link over shared memory.

    After ``close`` this end writes nothing more; the peer stops when it learns of the end.
    """

    def __init__(
        self,
        sock: socket.socket,
        incoming: Rings,
        outgoing: Rings,
        doorbell: int,
        peer_doorbell: int,
        *,
        busy_poll: bool,
    ) -> None:
        """The lanes own the socket and both doorbells from now on."""
        super().__init__()
        self.bytes_written: list[int] = [0, 0]
        self.bytes_received: list[int] = [0, 0]
        self.pending_bytes: list[int] = [0, 0]
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._doorbell = doorbell
        self._peer_doorbell = peer_doorbell
        self._words = incoming.words
        self._slots = incoming.slots
        self._asleep = incoming.asleep
        self._writers = [RingWriter(outgoing, lane, peer_doorbell) for lane in _LANES]
        self._published = [0, 0]
        """The number of received tags that the peer has been told, by lane."""
        self._busy_poll = busy_poll
        self._windows: dict[int, _Window] = {}
        self._queues: tuple[deque[_QueuedWrite], deque[_QueuedWrite]] = (deque(), deque())
        self._moving = False
        """Whether ``_move`` is scheduled."""
        self._drained: tuple[list[asyncio.Future[None]], ...] = ([], [])
        self._owner: LanesOwner | None = None
        self._awake = False
        """Whether ``_look`` is called in every round of the loop."""
        self._since = monotonic()
        """The time when this end fell asleep, or when it last heard something while it stays awake."""
        self._naps = 0
        """How often in a row this end slept for less than LINGER_S."""
        # A write that comes before ``start`` rings, and ``start`` finds the doorbell rung.
        self._asleep[0] = 1

    # -- regions

    def expose(self, key: int, region: Region) -> dict[str, Any]:
        try:
            socket.send_fds(self._socket, [region_message(key)], [region.fd])
        except ConnectionError:
            pass  # the peer is gone, which the control connection is about to report
        except OSError as error:
            raise CapacityError(
                f"region {region.name!r} cannot be passed to the peer, after {key - 1} others: {error}; "
                "wait until the peer has taken some"
            ) from error
        return {}

    def learn(self, key: int, nbytes: int, details: dict[str, Any]) -> None:
        # The memory was passed before the announcement, and one kernel has both ends of the socket: it is there.
        try:
            (fd,) = take(self._socket, region_message(key), 1)
        except BlockingIOError as error:
            raise ProtocolError(f"the peer announced region {key} but did not pass its memory") from error
        try:
            check_memory(fd, nbytes, f"region {key}")
            memory = mmap.mmap(fd, nbytes)
            memory.madvise(mmap.MADV_DONTFORK)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"the {nbytes} bytes of the peer's region {key} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        view = memoryview(memory)
        self._windows[key] = (view, memory, address_of(view))

    def window(self, key: int) -> memoryview | None:
        return self._windows[key][0]

    # -- what is sent

    def write(self, lane: Lane, key: int, offset: int, pieces: list[memoryview], nbytes: int, tag: int) -> None:
        self.tags_written[lane] += 1
        window = self._windows[key]
        # Only the first bulk chunk in a round of the loop is copied at once.
        if nbytes <= CHUNK_BYTES and not self._queues[lane] and not (lane and self._moving):
            writer = self._writers[lane]
            try:
                room = writer.has_room()
            except ProtocolError as error:
                self._loop.call_soon(self._fail, error)
                return
            if room:
                for piece in pieces:
                    _place(window, offset, piece)
                    offset += len(piece)
                writer.put(tag, nbytes)
                self.bytes_written[lane] += nbytes
                if lane:
                    self._move_soon()
                return
        pieces.reverse()
        self._queues[lane].append(_QueuedWrite(window, offset, pieces, nbytes, tag))
        self.pending_bytes[lane] += nbytes
        self._move_soon()

    async def drain(self, lane: Lane) -> None:
        if self._queues[lane]:
            waiter = self._loop.create_future()
            self._drained[lane].append(waiter)
            await waiter

    def _move_soon(self) -> None:
        if not self._moving:
            self._moving = True
            self._loop.call_soon(self._move)

    def _move(self) -> None:
        """Copy a chunk of the decode queue, or of bulk if decode has nothing or must wait for the peer."""
        self._moving = False
        try:
            if any(self._move_lane(lane) for lane in _LANES if self._queues[lane]):
                self._move_soon()
        except ProtocolError as error:
            self._fail(error)

    def _move_lane(self, lane: Lane) -> bool:
        """Copy a chunk of the lane's queue; False if the peer must read tags first."""
        queue, writer = self._queues[lane], self._writers[lane]
        budget = CHUNK_BYTES
        while queue and budget > 0:
            if not writer.has_room():
                break
            queued = queue[0]
            budget -= queued.copy(budget) + _WRITE_COST
            if not queued.pieces:
                queue.popleft()
                writer.put(queued.tag, queued.nbytes)
                self.bytes_written[lane] += queued.nbytes
                self.pending_bytes[lane] -= queued.nbytes
        if not queue:
            _wake(self._drained[lane], lambda waiter: waiter.set_result(None))
        return budget < CHUNK_BYTES

    # -- what arrives

    def start(self, owner: LanesOwner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._doorbell, self._rung)
        if self._busy_poll:
            self._stay_awake()

    def poll(self) -> bool:
        heard = False
        for lane in _LANES:
            owner = self._owner  # None once the link has ended
            if owner is not None and self._words[lane][HEAD] != self.tags_received[lane]:
                self._deliver(lane, owner)
                heard = True
        return heard

    def _deliver(self, lane: Lane, owner: LanesOwner) -> None:
        words, slots = self._words[lane], self._slots[lane]
        received = self.tags_received
        head, tail = words[HEAD], received[lane]
        if not tail < head <= tail + SLOTS:
            # The peer writes at most SLOTS tags beyond the TAIL that it knows, which is never ahead of the real one.
            self._fail(
                ProtocolError(f"the peer says that it wrote {head} tags, where {tail} to {tail + SLOTS} are possible")
            )
            return
        self.bytes_received[lane] = words[NBYTES]
        head = min(head, tail + BATCH)
        # The owner may end the link when it is told of a tag.
        while (tail := received[lane]) < head:
            received[lane] = tail + 1
            owner.delivered(lane, slots[tail % SLOTS])
            if self._owner is None:
                return
        # The writer needs TAIL only when the ring looks full to it, so a quarter of the ring is told at a time.
        tail = received[lane]
        if tail - self._published[lane] >= SLOTS // 4:
            self._published[lane] = words[TAIL] = tail
            fence()
            if words[STARVED]:
                words[STARVED] = 0
                ring(self._peer_doorbell)

    def _rung(self) -> None:
        self.poll()
        if self._owner is None:
            return
        try:  # noqa: SIM105 - see ``ring``
            os.eventfd_read(self._doorbell)
        except BlockingIOError:
            pass
        if self._queues[0] or self._queues[1]:
            self._move_soon()
        if self._awake:
            return
        self._naps = self._naps + 1 if monotonic() - self._since < LINGER_S else 0
        if self._naps < NAPS:
            self._sleep()
        else:
            self._stay_awake()

    def _sleep(self) -> None:
        """Ask for the doorbell, unless something has come meanwhile."""
        self._asleep[0] = 1
        fence()
        self._since = monotonic()
        decode, bulk = self._words
        if [decode[HEAD], bulk[HEAD]] != self.tags_received:
            self._stay_awake()

    def _stay_awake(self) -> None:
        self._awake = True
        self._asleep[0] = 0
        self._since = monotonic()
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Look once in each round of the loop, until nothing has come for a while."""
        if self._owner is None:
            return
        if self.poll():
            self._since = monotonic()
        elif not self._busy_poll and monotonic() - self._since > LINGER_S:
            self._awake = False
            self._naps = 0
            self._sleep()
            return
        self._loop.call_soon(self._look)

    # -- the end

    def _fail(self, error: TransportError) -> None:
        owner = self._owner
        if owner is not None:
            self._owner = None
            self._loop.remove_reader(self._doorbell)
            owner.lanes_failed(error)

    def close(self, error: TransportError) -> None:
        self._owner = None
        self._loop.remove_reader(self._doorbell)
        os.close(self._doorbell)
        os.close(self._peer_doorbell)
        self._socket.close()
        # Memory is unmapped with its last view, and the owner of the link may have views of the windows.
        self._windows.clear()
        self._words.clear()
        self._slots.clear()
        self._writers.clear()
        del self._asleep
        for lane in _LANES:
            self._queues[lane].clear()
            self.pending_bytes[lane] = 0
            _wake(self._drained[lane], lambda waiter: waiter.set_exception(error))


class _QueuedWrite:
    """A write, or the rest of one, that is still to be copied."""

    __slots__ = ("nbytes", "offset", "pieces", "tag", "window")

    def __init__(self, window: _Window, offset: int, pieces: list[memoryview], nbytes: int, tag: int) -> None:
        """``pieces`` are in reverse order."""
        self.window = window
        self.offset = offset
        self.pieces = pieces
        self.nbytes = nbytes
        self.tag = tag

    def copy(self, limit: int) -> int:
        """Copy up to ``limit`` bytes, and return how many."""
        pieces = self.pieces
        left = limit
        while pieces and left:
            piece = pieces.pop()
            if len(piece) > left:
                pieces.append(piece[left:])
                piece = piece[:left]
            _place(self.window, self.offset, piece)
            self.offset += len(piece)
            left -= len(piece)
        return limit - left


def _place(window: _Window, offset: int, piece: memoryview) -> None:
    """Copy ``piece`` into the window, unless it is that part of the window itself."""
    view, memory, address = window
    if (piece.obj is memory or len(piece) >= _COMPARE_BYTES) and _lies_at(piece, address + offset):
        return
    view[offset : offset + len(piece)] = piece


def _lies_at(piece: memoryview, address: int) -> bool:
    return not piece.readonly and address_of(piece) == address


def _wake(waiters: list[asyncio.Future[None]], tell: Callable[[asyncio.Future[None]], None]) -> None:
    for waiter in waiters:
        if not waiter.done():
            tell(waiter)
            waiter.exception()  # the coroutine may have been cancelled
    waiters.clear()
