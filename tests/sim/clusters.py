"""Simulated clusters for tests: the real nodes on a virtual clock, with empty models or with tiny ones that compute."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from lamina.attention import BackendFactory, LayerShape
from lamina.client import AsyncClient, Completion
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    PipelineConfig,
    RecoveryConfig,
    TransportConfig,
)
from lamina.node.model import ModelFacts, ModelSource, OpenModel, open_checkpoint
from lamina.runtime.spans import Place
from lamina.sim.cluster import NodeSeconds, SimCluster
from lamina.sim.empty import EmptyBackend, EmptyModel
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from lamina.transport import Address
from lamina.wire.admin import Status

T = TypeVar("T")

Work = Callable[[SimCluster], Awaitable[T]]
"""What a test does with a cluster that is ready."""

LINK = LinkModel(latency_s=1e-5, bytes_per_s=1e10)
JITTER = LinkModel(latency_s=1e-5, bytes_per_s=1e9, jitter_s=2e-4)
WINDOWS = LinkModel(latency_s=1e-5, bytes_per_s=1e10, windows=True)
"""A link whose regions are computed into where they lie, as over shared memory."""
SECONDS = {"head": 1e-4, "tail": 1e-4, "past": 1e-4, "finish": 1e-5}
"""Virtual seconds that operations take; all others take none."""
PEER_TIMEOUT_S = 4.0
BLOCK_TOKENS = 16
EMPTY_VOCABULARY = 64


def seconds(node: NodeConfig) -> Callable[[str, Place | None], float]:
    """Every device takes as long as ``SECONDS`` says."""
    return lambda name, at: SECONDS.get(name.lstrip("_"), 0.0)


def make_config(
    model: Path | str = "empty",
    *,
    compute: Sequence[range | None] = (None,),
    memory_nodes: int = 2,
    memory: int | Sequence[int] = 16 << 20,
    quota: int | None = None,
    pipeline: PipelineConfig | None = None,
    recovery: RecoveryConfig | None = None,
    dtype: Dtype = "float32",
    start_timeout: float = 60.0,
    **model_keys: Any,
) -> ClusterConfig:
    """A cluster of compute nodes ``c0``, ``c1``, ... and memory nodes ``m0``, ``m1``, ...

    ``compute`` has the layers of each compute node; None: all of them. ``memory`` may differ from node to node.
    """
    sizes = [memory] * memory_nodes if isinstance(memory, int) else memory
    nodes: list[NodeConfig] = [
        ComputeNodeConfig(name=f"c{i}", address=Address("tcp", "127.0.0.1", 7000 + i), layers=layers)
        for i, layers in enumerate(compute)
    ]
    nodes += [
        MemoryNodeConfig(name=f"m{i}", address=Address("tcp", "127.0.0.1", 8000 + i), memory=nbytes, quota=quota)
        for i, nbytes in enumerate(sizes)
    ]
    transport = TransportConfig(peer_timeout=PEER_TIMEOUT_S, start_timeout=start_timeout)
    return ClusterConfig(
        model=ModelConfig(path=str(model), dtype=dtype, compile=False, **model_keys),
        node=nodes,
        pipeline=pipeline or PipelineConfig(),
        recovery=recovery or RecoveryConfig(),
        transport=transport,
        file=Path("cluster.toml"),
        links=transport.options(Path()),
    )


@cache
def _open_once(path: Path, dtype: Dtype) -> ModelSource:
    return open_checkpoint(make_config(path, dtype=dtype))


def open_real(config: ClusterConfig) -> ModelSource:
    """The checkpoint of a file. It is captured and cut once in a test run, which takes longer than most tests; its
    weights are loaded by every node."""
    return _open_once(config.model_path, config.model.dtype or "float32")


def empty_model(
    config: ClusterConfig,
    *,
    layers: int = 4,
    kv_heads: int | None = None,
    context: int = 512,
    vocabulary: int = EMPTY_VOCABULARY,
) -> OpenModel:
    """A model that computes nothing, for a cluster of this file. Its answers consist of token 0."""
    heads = kv_heads or len(config.memory_nodes)
    shape = LayerShape(q_heads=heads, kv_heads=heads, qk_dim=8, v_dim=8, scale=1.0)
    facts = ModelFacts(
        path=Path("/nonexistent"),
        fingerprint="empty",
        dtype="float32",
        layers=(shape,) * layers,
        max_context=context,
        vocabulary=vocabulary,
        stop_tokens=frozenset(),
    )
    rows = config.pipeline.max_batch + 64 + config.pipeline.prefill_tokens
    return lambda _: EmptyModel(facts, rows=rows)


def new_cluster(world: World, config: ClusterConfig, *, seconds: NodeSeconds = seconds, **model: int) -> SimCluster:
    """The cluster of a file in a world: with the checkpoint that the file names, or with empty backends and models, as
    `empty_model` makes them."""
    if config.model.path != "empty":
        return SimCluster(world, config, open_model=open_real, seconds=seconds)
    backend: BackendFactory = EmptyBackend
    open_model = empty_model(config, **model)
    return SimCluster(world, config, open_model=open_model, backend=backend, seconds=seconds)


def simulate(
    config: ClusterConfig,
    work: Work[T],
    *,
    seed: int = 1,
    link: LinkModel = LINK,
    **model: int,
) -> T:
    """Start a cluster, do ``work`` when it is ready, see that every block is free again, and stop it in order.

    A node that ends with an error fails the test, and so does anything that waits for ever.
    """

    async def main(world: World) -> T:
        async with new_cluster(world, config, **model) as cluster:
            await cluster.ready()
            result = await work(cluster)
            cluster.check()
            await settled(cluster)
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended
            return result

    with World(seed, model=link, tracing=False) as world:
        return world.run(main(world))


def simulate_memory(
    work: Work[T],
    *,
    memory: int | Sequence[int] = 1 << 20,
    link: LinkModel = LINK,
    seconds: NodeSeconds = seconds,
    nodes: int = 1,
) -> T:
    """Start the memory nodes m0, m1, ..., do ``work``, see that no tenant is left, and stop in order those that were
    not killed."""
    config = make_config(memory_nodes=nodes, memory=memory)

    async def main(world: World) -> T:
        cluster = SimCluster(world, config, open_model=open_real, seconds=seconds)
        names = [node.name for node in config.memory_nodes]
        for name in names:
            await cluster.start(name)
        result = await work(cluster)
        for name in names:
            if name not in cluster.ended:
                await eventually(partial(has_no_tenant, cluster, name))
        ended = await cluster.stop_all()
        assert all(ended[name] is None or isinstance(ended[name], asyncio.CancelledError) for name in names), ended
        return result

    with World(1, model=link, tracing=False) as world:
        return world.run(main(world))


async def has_no_tenant(cluster: SimCluster, name: str = "m0") -> bool:
    """Whether no compute node is attached to a memory node."""
    return not (await cluster.status(name)).tenants


async def statuses(cluster: SimCluster, names: Iterable[str] | None = None) -> list[Status]:
    """What nodes say of themselves; by default all that keep account of blocks: the front and the memory nodes."""
    front, memory = cluster.config.front.name, [node.name for node in cluster.config.memory_nodes]
    return [await cluster.status(name) for name in names or [front, *memory]]


async def is_idle(cluster: SimCluster) -> bool:
    """Whether no block is in use on any node."""
    return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in await statuses(cluster))


async def settled(cluster: SimCluster) -> None:
    """Wait until no block is in use on any node."""
    await eventually(lambda: is_idle(cluster))


async def eventually(condition: Callable[[], Awaitable[object]], timeout_s: float = 10.0) -> None:
    """Wait until the coroutine function ``condition`` returns something true, for so many virtual seconds."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not await condition():
        assert loop.time() < deadline_s, f"not within {timeout_s} virtual seconds"
        await asyncio.sleep(0.01)


async def generate(client: AsyncClient, prompts: Iterable[Sequence[int]], **settings: Any) -> list[list[int]]:
    """Answers to prompts that are asked at the same time."""
    answers: list[Completion] = await asyncio.gather(*(client.generate(p, **settings) for p in prompts))
    return [answer.tokens for answer in answers]


def whole_blocks(tokens: int) -> int:
    """Tokens of the blocks that hold ``tokens``."""
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS
