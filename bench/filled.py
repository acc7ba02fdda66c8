"""A compute node whose prompts cost nothing, so that decoding at long contexts can be measured at once.

``python -m lamina.bench.filled CONFIG NAME`` runs the compute node NAME of a cluster file. A prompt does not go through
the slices: random keys and values are shipped for it, over the same lane, into blocks of the sequence's own, and its
first token is token 0. Decode steps are those of every compute node. (vLLM has a connector for the same purpose, and
llama.cpp's batched benchmark copies one prompt's cache to all sequences.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lamina.device import let_idle_threads_sleep

let_idle_threads_sleep()  # as ``lamina node`` does, before torch is there

# ruff: noqa: E402
import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.config import load
from lamina.engine.geometry import CHUNK_TOKENS
from lamina.engine.prompts import PromptKV
from lamina.engine.scheduler import Step
from lamina.engine.step import Ran, StepRunner
from lamina.node import compute, daemon

FIRST_TOKEN = 0


class RandomKV(PromptKV):
    """The same normally distributed keys and values at all positions of a chunk, whichever it is."""

    def __init__(self, sequence: int, layers: Sequence[LayerShape], dtype: torch.dtype) -> None:
        super().__init__(sequence, CHUNK_TOKENS, layers, dtype, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for layer, shape in enumerate(layers):
            k = torch.randn(CHUNK_TOKENS, shape.kv_heads, shape.qk_dim, generator=generator)
            v = torch.randn(CHUNK_TOKENS, shape.kv_heads, shape.v_dim, generator=generator)
            self.store(layer, 0, k.to(dtype), v.to(dtype))

    def read(self, layer: int, start: int, count: int, heads: range) -> tuple[Tensor, Tensor]:
        return super().read(layer, 0, count, heads)


class FilledRunner(StepRunner):
    """Decodes as `StepRunner` does; prompts are filled in at random."""

    async def run(self, slot: int, number: int, step: Step) -> Ran:
        shapes = [s.shape for s in self.model.slices if s.shape is not None]
        for chunk in step.prompts:
            kept = RandomKV(chunk.sequence.id, shapes, self.dtype)
            for layer in range(len(shapes)):
                for shard in self.shards:
                    shard.ship(kept, layer, chunk.start, len(chunk.tokens), chunk.start)
        ran = Ran([], 0.0, 0.0, math.nan)
        if step.decode:
            ran = await super().run(slot, number, replace(step, prompts=()))
        return ran._replace(tokens=ran.tokens + [FIRST_TOKEN for chunk in step.prompts if chunk.completes])


def main() -> int:
    config, name = load(Path(sys.argv[1])), sys.argv[2]
    compute.StepRunner = FilledRunner  # type: ignore[attr-defined]
    return daemon.run(name, compute.ComputeNode(config, config.find(name)).serve)


if __name__ == "__main__":
    sys.exit(main())
