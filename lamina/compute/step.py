"""Take a batch through the slices: the hot path of a compute node, from token ids to sampled tokens."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lamina.attention import Partial, merge
from lamina.compute.forward import ForwardPass
from lamina.compute.peer_lane import PeerLane, Shape
from lamina.compute.prompts import PromptKV
from lamina.compute.sampler import sample
from lamina.compute.schedule import Schedule
from lamina.compute.scores import Asked, score
from lamina.compute.shard_lane import ShardLane, ShardStep
from lamina.errors import NodeError, SpaceLostError, StaleOrderError
from lamina.model.slices import Head
from lamina.runtime.device import Device
from lamina.runtime.spans import CARRY, Activity, Place
from lamina.wire.orders import NONE_ALLOWED, Done, Order, Targets, TokenRun
from lamina.wire.placement import MemberRows, RemoteRun, route
from lamina.wire.plan import StepPlan
from lamina.wire.requests import Score

R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Steps(Protocol):
    """Runs steps, on the device's loop. `StepRunner` does, or what a benchmark has in its place."""

    layers: int
    """The number of layers run so far."""

    async def run(self, order: Order) -> Done:
        """Run the slices of a step that are this node's. Raises NodeError if another node is lost meanwhile."""

    def reform(self, schedule: Schedule | None, shards: Mapping[int, ShardLane], peers: Mapping[int, PeerLane]) -> None:
        """Run the steps that begin from now on by ``schedule``, with these memory nodes and other compute nodes. What
        was to be sent to others is dropped."""

    async def send_prompts(self) -> None:
        """Send the keys and values of prompts to memory nodes as buffers come free, until cancelled."""

    def forget(self, sequences: Iterable[int] | None) -> None:
        """Drop the keys and values of prompts of sequences that are over; None: of all."""


class StepRunner:
    """Runs this compute node's slices of steps, on the device's loop. Steps of different batch slots may overlap.

    Where the slices before and after run on other nodes, the carry comes from there and goes there. The answers of the
    memory nodes always go to the node that needs them.

    The rows of a step are first those whose past lies on memory nodes, which compute their attention: decode rows and
    some chunks of prompts; then the other chunks, which attend here.
    """

    def __init__(
        self,
        model: ForwardPass,
        device: Device,
        dtype: torch.dtype,
        *,
        member: int,
    ) -> None:
        """``member`` is the id of this node. It runs steps when `reform` has been called."""
        self.model = model
        self.device = device
        self.shards: Mapping[int, ShardLane] = {}
        """The memory nodes, by member id."""
        self.dtype = dtype
        self.prompts: dict[int, PromptKV] = {}
        """Those that are being prefilled, by sequence."""
        self._unsent: WeakValueDictionary[int, PromptKV] = WeakValueDictionary()
        """Those of which something is still to be sent, by sequence: the queues of ``shards`` hold them."""
        self.layers = 0
        self._schedule: Schedule | None = None
        self._member = member
        self._peers: Mapping[int, PeerLane] = {}
        self._senders: asyncio.TaskGroup | None = None
        """Of the tasks below, while `send_prompts` runs."""
        self._sending: dict[ShardLane, asyncio.Task[None]] = {}

    def reform(self, schedule: Schedule | None, shards: Mapping[int, ShardLane], peers: Mapping[int, PeerLane]) -> None:
        """See `Steps.reform`."""
        self._schedule, self.shards, self._peers = schedule, shards, peers
        if self._senders is not None:
            self._send_to_all(self._senders)

    async def run(self, order: Order) -> Done:
        """See `Steps.run`."""
        slot, number, own = order.slot, order.step, self._member
        schedule, peers, memory_nodes = self._schedule, self._peers, len(self.shards)
        if schedule is None:
            raise StaleOrderError("the members have changed", node="")
        nodes = schedule.route(slot, number)
        last = len(nodes) - 1
        forward = _StepForward(self, order)
        compute_s = 0.0
        tokens: list[int | None] = []
        scores: list[Score | None] = []
        prompt_scores: list[list[Score | None]] = []

        async def operate(function: Callable[[*Ts], R], *arguments: *Ts, at: Place) -> R:
            nonlocal compute_s
            result, seconds = await self.device.run(function, *arguments, at=at)
            compute_s += seconds
            return result

        await operate(forward.begin, at=Place(slot, step=number))
        parts = forward.parts  # one for each memory node that takes part: none if no row is remote
        attention_s = {member: [0.0] * len(parts) for member in schedule.members}
        answers = nodes[1:] if len(schedule.members) > 1 else ()
        for part in parts:
            plan = replace(part.plan, answers=answers) if answers else part.plan
            part.begin(slot, number, plan, asks=own in nodes[:last])
        for layer, node in enumerate(nodes):
            if node != own:
                continue
            at = Place(slot, layer, number)
            if layer and nodes[layer - 1] != own:
                values = await self._await_carry(_peer(peers, nodes[layer - 1]), at, forward.carry_in(layer))
                await operate(forward.take_over, values, at=at)
            if layer:
                before = nodes[layer - 1]
                for i, part in enumerate(parts):
                    attention_s[before][i] = await part.step.answered(layer - 1)
                if not parts:
                    await asyncio.sleep(0)  # other batches have their turn
            if layer == last:
                at = Place(slot, step=number)
                tokens, scores = await operate(forward.sample, at=at)
                for row, targets in forward.targeted:
                    prompt_scores.append([])
                    for some in _batched(targets.tokens, SCORED_ROWS):
                        first = row + len(prompt_scores[-1])
                        prompt_scores[-1] += await operate(forward.score, first, some, targets.top, at=at)
                break
            await operate(forward.head, layer, at=at)
            for part in parts:
                part.step.send_query(layer)
            await operate(forward.tail, layer, at=at)
            for part in parts:
                if part.plan.stored_rows:
                    part.step.send_key_value(layer)
            if forward.local:
                self._queue_prompts(forward, layer)
                await operate(forward.attend_to_prompts, layer, at=at)
            if nodes[layer + 1] != own:
                peer = _peer(peers, nodes[layer + 1])
                nbytes = await operate(peer.stage, slot, forward.carry_out(), at=at)
                peer.hand_over(slot, layer + 1, number, nbytes)
            self.layers += 1
        for run in forward.local:
            if run.choice:  # the prompt is complete; what is still to be sent keeps its own reference
                self.prompts.pop(run.sequence, None)
        return Done(
            slot=slot,
            step=number,
            tokens=tokens,
            compute_s=compute_s,
            attention_s=[(m, max(each), math.fsum(each) / memory_nodes) for m, each in attention_s.items() if each],
            scores=scores,
            prompt_scores=prompt_scores,
        )

    async def _await_carry(self, peer: PeerLane, at: Place, shapes: Sequence[Shape]) -> list[Tensor]:
        """Wait for the carry of the node of the slice before."""
        device, recorder = self.device, self.device.recorder
        begun_s = device.loop.time()
        values = await peer.take_over(at.batch, at.layer, at.step, shapes)
        if recorder is not None and recorder is device.recorder:  # else it is being read already
            recorder.add(CARRY, at._replace(peer=peer.name), begun_s, device.loop.time(), Activity.WAIT)
        return values

    async def send_prompts(self) -> None:
        """See `Steps.send_prompts`."""
        try:
            async with asyncio.TaskGroup() as senders:
                self._senders = senders
                self._send_to_all(senders)
                await self.device.loop.create_future()
        finally:
            self._senders = None
            self._sending.clear()

    def _send_to_all(self, senders: asyncio.TaskGroup) -> None:
        """Have one task for each memory node that is there."""
        there = set(self.shards.values())
        for shard in self._sending.keys() - there:
            self._sending.pop(shard).cancel()
        for shard in there - self._sending.keys():
            self._sending[shard] = senders.create_task(self._send_to(shard))

    async def _send_to(self, shard: ShardLane) -> None:
        with contextlib.suppress(NodeError):  # it is lost, which is said elsewhere
            await shard.send_prompts(self.device)

    def forget(self, sequences: Iterable[int] | None) -> None:
        """See `Steps.forget`."""
        for sequence in [*self.prompts, *self._unsent] if sequences is None else sequences:
            for prompt in (self.prompts.pop(sequence, None), self._unsent.get(sequence)):
                if prompt is not None:
                    prompt.is_over = True

    def _queue_prompts(self, forward: _StepForward, layer: int) -> None:
        """Queue what a layer added to prompts, for the memory nodes that will hold it."""
        for chunk in forward.local:
            prompt, placement = forward.own_prompts[chunk.sequence], chunk.placement
            self._unsent[chunk.sequence] = prompt
            for start, count in placement.divide(chunk.start, len(chunk.tokens)):
                for member in placement.owners(start):
                    if (shard := self.shards.get(member)) is None:
                        raise StaleOrderError(f"the memory node {member} is not there", node="")
                    shard.queue_prompt(prompt, layer, start, count, placement.held(member, start))


def _peer(peers: Mapping[int, PeerLane], member: int) -> PeerLane:
    if (peer := peers.get(member)) is None:
        raise StaleOrderError(f"the compute node {member} is not there", node="")
    return peer


SCORED_ROWS = 64
"""The most rows whose logits are computed, or scored, in one operation: 64 MB in float32 if the vocabulary has 2^18."""

Index = slice | Tensor
"""Some rows of a step; ``slice(None)`` is all of them."""

ALL = slice(None)


class _MemberPart:
    """Holds what one memory node does in a step."""

    __slots__ = ("partial", "plan", "rows", "shard", "step", "stored", "whole")

    def __init__(self, shard: ShardLane, own: MemberRows, places: dict[int, int], step_rows: int) -> None:
        """``places`` says, of each row that several nodes answer, its place among all such rows; ``step_rows`` is the
        number of the step's rows."""
        self.shard = shard
        self.step: ShardStep
        self.plan = plan = own.plan
        self.rows = _index(own.rows, step_rows)
        self.stored = _index(own.rows[: plan.stored_rows], step_rows)
        self.whole = _index(own.rows[: plan.whole])
        self.partial = _index([places[row] for row in own.rows[plan.whole :]])

    def begin(self, slot: int, number: int, plan: StepPlan, *, asks: bool) -> None:
        """See `ShardLane.begin`."""
        self.step = self.shard.begin(slot, number, plan, asks=asks)


class _StepForward:
    """Takes one step through the slices of this node.

    `begin`, `take_over`, `head`, `tail`, `attend_to_prompts`, `sample` and `score` are operations of the device.
    """

    def __init__(self, runner: StepRunner, order: Order) -> None:
        self._model = runner.model
        self._prompts = runner.prompts
        self.own_prompts: dict[int, PromptKV] = {}
        """Those of the runs that attend here. They stay while the step runs, also when their sequences are over."""
        self._dtype = runner.dtype
        self._shapes = runner.model.shapes
        self._runs = order.runs
        remote = [run for run in order.runs if run.remote]
        self.local = order.runs[len(remote) :]
        self._remote_rows = sum(len(run.tokens) for run in remote)
        self._local_count = sum(len(run.tokens) for run in self.local)
        routes = route([RemoteRun(run.sequence, run.placement, run.start, len(run.tokens)) for run in remote])
        self._merged = sorted({row for own in routes.values() for row in own.rows[own.plan.whole :]})
        places = {row: place for place, row in enumerate(self._merged)}
        rows = self._remote_rows + self._local_count
        if missing := routes.keys() - runner.shards.keys():
            raise StaleOrderError(f"the memory nodes {sorted(missing)} are not there", node="")
        self.parts = [_MemberPart(runner.shards[member], own, places, rows) for member, own in routes.items()]
        self._same_rows = not (self.local or self._merged) and all(part.plan.whole == rows for part in self.parts)
        """Whether all memory nodes answer all rows, each for its own heads. Then no prompts attend here."""
        self._constants: tuple[Any, ...] = ()
        self._carry: tuple[Tensor, ...] = ()
        self._kept: tuple[Tensor, ...] = ()
        self._q: Tensor | None = None
        self._prompt_o: Tensor | None = None
        self._token_ids: Tensor
        self._positions: Tensor
        self._last_o: Tensor | None = None
        self.targeted: list[tuple[int, Targets]] = []
        """The targets of runs, with the row of the step that gives the first one's logits."""

    def begin(self) -> None:
        """Lay out the rows of the step and compute its constants."""
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        for run in self._runs:
            if run.remote:
                self._prompts.pop(run.sequence, None)  # from here on its past is needed where it was sent
            elif run.start == 0:
                kept = PromptKV(run.sequence, run.local_tokens, self._shapes, self._dtype, self._model.device)
                self._prompts[run.sequence] = kept
            elif run.sequence not in self._prompts:
                raise SpaceLostError("this compute node", [run.sequence])  # it has come after the prompt's beginning
            if not run.remote:
                self.own_prompts[run.sequence] = self._prompts[run.sequence]
            if run.targets:
                self.targeted.append((len(token_ids) + run.targets.row, run.targets))
            token_ids += run.tokens
            positions += range(run.start, run.start + len(run.tokens))
            if run.choice:
                sampled.append(len(token_ids) - 1)
        device = self._model.device
        self._token_ids = torch.tensor(token_ids, device=device)
        self._positions = torch.tensor(positions, device=device)
        rows = torch.tensor(sampled or [0], device=device)
        self._constants = self._model.begin(self._token_ids, self._positions, rows)

    # -- where another node runs the slice before or after

    def carry_in(self, piece: int) -> list[Shape]:
        """Return the shapes of what the node of the slice before sends: its carry, and the attention of the rows of
        prompts."""
        shapes = self._model.carry_shapes(piece - 1, self._remote_rows + self._local_count)
        if self.local:
            layer = self._shapes[piece - 1]
            shapes.append(((self._local_count, layer.q_heads, layer.v_dim), self._dtype))
        return shapes

    def carry_out(self) -> list[Tensor]:
        """Return what goes to the node of the slice after, in the same order."""
        return [*self._carry, *([] if self._prompt_o is None else [self._prompt_o])]

    def take_over(self, values: Sequence[Tensor]) -> None:
        """Continue with what the node of the slice before sent."""
        if self.local:
            *values, self._prompt_o = values
        self._carry = tuple(value.to(self._model.device) for value in values)

    # -- slices

    def head(self, layer: int) -> None:
        """Compute q [T, Hq, Dk] from the carry and the attention of the layer before, and stage each memory node's rows
        and heads."""
        q, self._kept = self._model.slice(layer).head(self._constants, self._carry, self._attended(layer - 1))
        if self._same_rows:
            queries = self._divide(q, [part.step.heads(layer) for part in self.parts])
        else:
            queries = [_rows_of(q, part.rows) for part in self.parts]
        for part, own in zip(self.parts, queries, strict=True):
            part.step.stage_query(layer, own)
        self._q = q

    def tail(self, layer: int) -> None:
        """Compute k [T, Hkv, Dk], v [T, Hkv, Dv] and the carry. What memory nodes store is staged; the rows of prompts
        that attend here are kept here."""
        k, v, self._carry = self._model.slice(layer).tail(self._constants, self._kept)
        if self._same_rows:
            heads = [part.step.kv_heads(layer) for part in self.parts]
            for part, own_k, own_v in zip(self.parts, self._divide(k, heads), self._divide(v, heads), strict=True):
                part.step.stage_key_value(layer, own_k, own_v)
            return  # all rows are stored there
        for part in self.parts:
            if part.plan.stored_rows:
                k_rows, v_rows = _rows_of(k, part.stored), _rows_of(v, part.stored)
                part.step.stage_key_value(layer, k_rows, v_rows)
        for run, rows in self._local_rows():
            self.own_prompts[run.sequence].store(layer, run.start, k[rows], v[rows])

    @staticmethod
    def _divide(values: Tensor, heads: Sequence[slice]) -> Sequence[Tensor]:
        """Return the heads of values [rows, H, D] that each memory node has. One call is faster than many slices."""
        # They cover all heads in ascending order, as nodes, members and parts have the order of the file.
        return values.split([own.stop - own.start for own in heads], 1) if len(heads) > 1 else [values]

    def attend_to_prompts(self, layer: int) -> None:
        """Compute the attention of the chunks of prompts, over the keys and values that are kept here."""
        assert self._q is not None
        parts = [
            self.own_prompts[run.sequence].attend(layer, run.start, self._q[rows]) for run, rows in self._local_rows()
        ]
        self._prompt_o = torch.cat(parts).to(self._dtype)

    def sample(self) -> tuple[list[int | None], list[Score | None]]:
        """Compute the logits of the sampled rows, and choose a token from each, as `lamina.compute.sampler.sample`
        does. Returns also their scores, where they are wanted; none if no row wants any."""
        choices = [run.choice for run in self._runs if run.choice]
        if not choices and not self.targeted:
            return [], []
        self._last_o = self._attended(len(self._shapes) - 1)
        if not choices:
            return [], []
        logits = self._last_head(self._constants, self._carry, self._last_o).out
        tokens = sample(logits, choices)
        asked = [
            Asked(row, token, choice.logprobs)
            for row, (choice, token) in enumerate(zip(choices, tokens, strict=True))
            if choice.logprobs is not None and token is not None and token != NONE_ALLOWED
        ]
        scores: list[Score | None] = [None] * len(tokens) if asked else []
        for own in _batched(asked, SCORED_ROWS):
            for (row, _, _), value in zip(own, score(logits, own), strict=True):
                scores[row] = value
        return tokens, scores

    def score(self, first: int, tokens: Sequence[int], top: int) -> list[Score | None]:
        """Return the scores of tokens, each by the logits of one of the consecutive rows from ``first`` on; after
        `sample`. No more rows are computed than that, as the slices treat each row by itself."""
        rows = slice(first, first + len(tokens))
        every = torch.arange(len(tokens), device=self._model.device)
        constants = self._model.begin(self._token_ids[rows], self._positions[rows], every)
        carry = tuple(part[:, rows].contiguous() for part in self._carry)
        o = None if self._last_o is None else self._last_o[rows]
        logits = self._last_head(constants, carry, o).out
        return score(logits, [Asked(row, token, top) for row, token in enumerate(tokens)])

    def _last_head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...], o: Tensor | None) -> Head:
        return self._model.slice(len(self._shapes)).head(constants, carry, o)

    def _attended(self, layer: int) -> Tensor | None:
        """Return o [T, Hq, Dv] of a layer: the answers of the memory nodes, then the rows of prompts."""
        if layer < 0:
            return None
        if not self.parts:
            return self._prompt_o
        if self._same_rows:
            outputs = [part.step.output(layer) for part in self.parts]
            o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            return o.to(self._model.device)  # one on the CPU stays where it arrived
        shape, rows = self._shapes[layer], self._remote_rows + self._local_count
        o = torch.empty(rows, shape.q_heads, shape.v_dim, dtype=self._dtype, device=self._model.device)
        for part in self.parts:
            if part.plan.whole:
                o[part.whole, part.step.heads(layer)] = part.step.output(layer)
        if self._merged:
            o[_index(self._merged)] = self._merge(layer).to(o.dtype)
        if self._prompt_o is not None:
            o[self._remote_rows :] = self._prompt_o
        return o

    def _merge(self, layer: int) -> Tensor:
        """Merge the partials of the rows whose past lies on several nodes, in the nodes' order, to o [rows, Hq, Dv] in
        float32."""
        shape, rows = self._shapes[layer], len(self._merged)
        partials = []
        for part in self.parts:
            if part.plan.rows > part.plan.whole:
                partial = Partial.empty(rows, shape.q_heads, shape.v_dim, device=self._model.device)
                arrived = part.step.partials(layer)
                partial.o[part.partial], partial.lse[part.partial] = arrived.o, arrived.lse
                partials.append(partial)
        return merge(*partials).o

    def _local_rows(self) -> Iterator[tuple[TokenRun, slice]]:
        row = self._remote_rows
        for run in self.local:
            yield run, slice(row, row + len(run.tokens))
            row += len(run.tokens)


def _batched(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _index(rows: Sequence[int], step_rows: int = -1) -> Index:
    """Return an index of the rows: a slice if they are consecutive, which costs no copy, ALL if they are all
    ``step_rows`` rows of the step, else a tensor."""
    first = rows[0] if rows else 0
    if isinstance(rows, range) or list(rows) == list(range(first, first + len(rows))):
        return ALL if len(rows) == step_rows else slice(first, first + len(rows))
    return torch.tensor(rows)


def _rows_of(values: Tensor, index: Index) -> Tensor:
    """Return some rows of a tensor. All of them are the tensor itself: a view costs a microsecond in every layer."""
    return values if index is ALL else values[index]
