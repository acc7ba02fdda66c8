"""The front has all compute nodes of a model, itself among them, run steps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lamina.compute.peer_control import PeerControl
from lamina.compute.schedule import Schedule
from lamina.compute.step import Steps
from lamina.errors import NodeError
from lamina.front.choices import choice_for
from lamina.front.sequence import DecodeRow, PromptChunk, ScheduledStep
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.spans import DECODE, PREFILL, Activity, Place, Recorder
from lamina.wire.orders import Done, Forget, Order, TokenRun
from lamina.wire.requests import Score


class StepResult(NamedTuple):
    """Holds the tokens of a step's sampled rows, and the seconds that it took on the compute nodes, on the busiest
    memory node, and outside of both (NaN if that is not known), and on the memory nodes in the mean. Tokens and scores
    are those of `lamina.wire.orders.Done`."""

    tokens: list[int | None]
    compute_s: float
    attention_s: float
    wire_s: float
    memory_s: float
    scores: list[Score | None] = []  # noqa: RUF012
    prompt_scores: list[list[Score | None]] = []  # noqa: RUF012


class Formation(NamedTuple):
    """Says with which members steps run. It is one value, made on the node's loop, that crosses to the device's."""

    epoch: int
    schedule: Schedule | None
    """Which compute node runs which slice. None while the layers of a lost one are missing."""
    blocks: Mapping[int, int]
    """The blocks of each memory node that serves, by member id."""
    peers: Mapping[int, PeerControl]
    """The other compute nodes, by member id."""
    nodes: frozenset[str]
    """The names of all that take part, but for this node's."""

    @property
    def is_whole(self) -> bool:
        """Return whether steps can run."""
        return self.schedule is not None


class Team:
    """Has steps run by the compute nodes that the schedule names: by this one, and by its peers when it orders them to.

    It belongs to the device's loop. Orders cross to the node's loop, where messages are sent.
    """

    def __init__(
        self,
        runner: Steps,
        device: Device,
        home: Crossing,
        formation: Formation,
        *,
        member: int,
    ) -> None:
        """``member`` is the id of this node, and ``home`` leads to the node's loop, where its peers live."""
        self._runner = runner
        self._device = device
        self._home = home
        self.formation = formation
        self._member = member
        self._begun = self._in_flight = 0
        self._losses: dict[asyncio.Future[None], set[int]] = {}
        """What ends each step that runs, with the members that take part in it, when one of these is lost."""

    async def run(self, slot: int, number: int, step: ScheduledStep) -> StepResult:
        """Run step ``number`` of a batch slot. Raises NodeError if a node is lost meanwhile, or cannot do its part."""
        now = self._device.loop.time
        begun_s, alone = now(), self._in_flight == 0
        self._begun, self._in_flight = self._begun + 1, self._in_flight + 1
        begun = self._begun
        try:
            parts = await self._run_parts(order_of(slot, number, self.formation.epoch, step))
        finally:
            self._in_flight -= 1
        if (recorder := self._device.recorder) is not None:
            _record(recorder, slot, number, step, begun_s, now())
        compute_s = math.fsum(part.compute_s for part in parts)
        attention_s, memory_s = _attention_s(parts)
        wire_s = max(0.0, now() - begun_s - compute_s - attention_s)
        # With other batches in flight, what is neither compute nor attention belongs to them.
        undisturbed = alone and self._begun == begun
        # Only the node of the last slice has tokens and scores.
        last = next((part for part in parts if part.tokens or part.prompt_scores), parts[0])
        wire_s = wire_s if undisturbed else math.nan
        return StepResult(last.tokens, compute_s, attention_s, wire_s, memory_s, last.scores, last.prompt_scores)

    async def _run_parts(self, order: Order) -> list[Done]:
        schedule, peers = self.formation.schedule, self.formation.peers
        assert schedule is not None, "the engine waits until the formation is whole"
        members = set(schedule.route(order.slot, order.step))
        if members == {self._member}:
            return [await self._runner.run(order)]
        parts = [self._home.start(peers[m].order(order)) for m in sorted(members) if m != self._member]
        if self._member in members:
            parts.insert(0, self._device.loop.create_task(self._runner.run(order)))
        # When one fails, the others may wait in vain for what it was to bring; also when it has done its part and is
        # lost afterwards, as what it wrote may be lost with it.
        whole, loss = asyncio.gather(*parts), self._device.loop.create_future()
        whole.add_done_callback(lambda whole: whole.cancelled() or whole.exception())  # nobody may wait for it any more
        self._losses[loss] = members
        try:
            await asyncio.wait((whole, loss), return_when=asyncio.FIRST_COMPLETED)
            return (whole if whole.done() else loss).result()
        finally:
            del self._losses[loss]
            for part in (loss, *parts):
                if not part.cancel() and not part.cancelled():
                    part.exception()  # perhaps a second one, of the same loss

    def change(self, formation: Formation) -> None:
        """Run the steps that begin from now on with other members. Those that run fail with a compute node that is
        gone."""
        before, self.formation = self.formation, formation
        for loss, members in self._losses.items():
            if (gone := members & before.peers.keys() - formation.peers.keys()) and not loss.done():
                name = before.peers[min(gone)].name
                loss.set_exception(NodeError.lost("compute", name, "it has left a step that it took part in"))

    async def send_prompts(self) -> None:
        """Send the keys and values of prompts that this node computed, until cancelled."""
        await self._runner.send_prompts()

    def forget(self, sequences: Iterable[int]) -> None:
        """Drop the keys and values of prompts of sequences that are over."""
        over = list(sequences)
        if over:
            self._runner.forget(over)
            for peer in self.formation.peers.values():
                self._home.post(peer.send, Forget(sequences=over))


def _record(recorder: Recorder, slot: int, number: int, step: ScheduledStep, begun_s: float, ended_s: float) -> None:
    """Keep what a step did for each of its requests."""
    at = Place(slot, step=number)
    for row in step.decode:
        recorder.add(DECODE, at, begun_s, ended_s, Activity.REQUEST, row.sequence.arrival)
    for chunk in step.prompts:
        recorder.add(PREFILL, at, begun_s, ended_s, Activity.REQUEST, chunk.sequence.arrival)


def order_of(slot: int, number: int, epoch: int, step: ScheduledStep) -> Order:
    """Return the order for the step that the scheduler composed."""
    runs = [*map(_decoding, step.decode), *map(_prompt, step.prompts)]
    return Order(epoch=epoch, slot=slot, step=number, runs=runs)


def _decoding(row: DecodeRow) -> TokenRun:
    sequence = row.sequence
    return TokenRun(sequence.id, row.position, [row.token], sequence.placement, choice=choice_for(sequence))


def _prompt(chunk: PromptChunk) -> TokenRun:
    sequence = chunk.sequence
    return TokenRun(
        sequence.id,
        chunk.start,
        chunk.tokens,
        sequence.placement,
        sequence.local_tokens,
        choice_for(sequence) if chunk.completes else None,
        chunk.targets,
    )


def _attention_s(parts: Sequence[Done]) -> tuple[float, float]:
    """Return the sums, over compute nodes, of the longest times that any part was told of: of the busiest memory node,
    and in the mean of all."""
    longest: dict[int, tuple[float, float]] = {}
    for part in parts:
        for member, *seconds in part.attention_s:
            busiest, mean = longest.get(member, (0.0, 0.0))
            longest[member] = max(busiest, seconds[0]), max(mean, seconds[1])
    return math.fsum(busiest for busiest, _ in longest.values()), math.fsum(mean for _, mean in longest.values())
