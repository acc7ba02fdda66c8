"""Serve what a compute node says about the space of sequences, on the node's loop of a memory node."""

from __future__ import annotations

import asyncio

from lamina.errors import CapacityError, ProtocolError, TransportError, UsageError
from lamina.memory.couriers import Couriers, OpenLink
from lamina.memory.serving import ServingLane
from lamina.memory.tenant import Tenant
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Link
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import Message, decode, encode
from lamina.wire.tenants import (
    Attach,
    Detach,
    Expect,
    Expected,
    ForgetTransfer,
    FromCompute,
    Moved,
    MoveFailed,
    Publish,
    Refused,
    Release,
    Reserve,
    Reserved,
    Send,
)


class StaleTermError(TransportError):
    """A compute node is of a term that is over, or has not begun; the tenant is in ``term``. ``holder`` is the front
    whose place no other compute node can take."""

    def __init__(self, reason: str, term: int, holder: str = "") -> None:
        super().__init__(reason)
        self.term = term
        self.holder = holder


class ServingControl:
    """Serves one link of a compute node of ``tenant``, from its Attach until the link ends.

    Its counterpart on the device's loop is a `ServingLane`. ``ended`` is set when neither serves any more.
    ``has_detached`` says whether the front has ended its tenant.
    """

    def __init__(
        self, link: Link, attach: Attach, tenant: Tenant, device: Device, open_link: OpenLink, peer_timeout: float
    ) -> None:
        """``open_link`` connects to other memory nodes; one that does nothing for ``peer_timeout`` seconds is lost."""
        self.ended = asyncio.Event()
        self.has_detached = False
        self._link = link
        self._attach = attach
        self._tenant = tenant
        self._device = device
        self._open_link = open_link
        self._peer_timeout = peer_timeout
        self._there = Crossing(device.loop)
        self._messages: asyncio.Queue[Reserve | Publish | Release | Expect | Send | ForgetTransfer] = asyncio.Queue()
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
                couriers = Couriers(
                    self._attach,
                    self._tenant,
                    self._device,
                    self._open_link,
                    self._peer_timeout,
                    self._say_end,
                    tasks.create_task,
                )
                tasks.create_task(self._serve_lane(lane))
                tasks.create_task(self._obey(couriers))
                tasks.create_task(self._watch())
        finally:
            if self._attach.from_front:
                self._there.post(self._tenant.forget_all)
            self._there.post(self._tenant.leave, member)  # without a wait, in which this could be cancelled
            self.ended.set()

    def end(self, error: TransportError) -> None:
        """Have `serve` raise an error that says why."""
        self._on_lost(error)

    async def _serve_lane(self, lane: ServingLane) -> None:
        await self._there.run(lane.run())  # to its end, as the tenant's memory may be freed afterwards

    async def _watch(self) -> None:
        await self._gone

    async def _obey(self, couriers: Couriers) -> None:
        """Reserve, publish, release and move, in the order of the messages."""
        tenant = self._tenant
        while True:
            message = await self._messages.get()
            match message:
                case Reserve():
                    await self._reserve(message)
                case Expect():
                    await self._expect(message)
                case Send():
                    couriers.send(message)
                case ForgetTransfer():
                    couriers.forget(message.transfer)
                    await self._there.start(self._device.run(tenant.forget, message.transfer))
                case _:
                    await self._there.start(self._device.run(tenant.publish_or_release, message))

    async def _reserve(self, message: Reserve) -> None:
        try:
            shared, _ = await self._there.start(self._device.run(self._tenant.reserve, message))
        except (CapacityError, UsageError) as error:
            if isinstance(error, UsageError) and not message.is_derived:
                raise
            self._say(Refused(reason=str(error), sequence=message.sequence))
        else:
            self._say(Reserved(sequence=message.sequence, shared=shared))

    async def _expect(self, message: Expect) -> None:
        home, transfer = Crossing(asyncio.get_running_loop()), message.transfer

        def on_end(transfer: int, failure: str | None) -> None:
            home.post(self._say_end, transfer, failure)

        try:
            await self._there.start(self._device.run(self._tenant.expect, message, on_end))
        except (CapacityError, UsageError) as error:
            self._say_end(transfer, str(error))
        else:
            self._say(Expected(transfer=transfer))

    def _say_end(self, transfer: int, failure: str | None) -> None:
        """Tell the front that all blocks of a transfer are there, or why they are not."""
        self._say(Moved(transfer=transfer) if failure is None else MoveFailed(transfer=transfer, reason=failure))

    def _say(self, message: Message) -> None:
        if not self._link.state.closed:
            self._link.send(encode(message))

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
