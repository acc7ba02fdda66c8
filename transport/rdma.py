"""Lanes over RDMA: a queue pair each. The device writes from memory into the peer's memory; nothing is copied.

A write is an RDMA WRITE WITH IMMEDIATE, whose immediate is the tag; if it has more pieces or bytes than a request may,
plain RDMA WRITEs go before. Every tag takes a receive at the peer, of which the sender knows how many are posted: the
peer tells by notes when it has posted more. Sources are sent from where they lie if that is registered: regions that
are exposed, and regions that are only sources from their first write on. Of other memory, tiny and small pieces are
copied, and large ones are registered for the time of the write.

Completions of writes wake nobody, and only some writes have one, unless somebody waits for them: ``drain``, or a write
for which there is no room yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import secrets
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.errors import CapacityError, PeerLostError, ProtocolError, TransportError
from lamina.transport import verbs
from lamina.transport.base import Lane, Region, address_of
from lamina.transport.lanes import Lanes, Owner, UpgradeError
from lamina.transport.options import Options
from lamina.transport.verbs import COPY_BYTES, Device, Holdings, Piece, Port, QueuePair

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from lamina.transport.handshake import Session

PROBE_TIMEOUT_S = 1.5
"""For a first write in both directions of both lanes."""
PROBE_PERIOD_S = 0.001

STAGING_BYTES = 256 << 10
"""Registered memory of each lane to which small sources are copied."""
WATCH_PERIODS = 4
"""Looks at what is under way in ``peer_timeout``."""

SIGNAL_WRITES, SIGNAL_BYTES = 16, 1 << 20
"""At the latest after so many requests, or bytes, one asks for a completion."""
MAX_COMPLETIONS = 64
"""Of a lane, taken at once."""


def offer(options: Options) -> dict[str, Any]:
    """The port that this end would use."""
    port = verbs.find_port(options.rdma)
    verbs.check_memlock()
    return vars(port).copy()


async def upgrade(session: Session) -> Lanes:
    """Connect a queue pair for each lane, and see that writes arrive in both directions."""
    local, remote = Port.from_offer(session.local_offer), Port.from_offer(session.peer_offer)
    if local.link_layer != remote.link_layer:
        raise UpgradeError(
            f"one port is {local.link_layer}, the other {remote.link_layer}: choose others by rdma.device"
        )
    lanes = RdmaLanes(verbs.open_device(local.device), local, session.options)
    try:
        await session.send({"lanes": lanes.describe()})
        lanes.connect(local, remote, (await session.receive()).get("lanes"))
        # A packet that comes before the peer's queue pair expects it is lost.
        await session.send({"expecting": True})
        await session.receive()
        await lanes.probe(local, remote)
    except BaseException:
        lanes.close(UpgradeError("the set-up was broken off"))
        raise
    return lanes


class RdmaLanes(Lanes):
    """See ``Lanes``."""

    bytes_written: list[int]
    bytes_received: list[int]

    def __init__(self, device: Device, port: Port, options: Options) -> None:
        """Raises UpgradeError; has freed everything then."""
        super().__init__()
        self.bytes_written = [0, 0]
        self.bytes_received = [0, 0]
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._device = device
        self.busy_poll = options.busy_poll
        self._peer_timeout = options.peer_timeout
        self._timer: asyncio.TimerHandle | None = None
        self.holdings = Holdings(device)
        self._remote: dict[int, tuple[int, int]] = {}
        """Address and key of the peer's regions."""
        self.owner: Owner | None = None
        self._error: TransportError | None = None
        self.closed = False
        self._lanes: list[_Lane] = []
        staging = memoryview(mmap.mmap(-1, len(Lane) * STAGING_BYTES))
        try:
            self._staging = device.register(address_of(staging), staging.nbytes)
        except CapacityError as error:
            raise UpgradeError(str(error)) from error
        try:
            for lane in Lane:
                part = staging[lane * STAGING_BYTES : (lane + 1) * STAGING_BYTES]
                pair = QueuePair(device, port, options.rdma.queue)
                self._lanes.append(_Lane(self, lane, pair, self.holdings, part, self._staging.lkey))
        except BaseException:
            self.close(UpgradeError("the set-up failed"))
            raise

    # -- set-up

    def describe(self) -> list[list[int]]:
        """What the peer needs to know of each lane: number, first packet number, receives that are posted."""
        return [[lane.pair.number, lane.psn, lane.pair.queue] for lane in self._lanes]

    def connect(self, local: Port, remote: Port, described: Any) -> None:
        """To the lanes that the peer described; raises UpgradeError."""
        match described:
            case [[int(), int(), int()], [int(), int(), int()]]:
                pass
            case _:
                raise UpgradeError(f"the peer described its lanes wrongly: {described!r:.200}")
        for lane, (number, psn, queue) in zip(self._lanes, described, strict=True):
            if not (0 <= number < 2**24 and 0 <= psn < 2**24 and 0 < queue < 2**20):
                raise UpgradeError(f"the peer described a lane wrongly: {described!r:.200}")
            lane.credits = lane.max_credits = queue
            for _ in range(lane.pair.queue // lane.pair.batch):
                lane.pair.post_receives()
            lane.pair.connect(local, remote, number, lane.psn, psn, self._peer_timeout)

    async def probe(self, local: Port, remote: Port) -> None:
        """Write nothing over both lanes, and wait until that arrived here and there. Raises UpgradeError."""
        for lane in self._lanes:
            lane.write(_Write([], 0, 0, 0, 0))
            lane.mark()
        deadline = self._loop.time() + PROBE_TIMEOUT_S
        while not all(lane.probed() for lane in self._lanes):
            if self._error or self._loop.time() > deadline:
                reason = self._error or f"none within {PROBE_TIMEOUT_S:g} s"
                raise UpgradeError(
                    f"no answer over RDMA from {remote.place} ({remote.device}) to {local.place} ({local.device}): "
                    f"{reason}; check that the ports are on one network"
                    + (", and that no firewall stops UDP port 4791" if local.link_layer == "ethernet" else "")
                )
            await asyncio.sleep(PROBE_PERIOD_S)

    # -- Lanes

    def start(self, owner: Owner) -> None:
        self.owner = owner
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._loop.call_soon(self._spin if self.busy_poll else self._look)
        for lane in self._lanes:
            if not self.busy_poll:
                self._loop.add_reader(lane.pair.fd, self._on_event, lane)
                lane.arm()
            lane.return_receives()
        self._timer = self._loop.call_later(self._peer_timeout / WATCH_PERIODS, self._watch)
        if self._error:
            self._loop.call_soon(self._report)

    def expose(self, key: int, region: Region) -> dict[str, Any]:
        memory = self.holdings.expose(region.buffer)
        return {"address": memory.address, "rkey": memory.rkey}

    def learn(self, key: int, nbytes: int, details: dict[str, Any]) -> None:
        match details:
            case {"address": int(address), "rkey": int(rkey)} if 0 < address <= 2**64 - nbytes and 0 <= rkey < 2**32:
                self._remote[key] = (address, rkey)
            case _:
                raise ProtocolError(f"the peer described memory of {nbytes} bytes wrongly: {details!r:.200}")

    def window(self, key: int) -> memoryview | None:
        return None

    def write(self, lane: Lane, key: int, offset: int, buffers: Sequence[Buffer], nbytes: int, tag: int) -> None:
        self.tags_written[lane] += 1
        address, rkey = self._remote[key]
        self._lanes[lane].write(_Write(buffers, nbytes, address + offset, rkey, tag))

    def take_note(self, note: dict[str, Any]) -> None:
        match note:
            case {"lane": int(lane), "credits": int(count)} if lane in (0, 1) and count > 0:
                if not self._lanes[lane].give_credits(count):
                    raise ProtocolError(f"the peer has posted {count} receives more than it said that it can")
            case {"lane": int(lane), "bytes": int(nbytes)} if lane in (0, 1) and nbytes > 0:
                self.bytes_received[lane] += nbytes
            case _:
                raise ProtocolError(f"the peer sent a note that is none of RDMA's: {note!r:.200}")

    def poll(self) -> bool:
        heard = False
        for lane in self._lanes:
            lane.reap()
            heard = lane.deliver() or heard
            if self.closed:
                return True
        return heard

    @property
    def pending_bytes(self) -> list[int]:  # type: ignore[override]
        # The device is asked only where the lanes live: another thread could take completions at the same time.
        own = threading.get_ident() == self._thread
        return [lane.look_pending() if own else lane.pending_bytes for lane in self._lanes]

    async def drain(self, lane: Lane) -> None:
        await self._lanes[lane].drain()

    def close(self, error: TransportError) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        for lane in self._lanes:
            self._loop.remove_reader(lane.pair.fd)
            lane.close(error)
        with contextlib.suppress(verbs.pyverbs().Error):
            self._staging.close()
        self.holdings.close()
        self._remote.clear()

    # -- what happens

    def fail(self, error: TransportError) -> None:
        """Report the first of all failures, in the next round of the loop."""
        if self._error is None and not self.closed:
            self._error = error
            if self.owner is not None:
                self._loop.call_soon(self._report)

    def _report(self) -> None:
        if not self.closed:
            assert self.owner is not None
            assert self._error is not None
            self.owner.lanes_failed(self._error)

    def _watch(self) -> None:
        """Find a peer whose device does not answer: those of some makers retry for ever, or longer than is wanted.

        Periods are counted rather than seconds: a loop that was held up blames nobody.
        """
        self._timer = self._loop.call_later(self._peer_timeout / WATCH_PERIODS, self._watch)
        self._look()
        for lane in self._lanes:
            if lane.stuck_periods() >= WATCH_PERIODS:
                reason = f"no answer from its device for {self._peer_timeout:.1f} s"
                self.fail(PeerLostError(f"cannot be reached over RDMA any more: {reason}"))

    def deliver_soon(self) -> None:
        self._loop.call_soon(self._look)

    def _on_event(self, lane: _Lane) -> None:
        if lane.pair.take_event():
            lane.arm()
        self._look()

    def _look(self) -> None:
        """Deliver what there is; in pieces, so that others have their turn."""
        if not self.closed:
            self.poll()
            if not self.closed and any(lane.more for lane in self._lanes):
                self._loop.call_soon(self._look)

    def _spin(self) -> None:
        if not self.closed:
            self.poll()
            self._loop.call_soon(self._spin)


class _Write:
    """A write, and how much of it the device has."""

    __slots__ = ("address", "at", "index", "nbytes", "registered", "rkey", "tag", "views")

    def __init__(self, buffers: Sequence[Buffer], nbytes: int, address: int, rkey: int, tag: int) -> None:
        self.views = [view for buffer in buffers if (view := memoryview(buffer)).nbytes]
        self.nbytes = nbytes
        self.address = address
        """At the peer, of the next request."""
        self.rkey = rkey
        self.tag = socket.htonl(tag)
        self.index = 0
        self.at = 0
        """Of view number ``index``, the next byte."""
        self.registered: list[Any] = []
        """For this write only; its end is the last one's."""

    def release(self) -> None:
        for mr in self.registered:
            with contextlib.suppress(verbs.pyverbs().Error):
                mr.close()


class _Request:
    """What is given back when a request is complete."""

    __slots__ = ("nbytes", "serial", "staged", "write")

    def __init__(self, serial: int, nbytes: int, staged: int, write: _Write | None) -> None:
        self.serial = serial
        self.nbytes = nbytes
        self.staged = staged
        """Bytes of the staging memory."""
        self.write = write
        """That of which this was the last request."""


class _Lane:
    """A lane's queue pair, and the account of what is under way on it."""

    def __init__(
        self, lanes: RdmaLanes, lane: Lane, pair: QueuePair, holdings: Holdings, staging: memoryview, staging_key: int
    ) -> None:
        self.pair = pair
        self.psn = secrets.randbits(24)
        self.credits = self.max_credits = 0
        """Receives that the peer has posted, as far as is known here; and how many it can have."""
        self.more = False
        """Whether the device may have more completions than were taken last."""
        self._lanes = lanes
        self._lane = lane
        self._holdings = holdings
        self._closed: TransportError | None = None
        self._drainers: list[asyncio.Future[None]] = []
        self._arrival_opcode = verbs.pyverbs().e.IBV_WC_RECV_RDMA_WITH_IMM

        self._waiting: deque[_Write] = deque()
        """Writes for which there is no room yet; the first one may be under way in part."""
        self._sent: deque[_Request] = deque()
        """Requests that the device has, and that are not known to be complete."""
        self.pending_bytes = 0
        self._room = pair.queue
        self._serial = self._signalled = 0
        """Of the last request, and of the last one that asks for a completion."""
        self._signal_writes = min(SIGNAL_WRITES, pair.queue // 4)
        self._unsignalled_bytes = 0
        self._unseen_bytes = 0
        """Of requests without a tag, of which the peer is told otherwise."""
        self._watched = self._stuck_periods = 0

        # A request that carries its bytes in itself takes them from here.
        self._inline = memoryview(bytearray(max(1, pair.inline_bytes)))
        self._inline_address = address_of(self._inline)
        # A ring, which is given back in the order in which it was taken.
        self._staging = staging
        self._staging_address = address_of(staging)
        self._staging_key = staging_key
        self._staging_at = self._staging_used = 0

        self._arrived: deque[tuple[int, int]] = deque()
        """Tags that are not delivered yet, and their bytes."""
        self._heard_probe = False
        self._taken = 0
        """Receives that arrivals took since ``batch`` were last posted."""
        self._returned = 0
        """Receives that were posted and that the peer does not know of."""

    # -- sending

    def write(self, write: _Write) -> None:
        self.pending_bytes += write.nbytes
        if self._waiting:
            self._waiting.append(write)
            return
        try:
            if self._post(write):
                return
        except (TransportError, CapacityError, verbs.pyverbs().Error) as error:
            self._fail(f"a write could not be sent: {error}")
        self._waiting.append(write)
        self._await_completions()

    def mark(self) -> None:
        """See to it that there will be a completion after all requests so far."""
        if self._serial != self._signalled and not self._closed:
            try:
                self._hand_over([], 0, 0, None, None, 0, signal=True, inline=False)
            except verbs.pyverbs().Error as error:
                self._fail(f"the device takes no more: {error}")

    def give_credits(self, count: int) -> bool:
        """The peer posted ``count`` receives; False if it cannot have that many."""
        if self.credits + count > self.max_credits:
            return False
        self.credits += count
        self._post_waiting()
        return True

    def look_pending(self) -> int:
        """Bytes of writes that the device or the peer does not have."""
        if self.pending_bytes and not self._closed:
            self.mark()
            self._reap_aside()
        return self.pending_bytes

    async def drain(self) -> None:
        if self._closed:
            raise self._closed
        if not self.pending_bytes and not self._waiting:
            return
        done = asyncio.get_running_loop().create_future()
        self._drainers.append(done)
        try:
            self._await_completions()
            await done
        finally:
            if done in self._drainers:
                self._drainers.remove(done)

    def arm(self) -> None:
        """Be woken by arrivals; by completions of writes only if somebody waits for them."""
        if not self._lanes.busy_poll:
            self.pair.arm(not (self._waiting or self._drainers))

    def stuck_periods(self) -> int:
        """For how many calls the device has not completed what it had at the first one."""
        oldest = self._sent[0].serial if self._sent else 0
        self._stuck_periods = self._stuck_periods + 1 if oldest and oldest == self._watched else 0
        self._watched = oldest
        if oldest:
            self.mark()
        return self._stuck_periods

    def _await_completions(self) -> None:
        self.mark()
        self.arm()
        self._reap_aside()

    def _post_waiting(self) -> None:
        try:
            while self._waiting and self._post(self._waiting[0]):
                self._waiting.popleft()
            if self._drainers and not self._waiting:
                self.mark()
        except (TransportError, CapacityError, verbs.pyverbs().Error) as error:
            self._fail(f"a write could not be sent: {error}")

    def _post(self, write: _Write) -> bool:
        """Give ``write`` to the device as far as there is room; True if that was all."""
        # One more would be left for a mark.
        while self._room > 1 and self.credits:
            if write.nbytes <= self.pair.inline_bytes:
                at = 0
                for view in write.views:
                    self._inline[at : at + view.nbytes] = view.cast("B")
                    at += view.nbytes
                pieces = [(self._inline_address, at, 0)] if at else []
                self._hand_over(pieces, write.address, write.rkey, write.tag, write, 0, signal=False, inline=at > 0)
                return True
            pieces, nbytes, staged = self._gather(write)
            if not pieces:
                self.mark()  # what takes the staging memory may not have asked for a completion
                return False
            last = write.index == len(write.views)
            self._hand_over(
                pieces,
                write.address,
                write.rkey,
                write.tag if last else None,
                write if last else None,
                staged,
                signal=last and bool(write.registered),
                inline=False,
            )
            write.address += nbytes
            if last:
                return True
        return False

    def _gather(self, write: _Write) -> tuple[list[Piece], int, int]:
        """The next pieces of ``write`` for one request, their bytes, and how much staging memory they take."""
        pieces: list[Piece] = []
        total = used = 0
        while write.index < len(write.views) and len(pieces) < self.pair.max_gather and total < self.pair.max_bytes:
            view, at = write.views[write.index], write.at
            nbytes = min(view.nbytes - at, self.pair.max_bytes - total)
            address, key = 0, None
            if not view.readonly:
                address = address_of(view) + at
                key = self._holdings.find(view.obj, address, nbytes)
            if key is None and view.nbytes <= COPY_BYTES:
                taken = self._stage(nbytes)
                if not taken:
                    break
                used += taken
                start = self._staging_at - nbytes
                self._staging[start : start + nbytes] = view.cast("B")[at : at + nbytes]
                address, key = self._staging_address + start, self._staging_key
            elif key is None:
                start = verbs.address_of_readonly(view)
                mr = self._holdings.device.register(start + at, nbytes)
                write.registered.append(mr)
                address, key = start + at, mr.lkey
            if pieces and key == pieces[-1][2] and address == sum(pieces[-1][:2]):
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + nbytes, key)
            else:
                pieces.append((address, nbytes, key))
            total += nbytes
            write.at += nbytes
            if write.at == view.nbytes:
                write.index, write.at = write.index + 1, 0
        return pieces, total, used

    def _stage(self, nbytes: int) -> int:
        """Take ``nbytes`` in one piece, up to ``_staging_at``; how many were taken for it, 0 if there are none."""
        start, taken = self._staging_at, nbytes
        if start + nbytes > STAGING_BYTES:
            start, taken = 0, STAGING_BYTES - start + nbytes
        if self._staging_used + taken > STAGING_BYTES:
            return 0
        self._staging_used += taken
        self._staging_at = start + nbytes
        return taken

    def _hand_over(
        self,
        pieces: list[Piece],
        address: int,
        rkey: int,
        tag: int | None,
        write: _Write | None,
        staged: int,
        *,
        signal: bool,
        inline: bool,
    ) -> None:
        """Post a request, and account for it. ``write`` is what it is the last of."""
        nbytes = sum(piece[1] for piece in pieces)
        serial = self._serial + 1
        self._unsignalled_bytes += nbytes
        if signal or serial - self._signalled >= self._signal_writes or self._unsignalled_bytes >= SIGNAL_BYTES:
            signal = True
            self._signalled = serial
            self._unsignalled_bytes = 0
        self._serial = serial
        self._sent.append(_Request(serial, nbytes, staged, write))
        self._room -= 1
        self._lanes.bytes_written[self._lane] += nbytes
        if tag is None:
            self._unseen_bytes += nbytes
        else:
            self.credits -= 1
            if self._unseen_bytes and self._lanes.owner is not None:
                self._lanes.owner.send_note({"lane": int(self._lane), "bytes": self._unseen_bytes})
                self._unseen_bytes = 0
        self.pair.post(serial, pieces, address, rkey, tag, signal=signal, inline=inline)

    # -- what the device tells

    def reap(self) -> None:
        """Take completions: of writes, which are accounted for at once, and of arrivals, for ``deliver``."""
        if self._closed:
            return
        count, completions = self.pair.poll(MAX_COMPLETIONS)
        self.more = count == MAX_COMPLETIONS
        sent = 0
        for completion in completions:
            if completion.status:
                self._fail(verbs.status_in_words(completion.status))
                return
            serial = completion.wr_id
            if serial:
                sent = serial
                continue
            if completion.opcode != self._arrival_opcode:
                self._fail("the peer sent something else than a write")
                return
            self._taken += 1
            if self._heard_probe:
                self._arrived.append((socket.ntohl(completion.imm_data), completion.byte_len))
            self._heard_probe = True
        if sent:
            self._completed(sent)
        if self._taken >= self.pair.batch:
            self.return_receives()

    def deliver(self) -> bool:
        """Tell the owner what arrived; whether there was anything."""
        lanes, lane, arrived = self._lanes, self._lane, self._arrived
        if not arrived or lanes.owner is None:
            return False
        while arrived and not lanes.closed:
            tag, nbytes = arrived.popleft()
            lanes.tags_received[lane] += 1
            lanes.bytes_received[lane] += nbytes
            lanes.owner.delivered(lane, tag)
        return True

    def probed(self) -> bool:
        """Whether the first write of either end has arrived."""
        self.reap()
        return self._heard_probe and not self._sent

    def return_receives(self) -> None:
        """Post receives for those that were taken, and tell the peer."""
        while self._taken >= self.pair.batch:
            self.pair.post_receives()
            self._taken -= self.pair.batch
            self._returned += self.pair.batch
        if self._returned and self._lanes.owner is not None:
            self._lanes.owner.send_note({"lane": int(self._lane), "credits": self._returned})
            self._returned = 0

    def _reap_aside(self) -> None:
        """``reap`` where nothing may be delivered."""
        self.reap()
        if self._arrived or self.more:
            self._lanes.deliver_soon()

    def _completed(self, serial: int) -> None:
        sent = self._sent
        while sent and sent[0].serial <= serial:
            request = sent.popleft()
            self._room += 1
            self.pending_bytes -= request.nbytes
            self._staging_used -= request.staged
            if request.write is not None and request.write.registered:
                request.write.release()
        if self._waiting:
            self._post_waiting()
        if self._drainers and not self.pending_bytes and not self._waiting:
            for done in self._drainers:
                if not done.done():
                    done.set_result(None)

    def _fail(self, reason: str) -> None:
        self._lanes.fail(PeerLostError(f"cannot be reached over RDMA any more: {reason}"))

    def close(self, error: TransportError) -> None:
        self._closed = error
        self.pair.close()
        for request in self._sent:
            if request.write is not None:
                request.write.release()
        for write in self._waiting:
            write.release()
        self._sent.clear()
        self._waiting.clear()
        self._arrived.clear()
        self.pending_bytes = 0
        self._staging.release()
        for done in self._drainers:
            if not done.done():
                done.set_exception(error)
