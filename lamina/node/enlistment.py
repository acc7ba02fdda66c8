"""A compute node that is not the front serves under it: attaches where the front is attached, and runs its orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from lamina.compute.follower import Follower
from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import Steps
from lamina.config import ClusterConfig
from lamina.errors import LaminaError, NodeError
from lamina.front.members import Members, State
from lamina.front.standby import JournalCopy
from lamina.node.assemble import TenantKey, agree, attach, limits
from lamina.node.model import ServedModel
from lamina.node.neighbours import Control, Neighbours
from lamina.node.roster import REFUSED_PAUSE_S
from lamina.node.succession import Heir
from lamina.runtime.crossing import Crossing
from lamina.transport import Address
from lamina.wire.orders import Enlist, Enlisted, Membership, Missing, Reached, Records

log = logging.getLogger("lamina.compute")


class Enlistment:
    """Follows what the front says of the members, on the node's loop.

    While the front is lost, the node keeps its weights and waits for it, or for another one, until it is to take the
    front's part itself. What goes wrong with other nodes is told to the front, and tried again.
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
        front: int,
        make_steps: Callable[[], Awaitable[Steps]],
        make_copy: Callable[[], JournalCopy],
        heir: Heir | None,
        succeeds: bool,
    ) -> None:
        """``make_steps`` loads the weights, once. ``name`` is that of this node, and ``front`` the member id of the
        front, as far as it is known. ``make_copy`` makes room for a copy of the front's journal. ``heir`` is
        None where this node never takes the front's part; ``succeeds`` says whether it takes it also before a front has
        taken it in."""
        self.draining = False
        self.is_standby = False
        """Whether the front has chosen this node to take its part, and tells it what it writes into its journal."""
        self._copy: JournalCopy | None = None
        self._config = config
        self._served = served
        self._members = members
        self._neighbours = neighbours
        self._there = device
        self._name = name
        self._own = members.id_of(name)
        self._front = front
        self._make_steps = make_steps
        self._make_copy = make_copy
        self._heir = heir
        self._succeeds = succeeds
        self._waiting: asyncio.Task[None] | None = None
        """Waits until this node is to take the part of the front that is lost."""
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
        self._due: asyncio.Future[None] = loop.create_future()
        """Is done when this node is to take the front's part."""
        self._front_left: asyncio.Event = asyncio.Event()

    @property
    def steps(self) -> int:
        """Return how many steps this node has run for any front."""
        return self._earlier_steps + (self._follower.steps if self._follower else 0)

    async def run(self) -> None:
        """Serve until cancelled, until this node is to take the front's part, or until an error of this node itself,
        which is raised; also if its file is not that of the front."""
        for control in self._neighbours.controls:
            self.found(control)
        self._ask_front()
        self._watch()
        working = asyncio.ensure_future(self._work())
        try:
            await asyncio.wait((working, self._failed, self._due), return_when=asyncio.FIRST_COMPLETED)
            for end in (self._failed, self._due, working):
                if end.done():
                    end.result()
        finally:
            self._stop_waiting()
            for control in self._neighbours.peers.values():
                control.ignore_front()
            tasks = [working, *self._agreeing.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._follower is not None:
                await self._follower.close()

    async def begin(self) -> asyncio.Future[None]:
        """Begin to `run`, and return what does so when the front has been told for the first time that this node is
        ready, or this node is to take its part. Raises the error with which it ends before."""
        running = asyncio.ensure_future(self.run())
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            ready.cancel()
            if not self._ready.is_set():
                running.cancel()
        return running

    async def drain(self) -> None:
        """Go on until the front has left: then nothing more will be ordered."""
        self.draining = True
        self._watch()
        await self._front_left.wait()

    @property
    def front(self) -> int:
        """Return the member id of the front, which may be lost."""
        return self._front

    @property
    def needed(self) -> frozenset[int]:
        """Return the memory nodes that the front may have: those that it has not lost, as far as this node knows."""
        members = self._members
        has = members.in_state("memory", State.JOINING, State.SERVING, State.LEAVING)
        return frozenset(has or members.of_others("memory", State.GONE))

    @property
    def missing(self) -> list[str]:
        """Return the front, while this node waits for it."""
        return [] if self._enlisted_by is not None else [self._members.entry(self._front).name]

    # -- nodes come and go

    def found(self, control: Control) -> None:
        """There is a link to a node."""
        if isinstance(control, PeerControl):
            control.on_members = partial(self._adopt, control)
            control.on_enlist = partial(self._take_in, control)
            control.on_records = partial(self._keep, control)
            self._agreeing[control] = asyncio.ensure_future(self._agree(control))
            self._watch()
        self._wake.set()

    def lost(self, member: int, error: NodeError) -> None:
        """The link to a node has ended."""
        if member == self._front:
            log.warning("event=front_lost reason=%r", str(error))
            self._enlist = self._enlisted_by = None
            self._front_left.set()
            self._watch()
        elif (front := self._neighbours.peers.get(self._front)) is not None and front.is_open:
            front.send(Missing(member=member, term=self._members.term(member), reason=str(error)))
        self._wake.set()

    def _adopt(self, peer: PeerControl, told: Membership) -> None:
        """Take over what the front says of the members. Raises ConfigError if it has other nodes in its file."""
        if peer.member != self._front:
            return
        self._members.adopt(told, fixed=(self._own, self._members.id_of(self._config.front.name)))
        self._neighbours.know(self._members.entries)
        self._neighbours.note_parted(self._members.in_state("memory", State.GONE))
        if self._follower is not None:
            self._follower.limits = limits(self._config, self._served, self._members)
        self._reform()  # before the first order of the new epoch
        self._wake.set()

    def follow(self, front: int) -> None:
        """Another node is the front now, or the same one says again that it is."""
        if front != self._front:
            self._front = front
            self._enlist = self._enlisted_by = None
            self._ask_front()
        self._watch()
        self._wake.set()

    def _ask_front(self) -> None:
        """Take over what the front has said before this node knew that it is the front."""
        front = self._neighbours.peers.get(self._front)
        if front is None:
            return
        self._front_left.clear()
        if front.membership is not None:
            self._adopt(front, front.membership)
        if front.enlistment is not None:
            self._take_in(front, front.enlistment)

    def _take_in(self, peer: PeerControl, enlist: Enlist) -> None:
        """The front takes this node in."""
        if peer.member == self._front:
            self._front_left.clear()
            self._enlist, self._enlisted_by = enlist, None
            self._wake.set()

    def _keep(self, peer: PeerControl, records: Records) -> None:
        if peer.member == self._front:
            self.keep(records)

    def keep(self, records: Records) -> None:
        """Take what the front wants kept of its journal."""
        self.is_standby = records.kind != "none"
        if self._copy is None:
            self._copy = self._make_copy()
        self._copy.take(records)

    async def release(self) -> bytes | None:
        """Keep no more, let go of the file, and return what the standby has of the front's journal; None on any other
        node."""
        if self._copy is None:
            return None
        await self._copy.close()
        return bytes(self._copy.data) if self.is_standby else None

    def _watch(self) -> None:
        """Wait for the time to take the front's part while the front is lost, and at no other time."""
        front = self._neighbours.peers.get(self._front)
        is_there = front is not None and (front.leads or front.name == self._config.front.name)
        if is_there or self.draining or self._heir is None or not self._succeeds:
            self._stop_waiting()
        elif self._waiting is None:
            addresses = [Address.parse(self._members.entry(member).address) for member in sorted(self.needed)]
            due = self._heir.due(addresses, is_standby=self.is_standby)
            self._waiting = self._loop.create_task(due)
            self._waiting.add_done_callback(self._waited)

    def _waited(self, waiting: asyncio.Task[None]) -> None:
        if not (waiting.cancelled() or self._due.done()):
            waiting.result()
            self._due.set_result(None)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    async def _agree(self, peer: PeerControl) -> None:
        try:
            await agree(self._config, self._served, peer)
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
            if front is None or not front.is_open or self._enlist is None:
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
                self._succeeds = True
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
