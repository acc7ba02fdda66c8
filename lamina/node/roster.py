"""The front's account of the nodes: it takes them in, notices that they go, and forms the team of those that serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.config import ClusterConfig
from lamina.errors import LaminaError, NodeError, SupersededError
from lamina.front.members import Members, State
from lamina.front.team import Formation
from lamina.node.assemble import TenantKey, agree, attach
from lamina.node.expiry import Expiry
from lamina.node.model import BLOCK_TOKENS, ServedModel
from lamina.node.neighbours import Control, Neighbours
from lamina.node.stranding import Stranding
from lamina.wire.members import MemberEntry
from lamina.wire.orders import Enlist, Missing, Reached

log = logging.getLogger("lamina.compute")

RENEWED_S = 5.0
"""The seconds in which a memory node has to be reached again to which the link was renewed."""
REFUSED_PAUSE_S = 1.0
"""The seconds before a node that could not be taken in is tried again."""


class Roster:
    """Takes nodes in and out, on the node's loop of the front.

    A memory node serves when the front has attached to it, and after the front all compute nodes that serve. A compute
    node serves when it agrees on the terms, has loaded its weights, and has attached to all memory nodes that serve.
    Where heads are divided, memory nodes serve together or not at all: whenever one comes or goes, all heads are
    divided anew, for which the front waits ``recovery.grace`` seconds for one that is lost.

    Until `complete` has returned, the first thing that goes wrong is an error of the start. After that, and in
    `take_over`, what goes wrong with a node is logged, and the node is tried again. But where a memory node has another
    front, this one can be none.
    """

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        members: Members,
        neighbours: Neighbours,
        *,
        member: int,
        key: TenantKey,
        term: int = 0,
    ) -> None:
        """``member`` is the id of this node, and ``key`` that of its tenant. It attaches in terms later than ``term``,
        the latest one that is known of any front."""
        self.serving: dict[int, ShardControl] = {}
        """The memory nodes that serve, by member id."""
        self.on_formed: Callable[[Formation, frozenset[int]], None] = lambda formation, lost: None
        """Is told of every change of the formation, and which members were lost in between."""
        self.on_settled: Callable[[], None] = lambda: None
        """Is told when a lost node has not come back within the grace."""
        self.on_superseded: Callable[[NodeError], None] = lambda error: None
        """Is told when another front has taken the tenant over, or may have: this one has to end."""
        self.on_seized: Callable[[int], None] = lambda term: None
        """Is told in `take_over` when all memory nodes have this front, and its latest term."""
        self.on_left: Callable[[MemberEntry], None] = lambda entry: None
        """Is told when a node has left, and is a member no more."""
        self.on_expired: Callable[[MemberEntry], None] = lambda entry: None
        """Is told when a node that no file names was lost for so long that it is a member no more."""
        self.stranding = Stranding(config.recovery, members)
        self.in_file = {node.name for node in config.node}
        """The names of the nodes of the cluster file as it is now. A memory node that has left is a member no more,
        unless it is one of them."""
        self._config = config
        self._served = served
        self._members = members
        self._neighbours = neighbours
        self._own = member
        self._key = key
        self._term = term
        self._divides = config.pipeline.partition == "heads"
        self._division: dict[int, str] = {}
        """The memory nodes over which heads are divided at present, by member id."""
        self._reached: dict[tuple[int, int], int] = {}
        """By compute node and memory node, the latest term in which the one has attached to the other."""
        self._latest: dict[int, int] = {}
        """The last term in which this node has attached to a memory node, or tried to."""
        self._lost: set[int] = set()
        """The members that were lost since the last formation."""
        self._out = {entry.id for entry in members.entries if members.state(entry.id) is State.GONE}
        """The members that have left, and have not been started anew since."""
        self._processes = dict(neighbours.parted)
        """What the last process of each memory node calls itself."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """What takes a node in, by member id. That of this node itself divides heads."""
        self._news = asyncio.Event()
        """Set, and replaced, when something has changed."""
        self._patient_until_s = 0.0
        """When heads are divided over those that are there, if others are missing."""
        self._settling: asyncio.TimerHandle | None = None
        self._expiry = Expiry(config.recovery, self._expire)
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._is_complete = False
        self._needed: frozenset[int] = frozenset()
        """The memory nodes that `take_over` waits for."""

    async def complete(self) -> None:
        """Take in all nodes, and return when all serve. Raises the error of the first one that cannot be taken in."""
        self._members.serve(self._own)
        for control in self._neighbours.controls:
            self.found(control)
        if self._divides:
            self._begin(self._own, self._divide())
        await self._serve_when(self._all_serve)
        self._is_complete = True

    async def take_over(self, needed: frozenset[int]) -> None:
        """Take the part of a front that is lost, and return when all of ``needed`` serve, the memory nodes that it may
        have. Requests wait for what else is `missing`, as they would have at the front that is lost.

        Nobody is told before all of ``needed`` have this front. Raises SupersededError if one of them has another one.
        """
        self._is_complete, self._needed = True, needed
        members, neighbours = self._members, self._neighbours
        there = needed.union(neighbours.shards, neighbours.peers)
        others = [entry for entry in members.entries if entry.id != self._own and entry.id not in self._out]
        members.join({entry.id: 0 for entry in others if entry.id in there})
        for entry in others:
            if entry.id not in there:
                self._lose(entry.id, NodeError.lost(entry.role, entry.name, "it is not there when its front is lost"))
        members.serve(self._own)
        for member, shard in neighbours.shards.items():
            if shard.is_attached:
                neighbours.renew(member)  # each attachment has a link of its own
            else:
                self.found(shard)
        if self._divides:
            self._begin(self._own, self._divide())
        await self._serve_when(lambda: needed <= set(members.in_state("memory", State.SERVING)))
        self._needed = frozenset()
        self.on_seized(max(shard.term for shard in neighbours.shards.values()))
        for peer in neighbours.peers.values():
            self.found(peer)
        self._settling = self._loop.call_later(self._config.recovery.grace, self._settle)

    def supersede(self, error: SupersededError) -> None:
        """There is another front: this one ends, or does not even begin."""
        self._fail(error)
        self.on_superseded(error)

    async def close(self, *, detach: bool = False) -> None:
        """Take in no more nodes. With ``detach``, the memory nodes learn that the tenant ends, as this node leaves in
        order."""
        if self._settling is not None:
            self._settling.cancel()
        self.stranding.close()
        self._expiry.close()
        for task in self._tasks.values():
            task.cancel()
        for peer in self._neighbours.peers.values():
            peer.on_reach = lambda member, news: None
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if detach:
            for shard in self._neighbours.shards.values():
                if shard.is_attached:
                    shard.detach()

    @property
    def missing(self) -> list[str]:
        """Return the nodes without which nothing goes on: those that have layers alone, and all memory nodes if none
        serves."""
        serving = self._members.in_state("compute", State.SERVING)
        alone = () if self._served.schedule_of(serving) else self._members.of_others("compute", State.SERVING)
        memory = () if self.serving else self._members.of_others("memory", State.SERVING)
        return [self._name(m) for m in (*alone, *memory)]

    # -- nodes come and go

    def take_in(self, entry: MemberEntry) -> None:
        """A node is a member from now on, or comes back with what is new of it: seek it, or await it."""
        self._out.discard(entry.id)
        self._expiry.end(entry.id)
        self._members.take_in(entry)
        self._neighbours.know(self._members.entries)

    def found(self, control: Control) -> None:
        """There is a link to a node."""
        member = control.member
        process = control.link.info.peer.details.get("process")
        if self._needed and isinstance(control, PeerControl):
            return  # it is told when there is something to tell
        if member in self._out and process == self._processes.get(member):
            return
        self._out.discard(member)
        self._processes[member] = process
        self._expiry.end(member)
        self._members.join({member: 0})
        if isinstance(control, PeerControl):
            control.on_reach = self._on_reach
            self._begin(member, self._enlist(control))
        elif not self._divides:
            self._begin(member, self._attach(control))
        self._tell()

    def lost(self, member: int, error: NodeError) -> None:
        """The link to a node has ended. One that still has steps to do for this node is lost to it."""
        if member in self._out:
            self._forget(member)
            return
        if self._is_complete and (task := self._tasks.pop(member, None)) is not None:
            task.cancel()  # in the start, it may know better why, as where the node has refused this one
        self._lost.add(member)
        self._patient_until_s = self._loop.time() + self._config.recovery.grace
        if self._settling is not None:
            self._settling.cancel()
        self._settling = self._loop.call_later(self._config.recovery.grace, self._settle)
        self._lose(member, error)
        if isinstance(error, SupersededError):
            self.supersede(error)

    def _lose(self, member: int, error: NodeError) -> None:
        self._members.lose(member, error)
        self._expiry.begin(member)

    def _expire(self, member: int) -> None:
        """A node was lost for long: if no file names it, it is a member no more."""
        entry = self._members.entry(member)
        if entry.name not in self.in_file:
            self._strike_out(entry)
            self.on_expired(entry)

    def suspect(self, node: str, reason: str) -> None:
        """A step has failed, which is said to be the fault of a node."""
        member = self._members.id_of(node)
        if self._members.state(member) in (State.SERVING, State.LEAVING):
            self._neighbours.drop(member, reason)

    def part(self, member: int) -> None:
        """A memory node that was leaving is empty. It is not used again before it has been started anew."""
        shard = self._neighbours.shards.get(member)
        self._out.add(member)
        if shard is not None and shard.is_attached:
            shard.detach()  # which ends the link
        self._members.part(member)
        if shard is None or not shard.is_attached:
            self._forget(member)

    def remove(self, member: int) -> None:
        """A memory node that does not serve, and that the file does not name, is a member no more."""
        if (task := self._tasks.pop(member, None)) is not None:
            task.cancel()
        self._forget(member)

    def _forget(self, member: int) -> None:
        """A memory node has left and has no link any more: nor is it a member, unless the file names it."""
        entry = self._members.entry(member)
        if entry.name not in self.in_file:
            self._strike_out(entry)
            self.on_left(entry)

    def _strike_out(self, entry: MemberEntry) -> None:
        """A node is a member no more."""
        self._expiry.end(entry.id)
        self._out.discard(entry.id)
        self._processes.pop(entry.id, None)
        self._members.forget(entry.id)
        self._neighbours.know(self._members.entries)

    def changed(self) -> None:
        """The members have changed: tell the other compute nodes, and form the team anew."""
        membership = self._members.membership()
        for peer in self._neighbours.peers.values():
            if peer.is_open:
                peer.send(membership)
        self._form()
        self._tell()

    def _settle(self) -> None:
        """A lost node has had its time to come back."""
        if self._is_cut_off:
            self.on_superseded(
                NodeError(
                    f"no other node was reached for {self._config.recovery.grace:g} s; another compute node may be the "
                    "front by now",
                    node=self._name(self._own),
                )
            )
            return
        if self._absent and not (self._divides and self._neighbours.shards):
            self._give_up_missing()
        self._tell()

    @property
    def _is_cut_off(self) -> bool:
        """Return whether this node reaches no other one, where another one can take its part."""
        return len(self._config.compute_nodes) > 1 and not self._neighbours.controls

    def _give_up_missing(self) -> None:
        """Go on without the nodes that are missing."""
        log.warning("event=given_up missing=%s", ",".join(self._absent))
        self.on_settled()

    @property
    def _absent(self) -> list[str]:
        """Return the names of the nodes that are missed."""
        gone = {entry.name for entry in self._members.entries if self._members.state(entry.id) is State.GONE}
        return [name for name in self._neighbours.waiting_for if name not in gone]

    def _form(self) -> None:
        members = self._members
        memory: tuple[int, ...] = members.in_state("memory", State.SERVING, State.LEAVING)
        if self._divides and set(memory) != set(self._division):
            memory = ()
        shards, peers = self._neighbours.shards, self._neighbours.peers
        self.serving.clear()
        self.serving.update({m: shards[m] for m in memory if m in shards and shards[m].is_attached})
        compute = members.in_state("compute", State.SERVING)
        others = {m: peers[m] for m in compute if m in peers}
        schedule = self._served.schedule_of([m for m in compute if m == self._own or m in others])
        formation = Formation(
            members.epoch,
            schedule,
            {m: shard.capacity_tokens // BLOCK_TOKENS for m, shard in self.serving.items()},
            others,
            frozenset(self._name(m) for m in (*self.serving, *others)),
        )
        lost, self._lost = frozenset(self._lost), set()
        if self._is_complete:
            self.stranding.watch(formation)
        self.on_formed(formation, lost)

    # -- compute nodes

    async def _enlist(self, peer: PeerControl) -> None:
        await agree(self._config, self._served, peer)
        peer.send(self._members.membership())
        await peer.enlist(Enlist(tenant=self._key.name, token=self._key.token))
        await self._until(lambda: self._has_reached_all(peer.member))
        self._members.serve(peer.member)

    def _on_reach(self, compute: int, news: Reached | Missing) -> None:
        if isinstance(news, Reached):
            self._reached[compute, news.member] = news.term
            self._tell()
        elif (
            self._members.has(news.member)
            and news.term == self._members.term(news.member)
            and self._members.state(compute) is State.SERVING  # one that joins has to find its way to all others
            and news.member not in self._out
            and not (self._is_peer(news.member) and self._members.state(news.member) is State.JOINING)  # it is back
        ):
            by = self._name(compute)
            self._neighbours.drop(news.member, f"{by} has lost it: {news.reason}")

    def _is_peer(self, member: int) -> bool:
        return self._members.entry(member).role == "compute"

    def _has_reached_all(self, compute: int) -> bool:
        serving = self._members.in_state("memory", State.SERVING, State.LEAVING)
        return all(self._reached.get((compute, m)) == self._members.term(m) for m in serving)

    # -- memory nodes

    async def _attach(self, shard: ShardControl) -> None:
        """Take in a memory node that has all heads of its sequences."""
        await self._attach_to(shard, {shard.member: shard.name})
        self._members.join({shard.member: shard.term})
        await self._until(lambda: self._is_reached(shard.member))
        self._members.serve(shard.member)

    async def _divide(self) -> None:
        """Divide the heads over the memory nodes that are there, whenever one comes or goes."""
        given_up: set[int] = set()  # those that have had their time to come back
        while True:
            every = set(self._members.in_state("memory", State.JOINING, State.SERVING, State.LOST))
            news, there = self._news, {m: shard for m, shard in self._neighbours.shards.items() if m in every}
            patience_s = self._patient_until_s - self._loop.time()
            if not there or self._needed - set(there) or (set(there) == set(self._division) and self._is_divided()):
                await news.wait()
            elif not every - given_up <= set(there) and patience_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), patience_s)
            elif old := [m for m, shard in there.items() if shard.is_attached]:
                given_up = every - set(there)
                self._division = {}
                self._members.join(dict.fromkeys(old, 0))
                for member in old:  # each attachment has a link of its own
                    self._neighbours.renew(member)
                self._patient_until_s = self._loop.time() + max(self._config.recovery.grace, RENEWED_S)
            else:
                await self._divide_over(there)

    async def _divide_over(self, shards: dict[int, ShardControl]) -> None:
        division = {member: self._name(member) for member in sorted(shards)}
        attaching = [asyncio.ensure_future(self._attach_to(shard, division)) for shard in shards.values()]
        try:
            await asyncio.gather(*attaching)
        except NodeError as error:
            if not self._is_complete or (isinstance(error, SupersededError) and error.holder):
                raise
            log.warning("event=not_attached peer=%s reason=%r", error.node, str(error))
            for member in shards:
                self._neighbours.renew(member)
            await asyncio.sleep(REFUSED_PAUSE_S)
            return
        finally:
            for task in attaching:  # where one has failed, the others are of no use
                task.cancel()
        self._division = division
        self._members.join({member: shard.term for member, shard in shards.items()})
        await self._until(lambda: not self._is_divided() or all(map(self._is_reached, division)))
        if self._is_divided():
            self._members.serve(*division)
            if self._absent:
                self._give_up_missing()
        else:
            self._division = {}

    def _is_divided(self) -> bool:
        """Return whether all nodes of the division are still attached."""
        there = self._neighbours.shards
        return all(m in there and there[m].is_attached for m in self._division)

    async def _attach_to(self, shard: ShardControl, division: dict[int, str]) -> None:
        self._latest[shard.member] = term = self._latest.get(shard.member, self._term) + 1
        await attach(
            self._config,
            self._served,
            shard,
            division,
            member=self._own,
            front=self._own,
            key=self._key,
            term=term,
            quota=self._members.entry(shard.member).quota,
        )
        self._latest[shard.member] = shard.term

    def _is_reached(self, memory: int) -> bool:
        """Return whether all compute nodes that serve have attached to a memory node in its present term."""
        others = [c for c in self._members.in_state("compute", State.SERVING) if c != self._own]
        return all(self._reached.get((c, memory)) == self._members.term(memory) for c in others)

    # -- inside

    def _name(self, member: int) -> str:
        return self._members.entry(member).name

    async def _serve_when(self, condition: Callable[[], bool]) -> None:
        """Wait until enough nodes serve, or raise the error of the start."""
        enough = asyncio.ensure_future(self._until(condition))
        try:
            await asyncio.wait((enough, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            enough.result()
        finally:
            enough.cancel()

    def _all_serve(self) -> bool:
        return all(self._members.state(entry.id) is State.SERVING for entry in self._members.entries)

    def _begin(self, member: int, work: Coroutine[Any, Any, None]) -> None:
        if (before := self._tasks.get(member)) is not None:
            before.cancel()
        self._tasks[member] = self._loop.create_task(self._try(member, work))

    async def _try(self, member: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LaminaError as error:
            if isinstance(error, SupersededError) and error.holder:
                self.supersede(error)
                return
            if not self._is_complete:
                self._fail(error)
                return
            log.warning("event=not_taken_in peer=%s reason=%r", self._name(member), str(error))
            await asyncio.sleep(REFUSED_PAUSE_S)
            self._tasks.pop(member, None)
            self._neighbours.drop(member, str(error))

    def _fail(self, error: LaminaError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # `complete` may not have come to wait for it

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._news.wait()
