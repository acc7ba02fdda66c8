"""Serve what a compute node says about the space of sequences, on the node's loop of a memory node."""

from __future__ import annotations

import asyncio

from lamina.errors import CapacityError, ProtocolError, TransportError
from lamina.memory.serving import ServingLane
from lamina.memory.tenant import Tenant
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Link
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import decode, encode
from lamina.wire.tenants import (
    Attach,
    Detach,
    Expect,
    Forget,
    FromCompute,
    MoveFailed,
    Publish,
    Refused,
    Release,
    Reserve,
    Reserved,
    Send,
    Void,
)


class StaleTermError(TransportError):
    """A compute node is of a term that is over, or has not begun; the tenant is in ``term``."""

    def __init__(self, reason: str, term: int) -> None:
        super().__init__(reason)
        self.term = term


class ServingControl:
    """Serves one link of a compute node of ``tenant``, from its Attach until the link ends.

    Its counterpart on the device's loop is a `ServingLane`. ``ended`` is set when neither serves any more.
    ``has_detached`` says whether the front has ended its tenant.
    """

    def __init__(self, link: Link, attach: Attach, tenant: Tenant, device: Device) -> None:
        self.ended = asyncio.Event()
        self.has_detached = False
        self._link = link
        self._attach = attach
        self._tenant = tenant
        self._device = device
        self._there = Crossing(device.loop)
        self._messages: asyncio.Queue[Reserve | Publish | Release | Expect | Send | Forget] = asyncio.Queue()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> str:
        """Return the name of the compute node."""
        return self._link.info.peer.name

    def describe(self) -> PeerStatus:
        """Return what the status of the node says about this link."""
        return PeerStatus.over(self._link, self.peer)

    async def serve(self) -> None:
        """Answer until the link ends; raise the error that ended it, in an exception group."""
        link, member = self._link, self._attach.member
        home = Crossing(asyncio.get_running_loop())
        lane = ServingLane(link, self._attach, self._tenant, lambda void: home.post(self._say, void))
        try:
            await self._there.call(self._tenant.join, member, lane)
            link.deliver(on_message=self._on_message, on_tag=lane.on_tag, on_lost=self._on_lost)
            link.send(encode(lane.attached()))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._serve_lane(lane))
                tasks.create_task(self._obey())
                tasks.create_task(self._watch())
        finally:
            self._there.post(self._tenant.leave, member)  # without a wait, in which this could be cancelled
            self.ended.set()

    def end(self, error: TransportError) -> None:
        """Have `serve` raise an error that says why."""
        self._on_lost(error)

    async def _serve_lane(self, lane: ServingLane) -> None:
        await self._there.run(lane.run())  # to its end, as the tenant's memory may be freed afterwards

    async def _watch(self) -> None:
        await self._gone

    async def _obey(self) -> None:
        """Reserve, publish and release, in the order of the messages."""
        tenant = self._tenant
        while True:
            message = await self._messages.get()
            if isinstance(message, Expect | Send):
                self._link.send(encode(MoveFailed(transfer=message.transfer, reason="blocks cannot be moved yet")))
                continue
            if isinstance(message, Forget):
                continue
            if not isinstance(message, Reserve):
                await self._there.start(self._device.run(tenant.publish_or_release, message))
                continue
            try:
                shared, _ = await self._there.start(self._device.run(tenant.reserve, message))
            except CapacityError as e:
                self._link.send(encode(Refused(reason=str(e), sequence=message.sequence)))
            else:
                self._link.send(encode(Reserved(sequence=message.sequence, shared=shared)))

    def _say(self, void: Void) -> None:
        if not self._link.state.closed:
            self._link.send(encode(void))

    def _on_message(self, plain: dict[str, object]) -> None:
        message = decode(plain, FromCompute)
        if isinstance(message, Attach):
            raise ProtocolError("a second Attach on a link that is attached already")
        if not self._attach.from_front:
            raise ProtocolError(
                f"a {plain['type']} from compute node {self._attach.member} of tenant {self._tenant.name}; expected it "
                f"only from the tenant's front, compute node {self._attach.front}"
            )
        if isinstance(message, Detach):
            self.has_detached = True
            self.end(TransportError("it has left"))
            return
        self._messages.put_nowait(message)

    def _on_lost(self, error: TransportError) -> None:
        if not self._gone.done():
            self._gone.set_exception(error)
            self._gone.exception()  # `serve` may not have come to wait for it
