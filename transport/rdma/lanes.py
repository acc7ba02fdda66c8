"""Both lanes of a link over RDMA, and how they are set up."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.errors import CapacityError, PeerLostError, ProtocolError, TransportError
from lamina.transport.base import Lane, Region, address_of
from lamina.transport.lanes import Lanes, LanesOwner, UpgradeError
from lamina.transport.options import Options
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.device import RdmaDevice, check_memlock, open_device
from lamina.transport.rdma.lane import STAGING_BYTES, RdmaLane, RdmaWrite
from lamina.transport.rdma.ports import RdmaPort, find_port
from lamina.transport.rdma.queue_pair import QueuePair
from lamina.transport.rdma.registrations import Registrations

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from lamina.transport.handshake import Session


PROBE_TIMEOUT_S = 1.5
"""The time for a first write in both directions of both lanes."""
PROBE_PERIOD_S = 0.001
WATCH_PERIODS = 4
"""The lanes look for progress so many times in ``peer_timeout``."""


def offer(options: Options) -> dict[str, Any]:
    """Describe the port that this end would use."""
    port = find_port(options.rdma)
    check_memlock()
    return vars(port).copy()


async def upgrade(session: Session) -> Lanes:
    """Connect a queue pair for each lane, and check that writes arrive in both directions."""
    local, remote = RdmaPort.from_offer(session.local_offer), RdmaPort.from_offer(session.peer_offer)
    if local.link_layer != remote.link_layer:
        raise UpgradeError(
            f"one port is {local.link_layer}, the other {remote.link_layer}: choose others by rdma.device"
        )
    lanes = RdmaLanes(open_device(local.device), local, session.options)
    try:
        await session.send({"lanes": lanes.describe()})
        lanes.connect(local, remote, (await session.receive()).get("lanes"))
        # A packet is lost if it comes before the peer's queue pair expects it.
        await session.send({"expecting": True})
        await session.receive()
        await lanes.probe(local, remote)
    except BaseException:
        lanes.close(UpgradeError("the set-up was broken off"))
        raise
    return lanes


class RdmaLanes(Lanes):
    """Both lanes of a link over RDMA."""

    bytes_written: list[int]
    bytes_received: list[int]

    def __init__(self, device: RdmaDevice, port: RdmaPort, options: Options) -> None:
        """Raises UpgradeError, after it has freed everything."""
        super().__init__()
        self.bytes_written = [0, 0]
        self.bytes_received = [0, 0]
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._device = device
        self.busy_poll = options.busy_poll
        self._peer_timeout = options.peer_timeout
        self._timer: asyncio.TimerHandle | None = None
        self.registrations = Registrations(device)
        self._remote: dict[int, tuple[int, int]] = {}
        """The address and the remote key of each region of the peer."""
        self.owner: LanesOwner | None = None
        self._error: TransportError | None = None
        self.closed = False
        self._lanes: list[RdmaLane] = []
        staging = memoryview(mmap.mmap(-1, len(Lane) * STAGING_BYTES))
        try:
            self._staging = device.register(address_of(staging), staging.nbytes)
        except CapacityError as error:
            raise UpgradeError(str(error)) from error
        try:
            for lane in Lane:
                part = staging[lane * STAGING_BYTES : (lane + 1) * STAGING_BYTES]
                pair = QueuePair(device, port, options.rdma.queue)
                self._lanes.append(RdmaLane(self, lane, pair, self.registrations, part, self._staging.lkey))
        except BaseException:
            self.close(UpgradeError("the set-up failed"))
            raise

    # -- set-up

    def describe(self) -> list[list[int]]:
        """Describe each lane to the peer: queue pair number, first packet number, receives that are posted."""
        return [[lane.pair.number, lane.psn, lane.pair.queue] for lane in self._lanes]

    def connect(self, local: RdmaPort, remote: RdmaPort, described: Any) -> None:
        """Connect to the lanes that the peer described. Raises UpgradeError."""
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

    async def probe(self, local: RdmaPort, remote: RdmaPort) -> None:
        """Send an empty write over both lanes, and wait until those of both ends arrived. Raises UpgradeError."""
        for lane in self._lanes:
            lane.write(RdmaWrite([], 0, 0, 0, 0))
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

    def start(self, owner: LanesOwner) -> None:
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
        memory = self.registrations.expose(region.buffer)
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
        self._lanes[lane].write(RdmaWrite(buffers, nbytes, address + offset, rkey, tag))

    def take_note(self, note: dict[str, Any]) -> None:
        match note:
            case {"lane": int(lane), "credits": int(count)} if lane in (0, 1) and count > 0:
                if not self._lanes[lane].give_credits(count):
                    raise ProtocolError(f"the peer has posted {count} receives more than it said that it can")
            case {"lane": int(lane), "bytes": int(nbytes)} if lane in (0, 1) and nbytes > 0:
                self.bytes_received[lane] += nbytes
            case _:
                raise ProtocolError(f"the peer sent a note that RDMA does not know: {note!r:.200}")

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
        # Only the thread of the lanes asks the device: two threads must not take completions at the same time.
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
        with contextlib.suppress(pyverbs().Error):
            self._staging.close()
        self.registrations.close()
        self._remote.clear()

    # -- what happens

    def fail(self, error: TransportError) -> None:
        """Report the first failure, in the next round of the loop."""
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
        """Find a peer whose device does not answer. Some devices retry for ever, or for too long.

        Periods are counted rather than seconds, so that a loop that was blocked does not blame the peer.
        """
        self._timer = self._loop.call_later(self._peer_timeout / WATCH_PERIODS, self._watch)
        self._look()
        for lane in self._lanes:
            if lane.stuck_periods() >= WATCH_PERIODS:
                reason = f"no answer from its device for {self._peer_timeout:.1f} s"
                self.fail(PeerLostError(f"cannot be reached over RDMA any more: {reason}"))

    def deliver_soon(self) -> None:
        self._loop.call_soon(self._look)

    def _on_event(self, lane: RdmaLane) -> None:
        if lane.pair.take_event():
            lane.arm()
        self._look()

    def _look(self) -> None:
        """Deliver what has arrived, in bounded pieces, so that the loop can do other work between them."""
        if not self.closed:
            self.poll()
            if not self.closed and any(lane.more for lane in self._lanes):
                self._loop.call_soon(self._look)

    def _spin(self) -> None:
        if not self.closed:
            self.poll()
            self._loop.call_soon(self._spin)
