"""All compute nodes of a model, as the front among them sees them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lamina.compute.peer import ComputePeer
from lamina.compute.schedule import Schedule
from lamina.compute.step import StepRunner
from lamina.front.sequence import DecodeRow, PromptChunk, ScheduledStep
from lamina.wire.codec import FRONT
from lamina.wire.orders import Choice, Done, Forget, Order, TokenRun


class Ran(NamedTuple):
    """What came of a step: the tokens of its sampled rows, and the seconds that this took of the compute nodes, of the
    busiest memory node, and beside both (NaN where that cannot be told)."""

    tokens: list[int]
    compute_s: float
    attention_s: float
    wire_s: float


class Team:
    """Has steps run by the compute nodes that the schedule names: this one, and those that it is linked to.

    Made on the node's loop, used on the device's but for ``forget``.
    """

    def __init__(self, runner: StepRunner, peers: Sequence[ComputePeer] = ()) -> None:
        self.runner = runner
        self.peers = peers
        self._peers = {peer.index: peer for peer in peers}
        self._schedule: Schedule = runner.schedule
        self._home = asyncio.get_running_loop()
        self._steps = self._flying = 0
        """Steps that were begun, and those that are under way."""

    async def run(self, slot: int, number: int, step: ScheduledStep) -> Ran:
        """Run a step. NodeError if a node is lost meanwhile."""
        clock = self.runner.device.clock
        begun_s, alone = clock(), self._flying == 0
        self._steps, self._flying = self._steps + 1, self._flying + 1
        started = self._steps
        order = order_of(slot, number, step)
        nodes = sorted(set(self._schedule.route(slot, number)))
        ordered = [self._peers[node].order(order, self._home) for node in nodes if node != FRONT]
        parts = [await self.runner.run(order)] if FRONT in nodes else []
        parts += [await done for done in ordered]
        self._flying -= 1
        compute_s = math.fsum(part.compute_s for part in parts)
        attention_s = _attention_s(parts)
        wire_s = max(0.0, clock() - begun_s - compute_s - attention_s)
        # With others in flight, what is neither is their time.
        undisturbed = alone and self._steps == started
        tokens = next((part.tokens for part in parts if part.tokens), [])
        return Ran(tokens, compute_s, attention_s, wire_s if undisturbed else math.nan)

    def forget(self, sequences: Iterable[int]) -> None:
        """Drop what is kept of the prompts of sequences that are over."""
        over = list(sequences)
        if over:
            self.runner.forget(over)
            for peer in self.peers:
                peer.send(Forget(sequences=over))


def _attention_s(parts: Sequence[Done]) -> float:
    """Of each node the longest that anybody was told, of all together."""
    told = [part.attention_s for part in parts if part.attention_s]
    return math.fsum(map(max, zip(*told, strict=True)))


def order_of(slot: int, number: int, step: ScheduledStep) -> Order:
    """Of what the scheduler composed."""
    return Order(slot=slot, step=number, runs=[*map(_decoding, step.decode), *map(_prompt, step.prompts)])


def _decoding(row: DecodeRow) -> TokenRun:
    sequence = row.sequence
    choice = Choice(sequence.request.sampling, row.position + 1)
    return TokenRun(sequence.id, row.position, [row.token], sequence.placement, choice=choice)


def _prompt(chunk: PromptChunk) -> TokenRun:
    sequence = chunk.sequence
    choice = Choice(sequence.request.sampling, sequence.context) if chunk.completes else None
    return TokenRun(sequence.id, chunk.start, chunk.tokens, sequence.placement, sequence.local_tokens, choice)
