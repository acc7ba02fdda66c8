"""Let memory nodes leave a cluster that goes on serving, on the node's loop of the front."""

from __future__ import annotations

import asyncio
import logging

from lamina.config import ClusterConfig
from lamina.errors import CapacityError, ConfigError, LaminaError, NodeError
from lamina.front.engine import Engine
from lamina.front.members import Members, State
from lamina.node.model import BLOCK_TOKENS, ServedModel
from lamina.node.roster import Roster
from lamina.runtime.crossing import Crossing
from lamina.wire.admin import Drain, Draining
from lamina.wire.geometry import shard_by_heads

log = logging.getLogger("lamina.compute")

LOOK_S = 0.05
"""The seconds between two looks whether a node is empty."""
ANEW_S = 1.0
"""The seconds between two attempts to empty a node by computing anew what it holds."""
_DIVIDED = (
    "the heads are divided anew over the other memory nodes, so the keys and values of all requests are computed again"
)
_STAYS = (
    "blocks cannot be moved (pipeline.moves is off, or the model has sliding windows), so requests there are waited "
    "for, and then computed again elsewhere"
)


class Drains:
    """Empties memory nodes that are to leave, and takes them out of the cluster when nothing is left there."""

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        members: Members,
        roster: Roster,
        engine: Engine,
        device: Crossing,
    ) -> None:
        """``engine`` belongs to the loop to which ``device`` leads."""
        self._served = served
        self._members = members
        self._roster = roster
        self._engine = engine
        self._there = device
        self._divides = config.pipeline.partition == "heads"
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Let no more nodes leave."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def ask(self, asked: Drain) -> Draining:
        """Begin to let a node leave, or tell how far that is."""
        try:
            member = self._member(asked.node)
            if asked.patience is not None:
                await self.begin(member, asked.patience)
        except LaminaError as error:
            return Draining(error=str(error))
        note = _DIVIDED if self._divides else "" if self._engine.can_move else _STAYS
        state = self._members.state(member)
        if state is State.GONE and not (self._divides and not self._is_divided(member)):
            return Draining(state="gone", note=note)
        if state in (State.LEAVING, State.GONE):
            tokens = self._engine.counters.draining.get(member, 0) * BLOCK_TOKENS
            return Draining(state="leaving", tokens=tokens, note=note)
        return Draining(state="lost" if state is State.LOST else "back", note=note)

    def _member(self, name: str) -> int:
        entry = self._members.find(name)
        if entry is None and self._members.has_left(name):
            return self._members.id_of(name)
        if entry is None:
            known = ", ".join(entry.name for entry in self._members.entries)
            raise ConfigError(f"the cluster has no node called {name!r}; known: {known}")
        if entry.role != "memory":
            raise ConfigError(
                f"{name} is a compute node, which holds no keys and values; stop it with SIGTERM when it is not needed"
            )
        return entry.id

    async def begin(self, member: int, patience_s: float) -> None:
        """Begin to empty a memory node, unless it is leaving already or has left. Raises NodeError or CapacityError,
        and changes nothing, if that cannot be."""
        if member in self._tasks or self._members.state(member) is State.GONE:
            return
        name, state = self._members.entry(member).name, self._members.state(member)
        if state is not State.SERVING:
            raise NodeError(f"{name} is {state.value}, so there is nothing to move away from it", node=name)
        if len(self._roster.serving) < 2:
            raise CapacityError(f"{name} is the only memory node; the cluster cannot serve without it")
        if self._divides:
            self._require_room(member)
        else:
            await self._there.call(self._engine.drain, member, self._served.context)
        log.info("event=drain peer=%s patience_s=%g", name, patience_s)
        self._members.leave(member)
        self._tasks[member] = task = asyncio.get_running_loop().create_task(self._empty(member, patience_s))
        task.add_done_callback(lambda _: self._tasks.pop(member, None))

    def _require_room(self, member: int) -> None:
        """Raise CapacityError if the other nodes cannot hold one request when they have all heads."""
        old = {m: shard for m, shard in sorted(self._roster.serving.items()) if m != member}
        layers = self._served.facts.layers
        for shard, heads in zip(old.values(), shard_by_heads(layers, [s.name for s in old.values()]), strict=True):
            nbytes = shard.capacity_tokens * self._served.layout(shard.lane.layers).bytes_per_token
            most = nbytes // self._served.layout(heads.layers).bytes_per_token
            if most < self._served.context:
                raise CapacityError(
                    f"{shard.name} would hold {most} tokens of one request, with more heads than now, fewer than the "
                    f"context of {self._served.context}; add memory to the cluster first, or set model.context lower"
                )

    async def _empty(self, member: int, patience_s: float) -> None:
        """Wait until nothing is left on a node, then take it out of the cluster."""
        loop, name = asyncio.get_running_loop(), self._members.entry(member).name
        anew_s = loop.time() + patience_s
        while not self._divides and self._engine.counters.draining.get(member):
            if loop.time() >= anew_s:
                log.warning("event=drain_anew peer=%s", name)
                self._there.post(self._engine.evacuate, member)
                anew_s += ANEW_S
            await asyncio.sleep(LOOK_S)
        if self._members.state(member) is State.LEAVING:  # else it was lost
            self._roster.part(member)
            log.info("event=drained peer=%s", name)

    def _is_divided(self, without: int) -> bool:
        """Return whether the heads are divided over the other nodes."""
        serving = self._roster.serving
        return bool(serving) and without not in serving
