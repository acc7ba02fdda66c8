"""Talk to another compute node, on the node's loop: the meeting at the start, then the front's orders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from lamina.compute.peer_lane import PeerLane
from lamina.errors import NodeError, ProtocolError, TransportError
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Link, Region
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import decode
from lamina.wire.orders import (
    Claim,
    Done,
    Enlist,
    Enlisted,
    Forget,
    FromPeer,
    GaveUp,
    GivenUp,
    Greeting,
    Membership,
    Missing,
    Order,
    Reached,
    Records,
)
from lamina.wire.parts import Part, Reassembly, send_whole
from lamina.wire.questions import Questions


class PeerControl:
    """Represents another compute node of the same model, member ``member`` of the cluster, on the node's loop.

    Its counterpart on the device's loop is ``lane``. When the link is lost, every question fails, the lane fails, and
    ``on_lost`` is called: in a node, `lamina.front.members.Members.lose`. ``on_order`` takes the orders of the front;
    until it is set, an order is an error. ``on_members`` takes its news of members, ``on_enlist`` that it takes this
    node in, ``on_records`` what it wants kept of its journal, ``on_reach`` what another compute node says of memory
    nodes, and ``on_claim`` which node the peer takes for the front.
    """

    def __init__(
        self, member: int, name: str, link: Link, device: Device, on_lost: Callable[[int, NodeError], None]
    ) -> None:
        """Nothing may be delivered from ``link`` yet; its lanes will belong to ``device``."""
        self.member = member
        self.name = name
        self.link = link
        self.lane = lane = PeerLane(name, link)
        self.on_order: Callable[[Order | Forget], None] | None = None
        self.on_members: Callable[[Membership], None]
        self.on_enlist: Callable[[Enlist], None]
        self.on_records: Callable[[Records], None]
        self.ignore_front()
        self.on_reach: Callable[[int, Reached | Missing], None] = lambda member, news: None
        self.on_claim: Callable[[Claim], None] = lambda claim: None
        self.is_open = False
        """Whether the peer has agreed on the terms."""
        self.leads = False
        """Whether the peer has said on this link that it is the front."""
        self.membership: Membership | None = None
        """What the peer, as the front, has said last of the members."""
        self.enlistment: Enlist | None = None
        """How the peer, as the front, has taken this node in."""
        self._there = Crossing(device.loop)
        self._on_lost_member = on_lost
        self._questions = Questions(link, in_parts=True)
        self._parts = Reassembly()
        self._error: NodeError | None = None
        self._greeting = self._questions.expect(Greeting)
        self._agreeing: asyncio.Future[None] | None = None
        self._enlists = 0
        """How often this node has taken the peer in, as the front."""
        link.deliver(on_message=self._on_message, on_tag=lane.on_tag, on_lost=self._on_lost, lane_loop=device.loop)

    def ignore_front(self) -> None:
        """Do nothing about what the peer says as the front; what it says of the members, and of this one, is kept."""
        self.on_members = lambda told: None
        self.on_enlist = lambda enlist: None
        self.on_records = lambda records: None

    # -- meeting

    async def meet(self, agree: Callable[[PeerControl], Coroutine[Any, Any, None]]) -> None:
        """Wait until ``agree`` has agreed with the peer on everything, which is done once, whoever waits for it."""
        if self._agreeing is None:
            self._agreeing = asyncio.ensure_future(agree(self))
            self._agreeing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._agreeing)

    async def greet(self, terms: dict[str, str], slots: int, carry_bytes: int) -> dict[str, str]:
        """Exchange terms and the regions for carries, of ``carry_bytes`` for each of ``slots``; return the peer's
        terms. Raises NodeError if the peer is lost."""
        own = Region(f"carries from {self.name}", slots * carry_bytes)
        try:
            self.send(Greeting(carries=self.link.expose(own), terms=terms))
            greeting: Greeting = await self._greeting
        except TransportError as e:
            own.close()
            raise NodeError.lost("compute", self.name, e) from e
        except BaseException:
            own.close()
            raise
        self._carries = own, greeting.carries, carry_bytes
        return greeting.terms

    def close(self) -> None:
        """Free the memory of this end. The link and the device's loop have ended."""
        if self._agreeing is not None:
            self._agreeing.cancel()
        self.lane.close()

    def open(self) -> None:
        """Let the lane take and hand over carries; called when the terms agree, before any step."""
        self.lane.open(*self._carries)
        self.is_open = True

    def drop(self, reason: str) -> None:
        """End the link; to its owner, the peer is lost."""
        self.link.abort(reason)
        self._on_lost(TransportError(reason))

    def enlist(self, enlist: Enlist) -> asyncio.Future[Enlisted]:
        """Tell the peer, as the front, which tenant it belongs to. The future is done when the peer is ready."""
        self._enlists += 1
        waiting = self._questions.expect((Enlisted, self._enlists))
        self.send(enlist)
        return waiting

    # -- steps

    async def order(self, order: Order) -> Done:
        """Have the peer run its slices of a step; only the front does that. Raises NodeError if it is lost, cannot be
        told, or cannot do it."""
        try:
            done: Done = await self._questions.ask(order, (order.slot, order.step))
        except TransportError as e:
            raise NodeError(f"compute node {self.name} cannot be told what to do: {e}", node=self.name) from e
        return done

    def send(
        self,
        message: Greeting
        | Membership
        | Claim
        | Records
        | Enlist
        | Enlisted
        | Reached
        | Missing
        | Done
        | GivenUp
        | Forget
        | GaveUp,
    ) -> None:
        """Tell the peer something, unless it is lost, which is announced elsewhere."""
        if not self.link.state.closed:
            send_whole(self.link, message)

    # -- what arrives

    def _on_message(self, plain: dict[str, object]) -> None:
        match decode(plain, FromPeer):
            case Part() as part:
                if (whole := self._parts.add(part)) is not None:
                    self._on_message(whole)
            case Order() | Forget() as message if self.on_order:
                self.on_order(message)
            case Membership() as membership:
                self.membership = membership
                self.on_members(membership)
            case Done() as done if self._questions.answer(done, (done.slot, done.step)):
                pass
            case GivenUp() as answer if self._questions.refuse(answer.error(self.name), (answer.slot, answer.step)):
                pass
            case Reached() | Missing() as news:
                self.on_reach(self.member, news)
            case Claim() as claim:
                if claim.front == self.member:
                    self.membership = self.enlistment = None  # it says both anew
                self.leads = claim.front == self.member
                self.on_claim(claim)
            case Enlist() as enlist:
                self.enlistment = enlist
                self.on_enlist(enlist)
            case Records() as records:
                self.on_records(records)
            case Greeting() as greeting if self._questions.answer(greeting, Greeting):
                pass
            case Enlisted() as enlisted if self._questions.answer(enlisted, (Enlisted, self._enlists)):
                pass
            case GaveUp(reason=reason):
                self._fail(NodeError(f"compute node {self.name} gave up: {reason}", node=self.name))
            case _:
                raise ProtocolError(f"{self.name} sends {plain.get('type')!r}, which was not asked for")

    def _on_lost(self, error: TransportError) -> None:
        self._fail(NodeError.lost("compute", self.name, error))

    def _fail(self, error: NodeError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._questions.fail(error)
        self._there.post(self.lane.fail, error)
        self._on_lost_member(self.member, error)

    def describe(self) -> PeerStatus:
        """Return what the status says about the link to the peer."""
        return PeerStatus.over(self.link, self.name, waited_s=self.lane.waited_s)
