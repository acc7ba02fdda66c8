"""Several compute nodes: which part each of them runs, what they must agree on, and what happens when one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, NodeConfig, PipelineConfig
from lamina.errors import ConfigError, ConnectError, LaminaError, NodeError
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Hello
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import LINK, generate, make_config, new_cluster, simulate, statuses

LAYERS = 4
RANGES = (range(2), range(2, 4))
REPLICAS = (None, None)
PROMPTS = [[token, *range(10, 80)] for token in range(8)]


def config_of(
    model: Path | str, compute: tuple[range | None, ...], *, batches: int = 2, max_batch: int = 4, **more: float
) -> ClusterConfig:
    pipeline = PipelineConfig(batches=batches, max_batch=max_batch, prefill_tokens=32)
    return make_config(model, compute=compute, memory_nodes=1, pipeline=pipeline, **more)


@pytest.mark.parametrize(
    ("compute", "batches"),
    [(RANGES, 2), (REPLICAS, 3), (REPLICAS, 4)],
    ids=["ranges", "replicas in rotation", "replicas"],
)
def test_each_node_runs_its_part(
    compute: tuple[range | None, ...], batches: int, llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """Their counters show it; seeded answers are those of a single node, and greedy ones of ``transformers``."""

    def run(compute: tuple[range | None, ...], temperature: float) -> tuple[list[list[int]], list[int]]:
        config = config_of(llama, compute, batches=batches)

        async def work(cluster: SimCluster) -> tuple[list[list[int]], list[int]]:
            async with cluster.client() as client:
                answers = await generate(client, PROMPTS, max_tokens=12, temperature=temperature, seed=5)
            nodes = await statuses(cluster, [node.name for node in config.compute_nodes])
            names = {node.name for node in config.node}
            assert all({peer.name for peer in status.peers} == names - {status.name} for status in nodes)
            return answers, [status.layers for status in nodes]

        return simulate(config, work)

    greedy, layers = run(compute, 0.0)
    drawn, _ = run(compute, 1.0)
    alone, _ = run((None,), 1.0)

    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        agreement.check(oracle, prompt, answer, f"compute nodes {compute}")
    assert drawn == alone
    assert drawn != greedy
    assert all(layers)
    if compute == RANGES:
        assert layers[0] == layers[1]  # of each step half of its layers
    assert sum(layers) % LAYERS == 0


def ends(
    config: ClusterConfig, start: dict[str, ClusterConfig], wait_s: float = 10.0, kill: str | None = None
) -> dict[str, BaseException | None]:
    """How compute nodes end that are started with files of their own, beside the memory node of ``config``.

    If ``kill`` names one, it is killed when the cluster is ready.
    """

    async def main(world: World) -> dict[str, BaseException | None]:
        memory = new_cluster(world, config)
        await memory.start("m0")
        clusters = {name: new_cluster(world, own) for name, own in start.items()}
        for name, cluster in clusters.items():
            await cluster.start(name)
        if kill is not None:
            await clusters[kill].ready()
            clusters[kill].kill(kill)
        await asyncio.sleep(wait_s)
        assert all(name in cluster.ended for name, cluster in clusters.items())
        assert await memory.stop_all() == {"m0": None}
        return {name: cluster.ended[name] for name, cluster in clusters.items()}

    with World(1, model=LINK, tracing=False) as world:
        return world.run(main(world))


@pytest.mark.parametrize("operation", ["head", "stage_chunk"])
@pytest.mark.parametrize("node", ["c0", "c1"])
def test_a_failure_in_a_step_ends_its_node_alone(node: str, operation: str) -> None:
    """In the slices of a step, and in sending prompts. It says why; where it was the front, the clients are told."""
    broken = False

    def seconds(config: NodeConfig) -> Callable[[str, Place | None], float]:
        def take(name: str, at: Place | None) -> float:
            if broken and (config.name, name.lstrip("_")) == (node, operation):
                raise RuntimeError("the device is out of memory")
            return 1e-5

        return take

    config = config_of("empty", REPLICAS, batches=3)

    async def main(world: World) -> tuple[dict[str, BaseException | None], object]:
        nonlocal broken
        async with new_cluster(world, config, seconds=seconds) as cluster, cluster.client() as client:
            await cluster.ready()
            broken = True
            asked = generate(client, [[token] * 70 for token in range(8)], max_tokens=300)
            (told,) = await asyncio.gather(asked, return_exceptions=True)
            await asyncio.sleep(10)
            return dict(cluster.ended), told

    with World(1, model=LINK, tracing=False) as world:
        ended, told = world.run(main(world))
    assert list(ended) == [node]
    assert isinstance(ended[node], NodeError)
    assert str(ended[node]) == f"compute node {node} failed: RuntimeError('the device is out of memory')"
    if node == "c0":
        assert str(told) == str(ended["c0"])
    else:
        assert told == [[0] * 300] * 8


def test_files_that_differ_are_refused() -> None:
    """With the key and both values, on either node."""
    config = config_of("empty", RANGES)
    other = config_of("empty", RANGES, max_batch=5)
    ended = ends(config, {"c0": config, "c1": other})
    assert all(isinstance(error, ConfigError) for error in ended.values())
    assert "pipeline.max_batch: 4 here, but 5 on c1" in str(ended["c0"])
    assert "pipeline.max_batch: 5 here, but 4 on c0" in str(ended["c1"])


@pytest.mark.parametrize(("ranges", "end"), [((range(2), range(2, 5)), 4), ((range(2), range(2, 3)), 2)])
def test_layers_that_the_model_has_not_are_refused(ranges: tuple[range, ...], end: int) -> None:
    """And so are those that no node would run."""
    config = config_of("empty", ranges)
    message = f"c1: layers: the last compute node ends with layer {end}, the model with layer 3"
    for error in ends(config, {"c0": config, "c1": config}).values():
        assert isinstance(error, LaminaError)
        assert message in str(error)


@pytest.mark.parametrize(("missing", "there"), [("c1", "c0"), ("c0", "c1")])
def test_a_compute_node_that_does_not_come_is_named(missing: str, there: str) -> None:
    """After ``start_timeout``; meanwhile the status says which node is waited for."""
    config = config_of("empty", REPLICAS, start_timeout=2.0)

    async def main(world: World) -> None:
        cluster = new_cluster(world, config)
        for name in ("m0", there):
            await cluster.start(name)
        await asyncio.sleep(1.9)
        assert (await cluster.status(there)).waiting_for == missing
        assert there not in cluster.ended
        await asyncio.sleep(0.2)
        error = cluster.ended[there]
        assert isinstance(error, ConnectError)
        assert f"compute node {missing}" in str(error)
        await cluster.stop_all()

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


@pytest.mark.parametrize("name", ["c1", "c9"])
def test_a_compute_node_that_is_not_expected_is_sent_away(name: str) -> None:
    """A second one of a name, and one that the file does not name; the cluster goes on."""
    config = config_of("empty", REPLICAS)

    async def work(cluster: SimCluster) -> None:
        network, options = cluster.world.network, config.options(config.front)
        link = await network.connect(config.front.address, Hello("compute", name), options, deadline_s=1)
        lost: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        link.deliver(on_lost=lost.set_result)
        await lost
        async with cluster.client() as client:
            assert [len(tokens) for tokens in await generate(client, [[1]] * 4, max_tokens=9)] == [9] * 4

    simulate(config, work)
