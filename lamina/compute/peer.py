"""The way between two compute nodes: carries in both directions; and from the front, what is to be done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.compute.arrivals import Arrivals, fail
from lamina.errors import LaminaError, NodeError, ProtocolError, TransportError
from lamina.runtime.device import Device
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import decode, encode
from lamina.wire.geometry import aligned
from lamina.wire.orders import Done, Enlist, Enlisted, Forget, Greeting, Order
from lamina.wire.tags import Kind, Tag
from lamina.wire.tenants import Refused

Shape = tuple[tuple[int, ...], torch.dtype]

FromPeer = Greeting | Enlist | Enlisted | Order | Done | Forget | Refused


class ComputePeer:
    """Another compute node of the same model, number ``index``.

    Set-up and messages belong to the node's loop, carries to the device's, where the lanes are. What a slot's carry
    lies in is written again only after the step has come back, so nothing has to be acknowledged.
    """

    def __init__(self, index: int, name: str, link: Link, device: Device) -> None:
        """``link`` is new: its lanes are given to ``device``."""
        self.index = index
        self.name = name
        self.link = link
        self.on_message: Callable[[Order | Forget], None] | None = None
        """Takes what the front orders; on the node's loop."""
        self._device = device
        self._carry_bytes = 0
        self._own: Region | None = None
        self._remote: RemoteRegion | None = None
        self._out = memoryview(b"")
        self._arrivals = Arrivals()
        self._replies: dict[type[Any], asyncio.Future[Any]] = {}
        self._done: dict[tuple[int, int], asyncio.Future[Done]] = {}
        """By slot and step, on the device's loop."""
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        for kind in (Greeting, Enlist, Enlisted):
            self._replies[kind] = loop.create_future()
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost, lane_loop=device.loop)

    # -- set-up

    async def greet(self, terms: dict[str, str], slots: int, carry_bytes: int) -> dict[str, str]:
        """Tell each other the terms, and where carries go, of so many bytes at most in each slot; the peer's terms."""
        self._own = Region(f"carries from {self.name}", slots * carry_bytes)
        self.link.send(encode(Greeting(carries=self.link.expose(self._own), terms=terms)))
        greeting: Greeting = await self._replies[Greeting]
        self._remote, self._carry_bytes = greeting.carries, carry_bytes
        return greeting.terms

    def open(self) -> None:
        """Be ready to hand over, when the terms agree."""
        assert self._own is not None
        assert self._remote is not None
        self._out = views.outgoing(self.link, self._remote, self._own.nbytes)

    def enlist(self, tenant: str) -> None:
        """As the front: tell it which tenant it belongs to."""
        self.send(Enlist(tenant=tenant))

    async def enlisted(self) -> None:
        """As the front: wait until it is ready."""
        await self._replies[Enlisted]

    async def tenant(self) -> str:
        """Wait until the front says which tenant this node belongs to."""
        enlist: Enlist = await self._replies[Enlist]
        return enlist.tenant

    # -- steps, on the device's loop

    def order(self, order: Order, home: asyncio.AbstractEventLoop) -> asyncio.Future[Done]:
        """Have it do its slices of a step; ``home`` is the node's loop, where messages are sent."""
        if self.lost.done():
            self.lost.result()
        done: asyncio.Future[Done] = self._device.loop.create_future()
        self._done[order.slot, order.step] = done
        home.call_soon_threadsafe(self._send_order, order)
        return done

    def _send_order(self, order: Order) -> None:
        try:
            self.send(order)
        except LaminaError as error:  # nobody would ever answer
            self._fail(NodeError(f"compute node {self.name} cannot be told what to do: {error}", node=self.name))

    def hand_over(self, slot: int, piece: int, step: int, values: Sequence[Tensor]) -> None:
        """Give it what slice ``piece`` starts from."""
        assert self._remote is not None
        start = slot * self._carry_bytes
        stop = start
        for value in values:
            out = torch.frombuffer(self._out, dtype=torch.uint8, count=value.nbytes, offset=stop)
            out.view(value.dtype).view(value.shape).copy_(value)
            stop += aligned(value.nbytes)
        tag = Tag(Kind.CARRY, slot, piece, step).pack()
        try:
            self.link.write(Lane.DECODE, self._remote, start, [self._out[start:stop]], tag)
        except TransportError as error:
            if not self.link.state.closed:
                raise
            # The link has ended just now, in its own thread, which has not come to tell us.
            raise self._lost_by(error) from error

    async def take_over(self, slot: int, piece: int, step: int, shapes: Sequence[Shape]) -> list[Tensor]:
        """What it hands over for slice ``piece``, in tensors of these shapes and types.

        They lie where they arrived, and are good until that node hands over to this one again in the slot.
        """
        await self._arrivals.wait(slot, Tag(Kind.CARRY, slot, piece, step).pack())
        assert self._own is not None
        values, start = [], slot * self._carry_bytes
        for shape, dtype in shapes:
            count = torch.Size(shape).numel()
            values.append(torch.frombuffer(self._own.buffer, dtype=dtype, count=count, offset=start).view(shape))
            start += aligned(count * dtype.itemsize)
        return values

    # -- messages

    def send(self, message: Enlist | Enlisted | Order | Done | Forget | Refused) -> None:
        """On the node's loop. Nothing for a node that is lost, which is announced elsewhere."""
        if not self.link.state.closed:
            self.link.send(encode(message))

    def _on_message(self, plain: dict[str, object]) -> None:
        match decode(plain, FromPeer):
            case Order() | Forget() as message if self.on_message:
                self.on_message(message)
            case Done() as done:
                self._device.loop.call_soon_threadsafe(self._finish, done)
            case Refused(reason=reason):
                self._fail(NodeError(f"compute node {self.name} gave up: {reason}", node=self.name))
            case Greeting() | Enlist() | Enlisted() as message if not self._replies[type(message)].done():
                self._replies[type(message)].set_result(message)
            case _:
                raise ProtocolError(f"{self.name} sends {plain.get('type')!r}, which nobody asked for")

    def _finish(self, done: Done) -> None:
        waiting = self._done.pop((done.slot, done.step), None)
        if waiting and not waiting.done():
            waiting.set_result(done)

    def _on_tag(self, lane: Lane, packed: int) -> None:
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CARRY:
            raise ProtocolError(f"a tag of kind {tag.kind.name} from a compute node")
        self._arrivals.arrive(tag.slot, packed)

    def _on_lost(self, error: TransportError) -> None:
        self._fail(self._lost_by(error))

    def _lost_by(self, error: TransportError) -> NodeError:
        return NodeError(f"compute node {self.name} was lost: {error}", node=self.name)

    def _fail(self, error: LaminaError) -> None:
        fail([self.lost, *self._replies.values()], error)
        self._device.loop.call_soon_threadsafe(self._fail_steps, error)

    def _fail_steps(self, error: LaminaError) -> None:
        self._arrivals.fail(error)
        fail(self._done.values(), error)
        self._done.clear()

    async def watch(self) -> None:
        """Wait until it is lost, and raise the NodeError that says so."""
        await self.lost

    @property
    def stale_tags(self) -> int:
        """Carries that nobody waited for."""
        return self._arrivals.stale

    def describe(self) -> PeerStatus:
        """What the status says about the way to it."""
        return PeerStatus.over(self.link, self.name)
