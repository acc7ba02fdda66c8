"""Take a batch through the slices: the hot path of a compute node, from token ids to sampled tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lamina.attention import LayerShape, Rows, Run
from lamina.device import Device
from lamina.engine.prompts import PromptKV
from lamina.engine.remote import RemoteShard
from lamina.engine.sampler import sample
from lamina.engine.scheduler import PromptChunk, Step
from lamina.model.slices import SlicedModel, StepConstants
from lamina.spans import Place


class StepRunner:
    """Runs steps of one model over its memory nodes; steps of different slots may run at the same time.

    The rows of a step are its decode rows, whose attention the memory nodes compute, followed by the chunks of
    prompts, which attend here. ``layers`` counts the layers that were run.
    """

    def __init__(self, model: SlicedModel, device: Device, shards: Sequence[RemoteShard], dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.shards = shards
        self.dtype = dtype
        self.prompts: dict[int, PromptKV] = {}
        self.layers = 0

    async def run(self, slot: int, number: int, step: Step) -> list[int]:
        """The tokens of the step's sampled rows. On the device's loop; NodeError if a memory node is lost meanwhile."""
        compute, forward = self.device.compute, _Forward(self, slot, step)
        remote = len(step.decode)
        # Without decode rows the memory nodes have no part in the step.
        shards = self.shards if remote else ()
        await compute(forward.begin, at=Place(slot))
        for shard in shards:
            shard.plan(slot, number, Rows(tuple(Run(r.sequence.id, r.position, 1) for r in step.decode)))
        for layer in range(len(self.model.slices) - 1):
            await compute(forward.head, layer, at=Place(slot, layer))
            for shard in shards:
                shard.send_query(slot, layer, number, remote)
            await compute(forward.tail, layer, at=Place(slot, layer))
            for shard in shards:
                shard.send_key_value(slot, layer, number, remote)
            if step.prompts:
                self._ship(step, layer)
                await compute(forward.attend_to_prompts, layer, at=Place(slot, layer))
            for shard in shards:
                await shard.answered(slot)
            if not shards:
                await asyncio.sleep(0)  # others have their turn
            self.layers += 1
        for chunk in step.prompts:
            if chunk.completes:
                self.forget(chunk.sequence.id)
        return await compute(forward.sample, at=Place(slot)) if step.sampled else []

    def forget(self, sequence: int) -> None:
        """Drop a prompt's keys and values here; what is still to be sent keeps its own reference."""
        self.prompts.pop(sequence, None)

    def _ship(self, step: Step, layer: int) -> None:
        for chunk in step.prompts:
            for shard in self.shards:
                shard.ship(self.prompts[chunk.sequence.id], layer, chunk.start, len(chunk.tokens))


class _Forward:
    """One step on its way through the slices."""

    def __init__(self, runner: StepRunner, slot: int, step: Step) -> None:
        self._slices = runner.model.slices
        self._model = runner.model
        self._shards = runner.shards
        self._prompts = runner.prompts
        self._dtype = runner.dtype
        self._shapes: list[LayerShape] = [s.shape for s in self._slices if s.shape is not None]
        self._slot = slot
        self._step = step
        self._remote = len(step.decode)
        self._constants: StepConstants = ()
        self._carry: tuple[Tensor, ...] = ()
        self._kept: tuple[Tensor, ...] = ()
        self._q: Tensor | None = None
        self._prompt_o: Tensor | None = None

    def begin(self) -> None:
        """Lay out the rows of the step and compute its constants."""
        token_ids = [r.token for r in self._step.decode]
        positions = [r.position for r in self._step.decode]
        sampled = list(range(self._remote))
        for chunk in self._step.prompts:
            sequence = chunk.sequence
            if chunk.start == 0:
                kept = PromptKV(sequence.id, len(sequence.prompt), self._shapes, self._dtype, self._model.device)
                self._prompts[sequence.id] = kept
            token_ids += chunk.tokens
            positions += range(chunk.start, chunk.start + len(chunk.tokens))
            if chunk.completes:
                sampled.append(len(token_ids) - 1)
        device = self._model.device
        self._constants = self._model.begin(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(sampled or [0], device=device),
        )

    def head(self, layer: int) -> None:
        """From the carry and the attention of the layer before to q, staged for sending."""
        self._q, self._kept = self._slices[layer].head(self._constants, self._carry, self._attended(layer - 1))
        if self._remote:
            for shard in self._shards:
                shard.stage_query(self._slot, layer, self._q[: self._remote])

    def tail(self, layer: int) -> None:
        """k and v, staged for sending or kept with the prompt, and the carry."""
        k, v, self._carry = self._slices[layer].tail(self._constants, self._kept)
        if self._remote:
            for shard in self._shards:
                shard.stage_key_value(self._slot, layer, k[: self._remote], v[: self._remote])
        for chunk, rows in self._prompt_rows():
            self._prompts[chunk.sequence.id].store(layer, chunk.start, k[rows], v[rows])

    def attend_to_prompts(self, layer: int) -> None:
        """Attention of the chunks of prompts, over what is kept here."""
        assert self._q is not None
        parts = [
            self._prompts[chunk.sequence.id].attend(layer, chunk.start, self._q[rows])
            for chunk, rows in self._prompt_rows()
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
        if not self._remote:
            return self._prompt_o
        assert self._q is not None
        shape = self._shapes[layer]
        o = self._q.new_empty(len(self._q), shape.q_heads, shape.v_dim)
        for shard in self._shards:
            shard.output(self._slot, layer, o[: self._remote])
        if self._prompt_o is not None:
            o[self._remote :] = self._prompt_o
        return o

    def _prompt_rows(self) -> Iterator[tuple[PromptChunk, slice]]:
        row = self._remote
        for chunk in self._step.prompts:
            yield chunk, slice(row, row + len(chunk.tokens))
            row += len(chunk.tokens)
