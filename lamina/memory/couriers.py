"""Links between memory nodes, on the node's loop: those over which a tenant's blocks leave, and those on which they
come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from lamina.errors import LaminaError, MoveError, ProtocolError, TransportError, first_error
from lamina.memory.moves import ReceivingLane, SendingLane
from lamina.memory.tenant import Tenant
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Address, Link, Region
from lamina.wire.codec import decode, encode
from lamina.wire.moves import FromReceiver, Join, Joined, layout_digest
from lamina.wire.questions import Questions
from lamina.wire.tenants import Attach, Send

log = logging.getLogger("lamina.memory")

IDLE_S = 10.0
"""The seconds after which a link is closed over which nothing is sent."""
REACH_S = 5.0
"""The seconds that a link may take until both ends are ready, unless ``peer_timeout`` is longer."""

OpenLink = Callable[[Address], Awaitable[Link]]
"""Connects to a memory node."""
OnEnd = Callable[[int, str | None], None]
"""Is told the number of a transfer that has ended, with the reason if it has failed."""


class Couriers:
    """Sends blocks of one tenant to other memory nodes, over one link to each of them.

    It lives as long as the front's link, and all its coroutines run in the front's task group, to which ``begin`` adds
    one.
    """

    def __init__(
        self,
        attach: Attach,
        tenant: Tenant,
        device: Device,
        open_link: OpenLink,
        peer_timeout: float,
        on_end: OnEnd,
        begin: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.attach = attach
        self.tenant = tenant
        self.device = device
        self.open_link = open_link
        self.peer_timeout = peer_timeout
        self.on_end = on_end
        self._begin = begin
        self._open: dict[str, _Courier] = {}
        """By the address of the other memory node."""

    def send(self, message: Send) -> None:
        """Send blocks, after all that was asked for before has gone to the same memory node."""
        courier = self._open.get(message.to)
        if courier is None:
            courier = self._open[message.to] = _Courier(self, message.to, message.name)
            self._begin(self._run(courier))
        courier.send(message)

    def forget(self, transfer: int) -> None:
        """Stop a transfer, if it is one. Its end is not told."""
        for courier in self._open.values():
            courier.forget(transfer)

    def retire(self, courier: _Courier) -> None:
        """Give nothing more to a courier."""
        if self._open.get(courier.to) is courier:
            del self._open[courier.to]

    async def _run(self, courier: _Courier) -> None:
        try:
            await courier.run()
        finally:
            self.retire(courier)
            courier.end()


class _IdleError(Exception):
    """A link has nothing to carry."""


class _Courier:
    """One link to another memory node, from its first transfer until there has been none for a while."""

    def __init__(self, owner: Couriers, to: str, name: str) -> None:
        self.to = to
        self._owner = owner
        self._name = name
        self._there = Crossing(owner.device.loop)
        self._under_way: dict[int, Send] = {}
        self._lane: SendingLane | None = None
        self._credits = Region(f"{name}.credits", 64)
        self._reason = "the front is gone"
        self._changed = asyncio.Event()
        """Set when a transfer has come or ended."""

    def send(self, message: Send) -> None:
        self._under_way[message.transfer] = message
        self._changed.set()
        if self._lane is not None:
            self._there.post(self._lane.send, message)

    def forget(self, transfer: int) -> None:
        if self._under_way.pop(transfer, None) is not None:
            self._changed.set()
            if self._lane is not None:
                self._there.post(self._lane.forget, transfer)

    def _end_one(self, transfer: int, failure: str | None) -> None:
        if self._under_way.pop(transfer, None) is not None:
            self._changed.set()
            self._owner.on_end(transfer, failure)

    def end(self) -> None:
        """No transfer that is left will arrive. `run` has ended."""
        if self._under_way:
            log.warning("event=moves_failed peer=%s moves=%d reason=%r", self._name, len(self._under_way), self._reason)
        for transfer in list(self._under_way):
            self._end_one(transfer, self._reason)

    async def run(self) -> None:
        """Carry what is to be sent until there is nothing, or an error ends all of it."""
        link: Link | None = None
        lane: SendingLane | None = None
        try:
            lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(max(REACH_S, self._owner.peer_timeout)):
                link = await self._connect()
                lane = await self._join(link, lost)
            for message in self._under_way.values():
                self._there.post(lane.send, message)
            self._lane = lane
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._there.run(lane.run()))  # to its end, as the tenant's memory may be freed then
                tasks.create_task(_watch(lost))
                tasks.create_task(self._wait_until_idle())
        except* _IdleError:
            assert link is not None
            await link.close()
        except* TimeoutError:
            self._reason = f"memory node {self._name} at {self.to} has not answered in time"
        except* LaminaError as group:
            self._reason = str(first_error(group))
        except* Exception as group:
            log.exception("event=courier_failed peer=%s", self._name)
            self._reason = f"internal error: {first_error(group)!r}"
        finally:
            self._lane = None
            if lane is not None:
                self._there.post(lane.close)
            if link is not None and not link.state.closed:
                link.abort(self._reason)
            self._credits.close()

    async def _connect(self) -> Link:
        link = await self._owner.open_link(Address.parse(self.to))
        peer = link.info.peer
        if (peer.role, peer.name) != ("memory", self._name):
            link.abort(f"it is not memory node {self._name}")
            raise MoveError(f"at {self.to} is {peer.role} node {peer.name}; expected memory node {self._name}")
        return link

    async def _join(self, link: Link, lost: asyncio.Future[None]) -> SendingLane:
        """Agree with the other node about the tenant; return what sends its blocks."""
        owner, home = self._owner, Crossing(asyncio.get_running_loop())
        questions = Questions(link)

        def on_message(plain: dict[str, Any]) -> None:
            message = decode(plain, FromReceiver)
            if isinstance(message, Joined):
                if not questions.answer(message):
                    raise ProtocolError("a second Joined")
                return
            error = MoveError(f"memory node {self._name}: {message.reason}")
            if not questions.refuse(error):
                _set_error(lost, error)

        def on_lost(error: TransportError) -> None:
            questions.fail(error)
            _set_error(lost, error)

        link.deliver(on_message=on_message, on_lost=on_lost, lane_loop=owner.device.loop)
        told, region = owner.attach, link.expose(self._credits)
        joined: Joined = await questions.ask(
            Join(tenant=told.tenant, token=told.token, layout=layout_digest(told), credits=region)
        )
        lane = SendingLane(
            link,
            owner.tenant,
            joined.chunks,
            owner.peer_timeout,
            lambda transfer, failure: home.post(self._end_one, transfer, failure),
        )
        link.deliver(on_message=on_message, on_tag=lane.on_tag, on_lost=on_lost)
        return lane

    async def _wait_until_idle(self) -> None:
        while True:
            self._changed.clear()
            if self._under_way:
                await self._changed.wait()
                continue
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._changed.wait()
            except TimeoutError:
                self._owner.retire(self)
                raise _IdleError from None


class CourierReceiver:
    """Serves one link on which another memory node sends blocks of ``tenant``, from its Join until the link ends.

    Its counterpart on the device's loop is a `ReceivingLane`. ``ended`` is set when neither serves any more.
    """

    def __init__(self, link: Link, join: Join, tenant: Tenant, device: Device, peer_timeout: float) -> None:
        self.ended = asyncio.Event()
        self._link = link
        self._there = Crossing(device.loop)
        self._lane = ReceivingLane(link, tenant, join.credits, peer_timeout)
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self) -> None:
        """Store what comes until the link ends; raise the error that ended it, in an exception group."""
        link, lane, reason = self._link, self._lane, "the node was told to stop"
        try:
            link.deliver(on_message=_expect_none, on_tag=lane.on_tag, on_lost=self.end)
            link.send(encode(Joined(chunks=link.expose(lane.region))))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._there.run(lane.run()))
                tasks.create_task(_watch(self._gone))
        except* Exception as group:
            reason = str(first_error(group))
            raise
        finally:
            self._there.post(lane.close, reason)
            self.ended.set()

    def end(self, error: TransportError) -> None:
        """Have `serve` raise an error that says why."""
        _set_error(self._gone, error)


async def _watch(lost: asyncio.Future[None]) -> None:
    await lost


def _set_error(future: asyncio.Future[None], error: LaminaError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody may have come to wait for it


def _expect_none(plain: dict[str, Any]) -> None:
    raise ProtocolError(f"a {plain.get('type')!r} from a memory node that sends blocks; expected none after its Join")
