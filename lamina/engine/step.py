"""Take a batch through the slices: the hot path of a compute node, from token ids to sampled tokens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial, merge
from lamina.device import Device
from lamina.engine.placement import NodeRows, RemoteRun, route
from lamina.engine.prompts import PromptKV
from lamina.engine.remote import RemoteShard
from lamina.engine.sampler import sample
from lamina.engine.scheduler import PromptChunk, Step
from lamina.model.slices import SlicedModel, StepConstants
from lamina.spans import Place

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Ran(NamedTuple):
    """What came of a step: the tokens of its sampled rows, and the seconds that this took of the compute node, of the
    busiest memory node, and beside both (NaN where that cannot be told)."""

    tokens: list[int]
    compute_s: float
    attention_s: float
    wire_s: float


class StepRunner:
    """Runs steps of one model over its memory nodes; steps of different slots may run at the same time.

    The rows of a step are those whose past lies on memory nodes, which compute their attention: decode rows and some
    chunks of prompts; then the other chunks, which attend here. ``layers`` counts the layers that were run.
    """

    def __init__(self, model: SlicedModel, device: Device, shards: Sequence[RemoteShard], dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.shards = shards
        self.dtype = dtype
        self.prompts: dict[int, PromptKV] = {}
        self.layers = 0
        self._steps = self._flying = 0
        """Steps that were begun, and those that are under way."""

    async def run(self, slot: int, number: int, step: Step) -> Ran:
        """Run a step; on the device's loop. NodeError if a memory node is lost meanwhile."""
        forward, clock = _Forward(self, slot, step), self.device.clock
        begun_s, compute_s = clock(), 0.0
        alone, self._steps, self._flying = self._flying == 0, self._steps + 1, self._flying + 1
        started = self._steps

        async def compute(function: Callable[[*Ts], R], *arguments: *Ts, at: Place) -> R:
            nonlocal compute_s
            before_s = self.device.busy_s
            result = await self.device.compute(function, *arguments, at=at)
            compute_s += self.device.busy_s - before_s
            return result

        await compute(forward.begin, at=Place(slot))
        parts = forward.parts  # of the memory nodes; without remote rows they have none in the step
        for part in parts:
            part.shard.plan(slot, number, part.plan)
        for layer in range(len(self.model.slices) - 1):
            q = await compute(forward.head, layer, at=Place(slot, layer))
            for part in parts:
                part.shard.send_query(slot, layer, number, q[part.rows])
            k, v = await compute(forward.tail, layer, at=Place(slot, layer))
            for part in parts:
                if part.plan.stored_rows:
                    part.shard.send_key_value(slot, layer, number, k[part.stored], v[part.stored])
            if forward.local:
                self._ship(forward.local, layer)
                await compute(forward.attend_to_prompts, layer, at=Place(slot, layer))
            for part in parts:
                await part.shard.answered(slot)
            if not parts:
                await asyncio.sleep(0)  # others have their turn
            self.layers += 1
        for chunk in step.prompts:
            if chunk.completes:
                self.forget(chunk.sequence.id)
        tokens = await compute(forward.sample, at=Place(slot)) if step.sampled else []
        self._flying -= 1
        attention_s = max((part.shard.attention_s(slot) for part in parts), default=0.0)
        wire_s = max(0.0, clock() - begun_s - compute_s - attention_s)
        # With others in flight, what is neither is their time.
        return Ran(tokens, compute_s, attention_s, wire_s if alone and self._steps == started else math.nan)

    def forget(self, sequence: int) -> None:
        """Drop a prompt's keys and values here; what is still to be sent keeps its own reference."""
        self.prompts.pop(sequence, None)

    def _ship(self, chunks: Sequence[PromptChunk], layer: int) -> None:
        """Queue what a layer added to prompts for the memory nodes where it is to lie."""
        for chunk in chunks:
            prompt, placement = self.prompts[chunk.sequence.id], chunk.sequence.placement
            for start, count in placement.divide(chunk.start, len(chunk.tokens)):
                for node in placement.owners(start):
                    self.shards[node].ship(prompt, layer, start, count, placement.held(node, start))


Index = slice | Tensor
"""Some rows of a step."""


class _Part:
    """What one memory node does in a step."""

    __slots__ = ("partial", "plan", "rows", "shard", "stored", "whole")

    def __init__(self, shard: RemoteShard, own: NodeRows, places: dict[int, int]) -> None:
        """``places`` gives the place of each row that comes back in parts, among all that do."""
        self.shard = shard
        self.plan = plan = own.plan
        self.rows = _index(own.rows)
        self.stored = _index(own.rows[: plan.stored_rows])
        self.whole = _index(own.rows[: plan.whole])
        self.partial = _index([places[row] for row in own.rows[plan.whole :]])


class _Forward:
    """One step on its way through the slices."""

    def __init__(self, runner: StepRunner, slot: int, step: Step) -> None:
        self._slices = runner.model.slices
        self._model = runner.model
        self._prompts = runner.prompts
        self._dtype = runner.dtype
        self._shapes: list[LayerShape] = [s.shape for s in self._slices if s.shape is not None]
        self._slot = slot
        self._step = step
        remote = [c for c in step.prompts if c.remote]
        self.local = [c for c in step.prompts if not c.remote]
        self._remote_rows = len(step.decode) + sum(len(c.tokens) for c in remote)
        self._chunks = remote + self.local
        runs = [RemoteRun(r.sequence.id, r.sequence.placement, r.position, 1) for r in step.decode]
        runs += [RemoteRun(c.sequence.id, c.sequence.placement, c.start, len(c.tokens)) for c in remote]
        routes = route(runs, len(runner.shards))
        self._merged = sorted({row for own in routes for row in own.rows[own.plan.whole :]})
        places = {row: place for place, row in enumerate(self._merged)}
        self.parts = [_Part(shard, own, places) for shard, own in zip(runner.shards, routes, strict=True) if own.rows]
        self._constants: StepConstants = ()
        self._carry: tuple[Tensor, ...] = ()
        self._kept: tuple[Tensor, ...] = ()
        self._q: Tensor | None = None
        self._prompt_o: Tensor | None = None

    def begin(self) -> None:
        """Lay out the rows of the step and compute its constants."""
        token_ids = [r.token for r in self._step.decode]
        positions = [r.position for r in self._step.decode]
        last: dict[int, int] = {}
        for chunk in self._chunks:
            sequence = chunk.sequence
            if chunk.remote:
                self._prompts.pop(sequence.id, None)  # from here on its past is needed where it was sent
            elif chunk.start == 0:
                kept = PromptKV(sequence.id, sequence.here, self._shapes, self._dtype, self._model.device)
                self._prompts[sequence.id] = kept
            token_ids += chunk.tokens
            positions += range(chunk.start, chunk.start + len(chunk.tokens))
            last[sequence.id] = len(token_ids) - 1
        sampled = [*range(len(self._step.decode)), *(last[c.sequence.id] for c in self._step.prompts if c.completes)]
        device = self._model.device
        self._constants = self._model.begin(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(sampled or [0], device=device),
        )

    def head(self, layer: int) -> Tensor:
        """From the carry and the attention of the layer before to q [T, Hq, Dk]."""
        self._q, self._kept = self._slices[layer].head(self._constants, self._carry, self._attended(layer - 1))
        return self._q

    def tail(self, layer: int) -> tuple[Tensor, Tensor]:
        """k [T, Hkv, Dk] and v [T, Hkv, Dv], which are kept with prompts that attend here; and the carry."""
        k, v, self._carry = self._slices[layer].tail(self._constants, self._kept)
        for chunk, rows in self._local_rows():
            self._prompts[chunk.sequence.id].store(layer, chunk.start, k[rows], v[rows])
        return k, v

    def attend_to_prompts(self, layer: int) -> None:
        """Attention of the chunks of prompts, over what is kept here."""
        assert self._q is not None
        parts = [
            self._prompts[chunk.sequence.id].attend(layer, chunk.start, self._q[rows])
            for chunk, rows in self._local_rows()
        ]
        self._prompt_o = torch.cat(parts).to(self._dtype)

    def sample(self) -> list[int]:
        """Logits of the sampled rows, and a token from each."""
        logits = self._slices[-1].head(self._constants, self._carry, self._attended(len(self._shapes) - 1)).out
        choices = [(s.sampling, len(s.prompt) + len(s.output)) for s in self._step.sampled]
        return sample(logits, choices)

    def _attended(self, layer: int) -> Tensor | None:
        """o [T, Hq, Dv] of a layer: what the memory nodes answered, then the rows of prompts."""
        if layer < 0:
            return None
        if not self.parts:
            return self._prompt_o
        if len(self.parts) == 1 and not self.local and not self._merged:
            (part,) = self.parts
            o = part.shard.output(self._slot, layer)
            if o.shape[1] == self._shapes[layer].q_heads:
                return o  # where it arrived
        assert self._q is not None
        shape = self._shapes[layer]
        o = self._q.new_empty(len(self._q), shape.q_heads, shape.v_dim)
        for part in self.parts:
            if part.plan.whole:
                o[part.whole, part.shard.heads(layer)] = part.shard.output(self._slot, layer)
        if self._merged:
            o[_index(self._merged)] = self._merge(layer).to(o.dtype)
        if self._prompt_o is not None:
            o[self._remote_rows :] = self._prompt_o
        return o

    def _merge(self, layer: int) -> Tensor:
        """o [rows, Hq, Dv] in float32 of the rows of which several nodes hold the past, merged in the nodes' order."""
        shape, rows = self._shapes[layer], len(self._merged)
        partials = []
        for part in self.parts:
            if part.plan.rows > part.plan.whole:
                partial = Partial.empty(rows, shape.q_heads, shape.v_dim, device=self._model.device)
                arrived = part.shard.partials(self._slot, layer)
                partial.o[part.partial], partial.lse[part.partial] = arrived.o, arrived.lse
                partials.append(partial)
        return merge(*partials).o

    def _local_rows(self) -> Iterator[tuple[PromptChunk, slice]]:
        row = self._remote_rows
        for chunk in self.local:
            yield chunk, slice(row, row + len(chunk.tokens))
            row += len(chunk.tokens)


def _index(rows: Sequence[int]) -> Index:
    """A slice where the rows are consecutive, which costs no copy."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.tensor(rows)
