"""A compute node that is not the front serves under it: attaches where the front is attached, and runs its orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lamina.compute.follower import Follower
from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import Steps
from lamina.config import ClusterConfig
from lamina.errors import LaminaError, NodeError
from lamina.front.members import Members, State
from lamina.node.assemble import TenantKey, agree, attach, limits
from lamina.node.model import ServedModel
from lamina.node.neighbours import Control, Neighbours
from lamina.node.roster import REFUSED_PAUSE_S
from lamina.runtime.crossing import Crossing
from lamina.wire.orders import Enlist, Enlisted, Missing, Reached

log = logging.getLogger("lamina.compute")


class Enlistment:
    """Follows what the front says of the members, on the node's loop.

    While the front is lost, the node keeps its weights and waits for it. What goes wrong with other nodes is told to
    the front, and tried again.
    """

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        members: Members,
        neighbours: Neighbours,
        device: Crossing,
        *,
        name: str,
        make_steps: Callable[[], Awaitable[Steps]],
    ) -> None:
        """``make_steps`` loads the weights, once. ``name`` is that of this node."""
        self.draining = False
        self._config = config
        self._served = served
        self._members = members
        self._neighbours = neighbours
        self._there = device
        self._name = name
        self._own = members.id_of(name)
        self._front = members.id_of(config.front.name)
        self._make_steps = make_steps
        self._runner: Steps | None = None
        self._earlier_steps = 0
        self._follower: Follower | None = None
        self._enlist: Enlist | None = None
        self._attached: dict[ShardControl, int] = {}
        """The terms in which this node has attached, by link."""
        self._agreeing: dict[PeerControl, asyncio.Task[None]] = {}
        self._enlisted_by: PeerControl | None = None
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = loop.create_future()
        self._front_left: asyncio.Event = asyncio.Event()

    @property
    def steps(self) -> int:
        """Return how many steps this node has run for any front."""
        return self._earlier_steps + (self._follower.steps if self._follower else 0)

    async def run(self) -> None:
        """Serve until cancelled, or until an error of this node itself, which is raised; also if its file is not that
        of the front."""
        for control in self._neighbours.controls:
            self.found(control)
        working = asyncio.ensure_future(self._work())
        try:
            await asyncio.wait((working, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            working.result()
        finally:
            tasks = [working, *self._agreeing.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._follower is not None:
                await self._follower.close()

    @property
    def is_ready(self) -> bool:
        """Return whether the front has been told that this node is ready."""
        return self._ready.is_set()

    async def ready(self) -> None:
        """Wait until the front has been told for the first time that this node is ready."""
        await self._ready.wait()

    async def drain(self) -> None:
        """Go on until the front has left: then nothing more will be ordered."""
        self.draining = True
        await self._front_left.wait()

    @property
    def missing(self) -> list[str]:
        """Return the front, while this node waits for it."""
        return [] if self._enlisted_by is not None else [self._config.front.name]

    # -- nodes come and go

    def found(self, control: Control) -> None:
        """There is a link to a node."""
        if isinstance(control, PeerControl):
            self._agreeing[control] = asyncio.ensure_future(self._agree(control))
        self._wake.set()

    def lost(self, member: int, error: NodeError) -> None:
        """The link to a node has ended."""
        if member == self._front:
            log.warning("event=front_lost reason=%r", str(error))
            self._enlist = self._enlisted_by = None
            self._front_left.set()
        elif (front := self._neighbours.peers.get(self._front)) is not None and front.is_open:
            front.send(Missing(member=member, term=self._members.term(member), reason=str(error)))
        self._wake.set()

    def members_changed(self) -> None:
        """The front has said who the members are, and in which states."""
        if self._follower is not None:
            self._follower.limits = limits(self._config, self._served, self._members)
        self._reform()  # before the first order of the new epoch
        self._wake.set()

    async def _agree(self, peer: PeerControl) -> None:
        try:
            await agree(self._config, self._served, peer)
            if peer.member == self._front:
                self._front_left.clear()
                self._enlist = await peer.enlisted_by()
        except NodeError:
            pass  # it is lost, which is said elsewhere
        except LaminaError as error:
            self._fail(error)
        finally:
            self._agreeing.pop(peer, None)
        self._wake.set()

    # -- what follows from it

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            front = self._neighbours.peers.get(self._front)
            if front is None or self._enlist is None:
                await self._follow(None)
                self._reform()
                continue
            for member in self._members.in_state("memory", State.LOST):
                if (shard := self._neighbours.shards.get(member)) is not None and shard.is_attached:
                    self._neighbours.drop(member, "the front has lost it")
            await self._attach_to_all(front, self._enlist)
            if self._runner is None:
                self._runner = await self._make_steps()
            self._reform()
            if self._enlisted_by is not front and self._has_all():
                await self._follow(front)
                self._enlisted_by = front
                front.send(Enlisted())
                self._ready.set()

    async def _attach_to_all(self, front: PeerControl, enlist: Enlist) -> None:
        """Attach where the front has attached, and not where it has no longer."""
        members, shards = self._members, self._neighbours.shards
        wanted = {
            m: members.entry(m).name
            for m in members.in_state("memory", State.JOINING, State.SERVING, State.LEAVING)
            if members.term(m)
        }
        new = []
        for member, shard in shards.items():
            if self._attached.get(shard, members.term(member)) != members.term(member):
                self._attached.pop(shard, None)
                self._neighbours.renew(member)  # each attachment has a link of its own
            elif member in wanted and not shard.is_attached:
                new.append(shard)
        await asyncio.gather(*(self._attach_to(front, enlist, shard, wanted) for shard in new))

    async def _attach_to(
        self, front: PeerControl, enlist: Enlist, shard: ShardControl, division: dict[int, str]
    ) -> None:
        term = self._members.term(shard.member)
        try:
            await attach(
                self._config,
                self._served,
                shard,
                division,
                member=self._own,
                front=self._front,
                key=TenantKey(enlist.tenant, enlist.token),
                term=term,
                quota=self._members.entry(shard.member).quota,
            )
        except NodeError as error:
            log.warning("event=not_attached peer=%s reason=%r", shard.name, str(error))
            front.send(Missing(member=shard.member, term=term, reason=str(error)))
            self._loop.call_later(REFUSED_PAUSE_S, self._try_again, shard)
            return
        self._attached[shard] = term
        front.send(Reached(member=shard.member, term=term))

    def _try_again(self, shard: ShardControl) -> None:
        if self._neighbours.shards.get(shard.member) is shard and not shard.is_attached:
            self._neighbours.renew(shard.member)

    def _has_all(self) -> bool:
        """Return whether this node has all that it needs to run steps: memory nodes, and other compute nodes."""
        there, members = self._serving_shards(), self._members
        memory = members.in_state("memory", State.JOINING, State.SERVING, State.LEAVING)
        others = [m for m in members.in_state("compute", State.SERVING) if m != self._own]
        peers = self._neighbours.peers
        return all(m in there for m in memory if members.term(m)) and all(
            m in peers and peers[m].is_open for m in others
        )

    def _serving_shards(self) -> dict[int, ShardControl]:
        return {
            m: shard
            for m, shard in self._neighbours.shards.items()
            if shard.is_attached and self._attached.get(shard) == self._members.term(m)
        }

    def _reform(self) -> None:
        """Run the steps that begin from now on with the members that serve."""
        if self._runner is None:
            return
        schedule = None
        if self._enlist is not None:
            schedule = self._served.schedule_of(self._members.in_state("compute", State.SERVING))
        shards = {m: shard.lane for m, shard in sorted(self._serving_shards().items())}
        peers = {m: peer.lane for m, peer in self._neighbours.peers.items() if peer.is_open}
        self._there.post(self._runner.reform, schedule, shards, peers)

    async def _follow(self, front: PeerControl | None) -> None:
        if self._follower is not None:
            self._earlier_steps += self._follower.steps
            follower, self._follower = self._follower, None
            await follower.close()
        if front is not None:
            assert self._runner is not None
            self._follower = Follower(
                self._name,
                self._runner,
                self._there,
                front,
                limits(self._config, self._served, self._members),
                lambda: self._members.epoch,
                self._fail,
            )

    def _fail(self, error: LaminaError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # `run` may not have come to wait for it
