"""What it is worth that all memory nodes are one pool, on the virtual clock.

The nodes are the real ones (`lamina.sim`); their model and backend compute nothing, and say how long a machine would
take. Contexts have a long tail, as in the evaluation of Infinite-LLM (Lin et al., 2024,
https://arxiv.org/abs/2401.02669): up to 60 thousand tokens (its traces 0 to 2) and up to 200 thousand (3 to 5). The
paper gives ranges alone; lengths here are log-normal. All lengths, the memory and the time are a sixteenth of those.

Three systems have the same devices. *Isolated* ones are as many clusters as there are memory nodes, with one compute
node and one memory node each, among which requests are dealt out; this is the paper's yardstick, which has to refuse
the longest. The others are one cluster, without and with moves between memory nodes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina.attention import KVCache, LayerShape, Partial
from lamina.attention.backend import Plan
from lamina.attention.placement import BlockPlacement
from lamina.bench import plots, report
from lamina.config import ClusterConfig, ComputeNodeConfig, MemoryNodeConfig, ModelConfig, NodeConfig, PipelineConfig
from lamina.errors import CapacityError, LaminaError, RequestError
from lamina.front.intake import End
from lamina.model.slices import Head
from lamina.node.compute import ComputeNode
from lamina.node.model import ModelFacts
from lamina.sim.cluster import SimCluster
from lamina.sim.device import ModelledWork
from lamina.sim.empty import EmptyBackend, EmptyForward, EmptyModel, EmptySlice
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from lamina.transport import Address
from lamina.wire.requests import Request, Score

SCALE = 16
"""How much shorter contexts, and the time in which they grow, are than those of the paper."""
NODES = 4
"""Memory nodes, and compute nodes, which are replicas."""
LAYERS = 2
"""Fewer than a model has: each of them takes its part of a step's time."""
MAX_BATCH = 128
REQUESTS, QUICK_REQUESTS = 240, 60
EVERY_S = 0.1
"""Virtual seconds between two looks at a cluster."""

# LLaMA2-13B on A100-80GB, as in the paper: 26 GB of weights, and 800 KiB of keys and values for each token, for which
# 46 GB are left. A device reaches 0.8 of its bandwidth and half of its arithmetic.
WEIGHT_BYTES, KV_BYTES, MODEL_LAYERS = 26e9, 40 * 2 * 5120 * 2, 40
MEMORY_BYTES = 46e9
BYTES_PER_S, FLOPS_PER_S = 0.8 * 2.0e12, 0.5 * 312e12
NETWORK_BYTES_PER_S, LATENCY_S = 50e9, 5e-6

SHAPE = LayerShape(q_heads=1, kv_heads=1, qk_dim=8, v_dim=8, scale=1.0)
STORED_BYTES = LAYERS * 2 * 8 * 4
"""Bytes of a token here. The network is slower by as much as they are fewer."""


class Lengths(NamedTuple):
    """A kind of trace: the tokens of a prompt and of its answer, of which one has a long tail."""

    name: str
    longest: int
    """Tokens of the longest context, in the paper's measure."""
    is_prompt: bool
    """Whether prompts are long, or answers."""

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Return the lengths of so many requests, in this benchmark's measure."""
        chance = Random(seed)  # noqa: S311 - no secret depends on it
        longest = self.longest // SCALE
        found = []
        for _ in range(count):
            long = min(longest - 64, max(16, int(chance.lognormvariate(math.log(longest / 8), 1.0))))
            short = chance.randint(8, 64)
            found.append((long, short) if self.is_prompt else (short, long))
        return found


TRACES = (
    Lengths("answers to 60K", 60_000, is_prompt=False),
    Lengths("prompts to 60K", 60_000, is_prompt=True),
    Lengths("prompts to 200K", 200_000, is_prompt=True),
)
SYSTEMS = ("isolated", "one cluster", "with moves")

COLUMNS = {
    "trace": "trace",
    "system": "system",
    "tokens_per_s": "tokens/s",
    "kv_use": "KV use",
    "preemptions": "preempted",
    "moved_blocks": "moved",
    "refused": "refused",
    "ratio": "ratio",
}


# -- what takes time


class _RooflineSlice:
    """Reads its part of the weights, or computes with them where that takes longer."""

    def __init__(self, within: EmptySlice, work: ModelledWork) -> None:
        self._within = within
        self._work = work
        self.tail = within.tail

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """See `ForwardSlice.head`."""
        compute_s = WEIGHT_BYTES * constants[0] / FLOPS_PER_S  # two operations for each weight of two bytes
        self._work.add(max(WEIGHT_BYTES / BYTES_PER_S, compute_s) / (LAYERS + 1))
        return self._within.head(constants, carry, o)


class _RooflineForward(EmptyForward):
    work: ModelledWork

    def slice(self, index: int) -> Any:
        """See `ForwardPass.slice`."""
        return _RooflineSlice(super().slice(index), self.work)


@dataclass(frozen=True)
class _RooflineModel(EmptyModel):
    work: ModelledWork

    def load(self, slices: range, device: torch.device) -> EmptyForward:
        """See `ModelSource.load`."""
        dtype = getattr(torch, self.facts.dtype)
        forward = _RooflineForward(self.facts.layers, rows=self.rows, vocabulary=self.facts.vocabulary, dtype=dtype)
        forward.work = self.work
        return forward


class _RooflineBackend(EmptyBackend):
    """Reads the past at the speed of the memory."""

    def __init__(self, cache: KVCache, work: ModelledWork) -> None:
        super().__init__(cache)
        self._work = work

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        """See `Backend.past`."""
        assert isinstance(plan, BlockPlacement)
        self._work.add(SCALE * int(plan.starts.sum()) * KV_BYTES / LAYERS / BYTES_PER_S)
        return super().past(plan, layer, q)


class _RooflineBackends:
    """Makes backends."""

    name = "modelled"

    def __init__(self, work: ModelledWork) -> None:
        self._work = work

    def layer_bytes(self, shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """See `BackendFactory.layer_bytes`."""
        return block_tokens * STORED_BYTES // LAYERS

    def __call__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> _RooflineBackend:
        """See `BackendFactory`."""
        return _RooflineBackend(cache, self._work)


# -- measuring


class _TokenCount:
    """Counts the tokens of all answers."""

    def __init__(self) -> None:
        self.tokens = 0

    def token(self, token: int, score: Score | None = None) -> None:
        """See `lamina.front.intake.Answer`."""
        self.tokens += 1

    def prompt_scored(self, scores: list[Score]) -> None:
        """See `lamina.front.intake.Answer`."""

    def finished(self, end: End) -> None:
        """See `lamina.front.intake.Answer`."""

    def failed(self, error: LaminaError) -> None:
        """See `lamina.front.intake.Answer`: nothing fails here."""
        raise error


class Outcome(NamedTuple):
    """What a cluster did until none of its requests waited any more, be it for its turn or for its space back."""

    tokens: int
    seconds: float
    kv_use: float
    """The mean share of the blocks that were held."""
    preemptions: int
    moved_blocks: int
    refused: int


def measure(asked: Sequence[tuple[int, int]], longest: int, *, nodes: int, moves: bool) -> Outcome:
    """Run a cluster of so many compute and memory nodes on requests of these lengths, all of which come at once.

    ``longest`` is the longest context in the paper's measure.
    """
    work, config, tokens = ModelledWork(), _config(nodes, moves), int(MEMORY_BYTES / KV_BYTES)
    facts = ModelFacts(
        path=Path("empty"),
        fingerprint="empty",
        dtype="float32",
        layers=(SHAPE,) * LAYERS,
        max_context=(min(longest, tokens - 2 * SCALE * 16) if nodes == 1 else longest) // SCALE,
        vocabulary=16,
        stop_tokens=frozenset(),
    )
    model = _RooflineModel(facts, MAX_BATCH + config.pipeline.prefill_tokens + 128, work)
    link = LinkModel(LATENCY_S * MODEL_LAYERS / LAYERS, NETWORK_BYTES_PER_S * STORED_BYTES / KV_BYTES)

    async def main(world: World) -> Outcome:
        cluster = SimCluster(
            world, config, open_model=lambda _: model, backend=_RooflineBackends(work), seconds=lambda node: work
        )
        async with cluster:
            await cluster.ready()
            return await _serve(cluster, asked)

    with World(1, model=link, tracing=False) as world:
        return world.run(main(world))


def _config(count: int, moves: bool) -> ClusterConfig:
    nodes: list[NodeConfig] = []
    for i in range(count):
        nodes.append(ComputeNodeConfig(name=f"c{i}", address=Address("tcp", "127.0.0.1", 7000 + i)))
        address, tokens = Address("tcp", "127.0.0.1", 8000 + i), int(MEMORY_BYTES / KV_BYTES / SCALE)
        nodes.append(MemoryNodeConfig(name=f"m{i}", address=address, memory=tokens * STORED_BYTES))
    pipeline = PipelineConfig(
        batches=count,
        max_batch=MAX_BATCH,
        prefill_tokens=256,
        partition="requests",
        moves=moves,
    )
    return ClusterConfig(model=ModelConfig(path="empty"), node=nodes, pipeline=pipeline)


async def _serve(cluster: SimCluster, asked: Sequence[tuple[int, int]]) -> Outcome:
    front, loop = cluster.nodes["c0"], asyncio.get_running_loop()
    assert isinstance(front, ComputeNode)
    intake, answers, used, refused = front.intake(), _TokenCount(), [0.0], 0
    chance, started_s = Random(1), loop.time()  # noqa: S311 - no secret depends on it
    for prompt_tokens, answer_tokens in asked:
        # The prompts differ, so that nothing is shared.
        prompt = [chance.randrange(16) for _ in range(prompt_tokens)]
        try:
            await intake.submit(Request(prompt=prompt, max_tokens=answer_tokens), prompt, answers)
        except (CapacityError, RequestError):
            refused += 1
    while True:
        await asyncio.sleep(EVERY_S)
        done = intake.counters
        if done.waiting:
            used.append(1 - done.free_blocks / done.blocks)
            outcome = Outcome(
                answers.tokens,
                loop.time() - started_s,
                sum(used) / len(used),
                done.preemptions,
                done.moved_blocks,
                refused,
            )
        elif not done.running:
            return outcome


def _compare(trace: Lengths, requests: int, advance: Callable[[], None]) -> list[report.Row]:
    """Measure the three systems."""
    asked = trace.draw(requests, seed=1)
    found: dict[str, list[Outcome]] = {}
    for system in SYSTEMS:
        if system == "isolated":
            parts = [asked[i::NODES] for i in range(NODES)]
            found[system] = [measure(part, trace.longest, nodes=1, moves=False) for part in parts]
        else:
            found[system] = [measure(asked, trace.longest, nodes=NODES, moves=system == "with moves")]
        advance()
    rates = {name: sum(each.tokens / each.seconds for each in outcomes) for name, outcomes in found.items()}
    return [
        {
            "trace": trace.name,
            "system": system,
            "tokens_per_s": rates[system],
            "kv_use": sum(each.kv_use for each in outcomes) / len(outcomes),
            "preemptions": sum(each.preemptions for each in outcomes),
            "moved_blocks": sum(each.moved_blocks for each in outcomes),
            "refused": sum(each.refused for each in outcomes),
            "ratio": rates[system] / rates["one cluster"],
        }
        for system, outcomes in found.items()
    ]


def run(*, as_json: bool, plot: Path | None, quick: bool) -> None:
    """Measure and print."""
    plots.check(plot)
    traces, requests = (TRACES[:2], QUICK_REQUESTS) if quick else (TRACES, REQUESTS)
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)  # all tensors are tiny
    try:
        with report.progress() as progress:
            task = progress.add_task("pool", total=len(traces) * len(SYSTEMS))
            for trace in traces:
                rows += _compare(trace, requests, lambda: progress.advance(task))
    finally:
        torch.set_num_threads(threads)
    about = f"{NODES} compute and {NODES} memory nodes on the virtual clock, {requests} requests at once"
    result = report.Result("pool", about, rows, report.machine())
    if as_json:
        report.print_json(result)
    else:
        report.print_table("one pool of memory: virtual tokens/s while requests wait", rows, COLUMNS)
    if plot is not None:
        plots.draw(plot, result)
