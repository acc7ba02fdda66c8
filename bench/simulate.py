"""How fast a cluster runs on the virtual clock: steps per second of this machine, when nothing is computed.

The nodes are the real ones, in one process (`lamina.sim`); their model and backend are empty. Null operations take no
virtual time either; timed ones, and links with latency and bandwidth, show what the clock costs. The yardstick is the
simulated network alone: as many writes as a step has, there and back, with nothing behind them.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import torch

from lamina.attention import LayerShape
from lamina.bench import report
from lamina.config import ClusterConfig, ComputeNodeConfig, MemoryNodeConfig, ModelConfig, NodeConfig, PipelineConfig
from lamina.errors import LaminaError
from lamina.front.intake import End
from lamina.node.compute import ComputeNode
from lamina.node.model import ModelFacts
from lamina.sim.cluster import SimCluster
from lamina.sim.device import Seconds
from lamina.sim.empty import EmptyBackend, EmptyModel
from lamina.sim.link import LinkModel
from lamina.sim.network import SimNetwork
from lamina.sim.world import World
from lamina.transport import Address, Hello, Lane, Link, Options, Region
from lamina.wire.requests import Request, Score

LAYERS, BATCH, PROMPT_TOKENS = 32, 64, 3
CLUSTERS = ((1, 1), (1, 4), (2, 8))
"""Compute nodes, which are replicas with a batch each, and memory nodes."""
NBYTES = BATCH * 8 * 4
"""Bytes of each write of the yardstick: the queries of one head."""
STEPS, QUICK_STEPS = 400, 60
TIMED = {"head": 1e-4, "tail": 1e-4, "_past": 1e-4, "_finish": 1e-5}
"""Virtual seconds of the operations of a layer."""

COLUMNS = {
    "clock": "clock",
    "compute": "compute",
    "memory": "memory",
    "steps_per_s": "steps/s",
    "step_ms": "ms",
    "bare_ms": "bare ms",
    "ratio": "ratio",
}


class _Answered:
    """The answer to a request of which only the first token and the end matter."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def token(self, token: int, score: Score | None = None) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    def prompt_scored(self, scores: list[Score]) -> None:
        pass

    def finished(self, end: End) -> None:
        self.ended.set_result(None)

    def failed(self, error: LaminaError) -> None:
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_exception(error)


def run(*, as_json: bool, quick: bool) -> None:
    """Measure and print."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all tensors are tiny
    try:
        clusters = CLUSTERS[:2] if quick else CLUSTERS
        with report.progress() as progress:
            task = progress.add_task("simulate", total=2 * len(clusters))
            for compute, memory in clusters:
                for clock in ("null", "timed"):
                    steps = (QUICK_STEPS if quick else STEPS) // (compute if compute > 1 else 1)
                    rows.append(_measure(clock, compute, memory, steps))
                    progress.advance(task)
    finally:
        torch.set_num_threads(threads)
    if as_json:
        report.print_json(
            report.Result(
                "simulate", f"{LAYERS} layers, batches of {BATCH}; seconds of the processor", rows, report.machine()
            )
        )
    else:
        report.print_table("steps of a simulated cluster that computes nothing", rows, COLUMNS)


def _measure(clock: str, compute: int, memory: int, steps: int) -> report.Row:
    """One cluster. Seconds are those of the processor, which the simulation has for itself."""
    timed = clock == "timed"
    model = LinkModel(latency_s=1e-5, bytes_per_s=1e10) if timed else LinkModel()
    seconds: Seconds = (lambda name, at: TIMED.get(name, 0.0)) if timed else 0.0
    with World(1, model=model, tracing=False) as world:
        done, spent_s = world.run(_decode(world, compute, memory, steps, seconds))
    with World(1, model=model, tracing=False) as world:
        bare_s = world.run(_write(world, memory, max(1, steps // 10)))
    return {
        "clock": clock,
        "compute": compute,
        "memory": memory,
        "steps_per_s": done / spent_s,
        "step_ms": spent_s / done * 1e3,
        "bare_ms": bare_s * 1e3,
        "ratio": spent_s / done / bare_s,
    }


def _config(compute: int, memory: int) -> ClusterConfig:
    nodes: list[NodeConfig] = [
        ComputeNodeConfig(name=f"c{i}", address=Address("tcp", "127.0.0.1", 7000 + i)) for i in range(compute)
    ]
    nodes += [
        MemoryNodeConfig(name=f"m{i}", address=Address("tcp", "127.0.0.1", 8000 + i), memory=2**24)
        for i in range(memory)
    ]
    pipeline = PipelineConfig(batches=compute, max_batch=BATCH, prefill_tokens=64)
    return ClusterConfig(model=ModelConfig(path="empty"), node=nodes, pipeline=pipeline)


async def _decode(world: World, compute: int, memory: int, steps: int, seconds: Seconds) -> tuple[int, float]:
    """Steps of full batches, and the seconds that they took."""
    shape = LayerShape(q_heads=memory, kv_heads=memory, qk_dim=8, v_dim=8, scale=1.0)
    facts = ModelFacts(
        path=Path("empty"),
        fingerprint="empty",
        dtype="float32",
        layers=(shape,) * LAYERS,
        max_context=4096,
        vocabulary=16,
        stop_tokens=frozenset(),
    )
    config = _config(compute, memory)

    cluster = SimCluster(
        world,
        config,
        open_model=lambda _: EmptyModel(facts, rows=BATCH + 128),
        backend=EmptyBackend,
        seconds=lambda node: seconds,
    )
    async with cluster:
        await cluster.ready()
        front = cluster.nodes[config.front.name]
        assert isinstance(front, ComputeNode)
        intake, answers = front.intake(), [_Answered() for _ in range(BATCH * compute)]
        prompt = list(range(PROMPT_TOKENS))
        for answer in answers:
            await intake.submit(Request(prompt=prompt, max_tokens=steps), prompt, answer)
        await asyncio.gather(*(answer.begun for answer in answers))
        before, started = intake.counters.steps, time.process_time()
        await asyncio.gather(*(answer.ended for answer in answers))
        spent_s = time.process_time() - started
        done = intake.counters.steps - before
        ended = await cluster.stop_all()
        if failed := [error for error in ended.values() if error is not None]:
            raise failed[0]
    return done, spent_s


async def _write(world: World, memory: int, steps: int) -> float:
    """Seconds that the writes of one step take: two there and one back, layer after layer, for each memory node."""
    options, ends = Options(kind="shm"), []
    for i in range(memory):
        ends.append(_Ping(world.network, Address("tcp", "127.0.0.1", 9000 + i), options, steps * LAYERS))
    await asyncio.gather(*(end.connect() for end in ends))
    started = time.process_time()
    await asyncio.gather(*(end.run() for end in ends))
    return (time.process_time() - started) / steps


class _Ping:
    """A link on which two writes are answered by one, over and over again."""

    def __init__(self, network: SimNetwork, address: Address, options: Options, rounds: int) -> None:
        self._network = network
        self._address = address
        self._options = options
        self._rounds = rounds
        self._near_region, self._far_region = Region("near", NBYTES), Region("far", NBYTES)
        self._source = memoryview(bytes(NBYTES))
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        """Make the link, and tell both ends where to write."""
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        name = str(self._address.port)
        await self._network.listen(self._address, Hello("memory", f"m{name}"), accepted.set_result, self._options)
        self._near = await self._network.connect(
            self._address, Hello("compute", f"c{name}"), self._options, deadline_s=10
        )
        self._far = await accepted
        self._near.deliver(on_tag=self._answered)
        self._far.deliver(on_tag=self._asked)
        self._to_near, self._to_far = self._near.expose(self._near_region), self._far.expose(self._far_region)
        await asyncio.sleep(1)  # virtual: both ends learn of the regions

    async def run(self) -> None:
        """Write until all rounds are over."""
        self._ask()
        await self._done

    def _ask(self) -> None:
        self._near.write(Lane.DECODE, self._to_far, 0, [self._source], 0)
        self._near.write(Lane.DECODE, self._to_far, 0, [self._source], 1)

    def _asked(self, lane: Lane, tag: int) -> None:
        if tag:
            self._far.write(Lane.DECODE, self._to_near, 0, [self._source], 0)

    def _answered(self, lane: Lane, tag: int) -> None:
        self._rounds -= 1
        if self._rounds:
            self._ask()
        else:
            self._done.set_result(None)
