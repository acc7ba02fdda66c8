"""What a compute node knows of which one is the front."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from lamina.compute.peer_control import PeerControl
from lamina.config import ClusterConfig
from lamina.errors import NotFrontError, ProtocolError, SupersededError
from lamina.front.members import Members
from lamina.wire.members import MemberEntry
from lamina.wire.orders import Claim


class Claims:
    """Keeps the latest claim to be the front, on the node's loop of member ``member``. ``tell`` sends it to all others.

    Claims only say where to turn to. That one node at a time has the front's part, the memory nodes make sure.
    """

    def __init__(self, config: ClusterConfig, members: Members, *, member: int, tell: Callable[[Claim], None]) -> None:
        self.taken = asyncio.Event()
        """Set when another node has the front's part."""
        self._config = config
        self._members = members
        self._member = member
        self._tell = tell
        self._claim: Claim | None = None
        self._term = 0
        """The latest term of a front that is known, besides those of the members."""

    @property
    def term(self) -> int:
        """Return the latest term of a front that is known."""
        return max(self._term, *(self._members.term(entry.id) for entry in self._members.entries))

    @property
    def leader(self) -> MemberEntry:
        """Return the node that is the front, as far as this one knows."""
        first = self._members.id_of(self._config.front.name)
        return self._members.entry(first if self._claim is None else self._claim.front)

    @property
    def refusal(self) -> NotFrontError:
        """Return the error for clients of a node that is not the front."""
        name, leader = self._members.entry(self._member).name, self.leader
        reason = f"{name} is not the front; clients talk to {leader.name} at {leader.address}"
        return NotFrontError(reason, node=name, address=leader.address)

    def greet(self, peer: PeerControl) -> None:
        """Say what is known on a new link."""
        if self._claim is not None:
            peer.send(Claim(front=self._claim.front, term=self.term))

    def note(self, peer: PeerControl, claim: Claim) -> SupersededError | None:
        """Take in which node a peer takes for the front; if it is another one than this, as far as is known now, return
        the error for a front."""
        known, before = self.term, self._claim
        if not any(entry.id == claim.front and entry.role == "compute" for entry in self._members.entries):
            raise ProtocolError(f"{peer.name} takes member {claim.front} for the front, which is no compute node here")
        if claim.term < known:
            return None
        self._term = claim.term
        if claim.front == self._member:  # also of one that has started anew since
            return None
        if before is not None and claim.term == known and claim.front != before.front and not peer.leads:
            return None
        self._claim = claim
        self.taken.set()
        if before != claim:
            self._tell(claim)
        name = self._members.entry(claim.front).name
        reason = f"compute node {name} has taken the part of the front, in term {claim.term}"
        return SupersededError(reason, node=name, term=claim.term, holder=name)

    async def unless_taken(self, work: Awaitable[None]) -> None:
        """Wait for ``work``, and raise its error, unless `taken` is set, also meanwhile."""
        waiting, taken = asyncio.ensure_future(work), asyncio.ensure_future(self.taken.wait())
        try:
            await asyncio.wait((waiting, taken), return_when=asyncio.FIRST_COMPLETED)
            if not taken.done():
                waiting.result()
        finally:
            waiting.cancel()
            taken.cancel()

    def remember(self) -> None:
        """Keep the present term in mind, as the members forget theirs."""
        self._term = self.term

    def lead(self, term: int) -> None:
        """This node is the front from now on."""
        self._term, self._claim = term, Claim(front=self._member, term=term)
        self._tell(self._claim)

    def give_way(self, error: SupersededError) -> None:
        """Another node has the front's part at a memory node, and has perhaps not said so."""
        if self._claim is None or self._claim.front == self._member:
            self._claim = Claim(front=self._members.id_of(error.holder), term=error.term)
