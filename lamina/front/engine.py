"""The engine keeps every batch going, on the device's loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from lamina.errors import CapacityError, LaminaError, NodeError, RequestError, SpaceLostError, StaleOrderError
from lamina.front.masks import MaskMaker
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import (
    CacheChanges,
    ReservationRequest,
    ScheduledStep,
    Sequence,
    StepOutcome,
    Transfer,
)
from lamina.front.team import Formation, StepResult, Team
from lamina.runtime.crossing import Crossing
from lamina.runtime.workers import ParallelWorkers

log = logging.getLogger("lamina.front")


class EngineCounters(NamedTuple):
    """Counts what the engine has to do and has done. It is one value, replaced as a whole, that any thread may read."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    free_blocks: int = 0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    moves: int = 0
    moved_blocks: int = 0
    failed_moves: int = 0
    redirections: int = 0
    draining: Mapping[int, int] = MappingProxyType({})
    """The blocks that are still held on each memory node that is to be empty, by member id."""


class Desk(Protocol):
    """Carries out the engine's decisions on the node's loop: it tells the memory nodes and the clients.

    `lamina.front.intake.Intake` is the one of a node.
    """

    def apply(self, changes: CacheChanges) -> None:
        """Tell the memory nodes what changes in their caches."""

    def answer(self, outcome: StepOutcome) -> None:
        """Tell the memory nodes what a step changed, then give the clients its tokens."""

    def refuse(self, sequence: Sequence, error: LaminaError) -> None:
        """Tell a client that its request cannot go on: a memory node has no space for it, or its constraint ends."""

    def suspect(self, node: str, reason: str) -> None:
        """Take a node for lost, as a step has failed with it. `Engine.changed` tells of it later."""


class Engine:
    """The engine does continuous batching over the compute nodes of one model and the memory nodes that attend for it.

    It belongs to the device's loop, so no other thread is involved between the last operation of a step and the first
    of the next. Requests come from the node's loop through a `Crossing`; results go back to the ``desk`` there through
    ``home``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        team: Team,
        home: Crossing,
        desk: Desk,
        *,
        batches: int,
        workers: ParallelWorkers,
    ) -> None:
        """``workers`` make the masks of constrained sequences."""
        self.counters = EngineCounters(blocks=scheduler.total_blocks, free_blocks=scheduler.free_blocks)
        self._scheduler = scheduler
        self._team = team
        self._home = home
        self._desk = desk
        self._work = [asyncio.Event() for _ in range(batches)]
        """Set, by slot, when there may be something to do."""
        self._masks = MaskMaker(workers, self._wake, self._cannot_go_on)
        self._steps = self._tokens = self._failed_steps = 0
        self._changed = asyncio.Event()
        """Set, and replaced, when the members change."""
        self._stranded: NodeError | None = None
        """Why nothing is computed, nor will be."""

    # -- steps

    async def run(self) -> None:
        """Drive all batches until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._team.send_prompts())
            for slot in range(len(self._work)):
                tasks.create_task(self._drive(slot))

    async def _drive(self, slot: int) -> None:
        """Run one batch, step after step."""
        for number in itertools.count():
            step = await self._schedule(slot)
            try:
                result = await self._team.run(slot, number, step)
            except NodeError as error:
                await self._give_up(slot, error)
            else:
                self._finish(slot, step, result)

    async def _schedule(self, slot: int) -> ScheduledStep:
        """Wait for the next step of a batch that has rows, and return it."""
        work, scheduler = self._work[slot], self._scheduler
        await self._masks.settle(slot)
        while True:
            while not self._team.formation.is_whole:
                await self._changed.wait()
            in_use = scheduler.batches_in_use
            step = scheduler.next_step(slot)
            if scheduler.batches_in_use > in_use:
                self._wake()  # another slot is to take requests
            if step is None:
                work.clear()
                self._count()
                await work.wait()
                continue
            if step.changes:
                self._team.forget(step.changes.released)
                self._home.post(self._desk.apply, step.changes)
            if step.changes.released or step.moved:
                self._wake()
            if step.has_rows:
                return step

    def _finish(self, slot: int, step: ScheduledStep, result: StepResult) -> None:
        """Take in the result of a step, and pass it on."""
        load = step.load
        self._scheduler.cost.observe(
            load.rows,
            load.prompt_tokens,
            load.context_tokens,
            result.compute_s,
            result.attention_s,
            result.wire_s,
            result.memory_s,
        )
        outcome = self._scheduler.finish(slot, step, result.tokens, result.scores, result.prompt_scores)
        self._masks.begin(slot, [sequence for sequence, _, _ in outcome.tokens])
        self._steps += 1
        self._tokens += len(outcome.tokens)
        self._team.forget(outcome.changes.released)
        self._count()
        self._home.post(self._desk.answer, outcome)
        if outcome.changes.released:
            self._wake()  # space has come free, perhaps for a request that another slot can admit

    async def _give_up(self, slot: int, error: NodeError) -> None:
        """A step has failed, as a node is lost or lacks something: its rows come again, at the same positions."""
        log.warning("event=step_failed slot=%d reason=%r", slot, str(error))
        self._failed_steps += 1
        changed = self._changed
        self._tell(self._scheduler.give_up(slot))
        if isinstance(error, SpaceLostError):
            self._tell(self._scheduler.evict(error.sequences))
        elif not isinstance(error, StaleOrderError) and error.node in self._team.formation.nodes:
            # The loss has not been taken in yet.
            self._home.post(self._desk.suspect, error.node, str(error))
            await changed.wait()

    def _tell(self, changes: CacheChanges) -> None:
        """Have the memory nodes told of sequences that lost their space."""
        if changes:
            self._team.forget(changes.released)
            self._home.post(self._desk.apply, changes)
            self._count()
        self._wake()

    # -- members

    def changed(self, formation: Formation, lost: frozenset[int] = frozenset()) -> None:
        """Go on with other members. What lay on those that are ``lost`` is gone, also if they are back.

        Sequences that have lost something wait to be prefilled again, from their prompts and what was answered so far.
        """
        before, scheduler = self._team.formation, self._scheduler
        for member, blocks in before.blocks.items():
            if member in lost or formation.blocks.get(member) != blocks:
                self._tell(scheduler.lose(member))
        if before.schedule != formation.schedule:
            self._tell(scheduler.evict_unprefilled())
        for member, blocks in formation.blocks.items():
            if not scheduler.has(member):
                scheduler.gain(member, blocks)
        if (schedule := formation.schedule) is not None:
            scheduler.keep_chunks = schedule.is_settled
        self._team.change(formation)
        if formation.is_whole and formation.blocks:
            self._stranded = None
        self._count()
        self._changed.set()
        self._changed = asyncio.Event()
        self._wake()

    def settle(self) -> None:
        """Nodes that were lost do not come back in time: requests that need more space than there is now fail."""
        for sequence, error in self._scheduler.settle():
            self._home.post(self._desk.refuse, sequence, error)
            self.cancel(sequence)

    def strand(self, error: NodeError) -> None:
        """Nothing can be computed, and that has been so for too long: all requests fail, until the members change."""
        self._stranded = error
        for sequence in self._scheduler.everything():
            self._home.post(self._desk.refuse, sequence, error)
            self.cancel(sequence)

    @property
    def can_move(self) -> bool:
        """Return whether blocks can move from one memory node to another; any thread may ask."""
        return self._scheduler.can_move

    def drain(self, member: int, context: int) -> None:
        """Let a memory node become empty: see `Scheduler.drain`. The counters say how far it is."""
        self._scheduler.drain(member, context)
        self._count()
        self._wake()

    def evacuate(self, member: int) -> None:
        """What still lies on a memory node that is to be empty is computed anew elsewhere."""
        self._tell(self._scheduler.evacuate(member))
        self._count()

    # -- requests

    def submit(self, sequence: Sequence, retry_after_s: float | None = None, restored: bool = False) -> None:
        """Queue a request, or one that an earlier front had taken. CapacityError or NodeError says why it cannot be
        served; then nothing is queued."""
        if self._stranded is not None:
            raise self._stranded
        self._scheduler.submit(sequence, retry_after_s=retry_after_s, restored=restored)
        self._count()
        self._wake()

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; its space is free after the step that it is in. A request that is over is ignored."""
        self._scheduler.cancel(sequence)
        self._count()
        self._wake()  # a request that waited behind it may be next

    def reserved(self, request: ReservationRequest, answer: int | CapacityError) -> None:
        """Take the answer to a reservation: the memory nodes share ``answer`` leading positions, or one of them
        refuses.

        If one refuses, only that request fails.
        """
        if isinstance(answer, CapacityError):
            if request.succession is not None:
                log.warning("event=move_refused sequence=%d reason=%r", request.id, str(answer))
                self._tell(self._scheduler.refuse(request))
            elif request.is_current:
                name = request.sequence.request.name
                log.warning("event=refused sequence=%d request=%r reason=%r", request.id, name, str(answer))
                self._home.post(self._desk.refuse, request.sequence, answer)
                self.cancel(request.sequence)
            return
        self._tell(self._scheduler.confirm(request, answer))

    def transferred(self, transfer: Transfer, error: LaminaError | None) -> None:
        """Blocks of a sequence have arrived where they were sent, or will not. Then the sequence stays as it is."""
        if error is not None:
            log.warning("event=move_failed sequence=%d reason=%r", transfer.id, str(error))
        self._scheduler.mover.transferred(transfer, error)
        self._wake()

    def _cannot_go_on(self, sequence: Sequence, error: RequestError) -> None:
        """End a sequence whose constraint has become too complex."""
        if not sequence.cancelled:
            self._home.post(self._desk.refuse, sequence, error)
            self.cancel(sequence)

    def _wake(self) -> None:
        """Wake every batch, which then looks for something to do."""
        for event in self._work:
            event.set()

    def _count(self) -> None:
        scheduler, mover = self._scheduler, self._scheduler.mover
        self.counters = EngineCounters(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks=scheduler.total_blocks,
            free_blocks=scheduler.free_blocks,
            steps=self._steps,
            tokens=self._tokens,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            shared_tokens=scheduler.shared_tokens,
            moves=mover.moves,
            moved_blocks=mover.moved_blocks,
            failed_moves=mover.failures,
            redirections=mover.redirections,
            draining=MappingProxyType(scheduler.draining),
        )
