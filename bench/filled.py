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
from pathlib import Path

from lamina.runtime.cpu import CpuDevice, let_idle_threads_sleep

let_idle_threads_sleep()  # as ``lamina node`` does, before torch is there

# ruff: noqa: E402
import torch
from msgspec.structs import replace
from torch import Tensor

from lamina.attention import LayerShape
from lamina.compute.prompts import PromptKV
from lamina.compute.step import StepRunner
from lamina.config import ComputeNodeConfig, load
from lamina.node import daemon
from lamina.node.compute import ComputeNode
from lamina.node.model import OpenModel, open_checkpoint
from lamina.runtime.sockets import Sockets
from lamina.wire.geometry import CHUNK_TOKENS
from lamina.wire.orders import Done, Order

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

    async def run(self, order: Order) -> Done:
        prompts = [run for run in order.runs if not run.remote]
        for run in prompts:
            kept = RandomKV(run.sequence, self.model.shapes, self.dtype)
            for layer in range(len(self.model.shapes)):
                for shard in self.shards.values():
                    shard.queue_prompt(kept, layer, run.start, len(run.tokens), run.start)
        done = Done(
            slot=order.slot, step=order.step, tokens=[], compute_s=math.nan, attention_s=[(0, math.nan, math.nan)]
        )
        if decoding := [run for run in order.runs if run.remote]:
            done = await super().run(replace(order, runs=decoding))
        if prompts:  # which are no measure of what prompts cost
            done = replace(done, compute_s=math.nan)
        return replace(done, tokens=done.tokens + [FIRST_TOKEN for run in prompts if run.choice])


def main(open_model: OpenModel = open_checkpoint) -> int:
    """Run the node that the command line names, with the model that ``open_model`` opens."""
    config, name = load(Path(sys.argv[1])), sys.argv[2]
    node = config.find(name)
    assert isinstance(node, ComputeNodeConfig), "clusters run memory nodes by ``lamina node``"

    def make() -> daemon.Daemon:
        device = CpuDevice(cpus=node.cpus, threads=node.threads)
        serving = ComputeNode(
            config, node, device=device, network=Sockets(), open_model=open_model, make_runner=FilledRunner
        )
        return daemon.Daemon(serving.serve)

    return daemon.run(name, make)


if __name__ == "__main__":
    sys.exit(main())
