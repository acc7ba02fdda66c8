"""What goes wrong while a cluster starts ends the start of every compute node, and each of them says why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from lamina.config import ClusterConfig, NodeConfig, PipelineConfig
from lamina.errors import NodeError
from lamina.runtime.spans import Place
from lamina.sim.cluster import NodeSeconds, SimCluster
from lamina.sim.empty import EmptyBackend
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from tests.sim.clusters import LINK, empty_model, make_config, new_cluster

BROKEN = "the device is out of memory"


def config_of(compute: int) -> ClusterConfig:
    return make_config(compute=(None,) * compute, memory_nodes=1, pipeline=PipelineConfig(batches=4))


def failing(node: str, operation: str) -> NodeSeconds:
    """A device of ``node`` whose operations of this name fail; all others take no time."""

    def seconds(config: NodeConfig) -> Callable[[str, Place | None], float]:
        def take(name: str, at: Place | None) -> float:
            if (config.name, name.lstrip("_")) == (node, operation):
                raise RuntimeError(BROKEN)
            return 0.0

        return take

    return seconds


def ended(config: ClusterConfig, seconds: NodeSeconds) -> dict[str, BaseException | None]:
    """How the nodes of a cluster have ended after ten virtual seconds."""

    async def main(world: World) -> dict[str, BaseException | None]:
        async with new_cluster(world, config, seconds=seconds) as cluster:
            await asyncio.sleep(10)
            return dict(cluster.ended)

    with World(1, model=LINK, tracing=False) as world:
        return world.run(main(world))


@pytest.mark.parametrize("operation", ["load", "stage_chunk"])
@pytest.mark.parametrize("compute", [1, 2])
def test_a_front_that_cannot_start_ends_with_its_own_failure(compute: int, operation: str) -> None:
    """Also where sending prompts fails while the costs are fitted. The other nodes wait for it to come back."""
    reason = f"compute node c0 failed: RuntimeError('{BROKEN}')"

    how = ended(config_of(compute), failing("c0", operation))

    assert isinstance(how["c0"], NodeError)
    assert str(how["c0"]) == reason
    assert list(how) == ["c0"]


@pytest.mark.parametrize("operation", ["load", "stage_chunk"])
def test_a_follower_that_cannot_start_tells_the_front_why(operation: str) -> None:
    """Whether its weights cannot be loaded, or the prompts of the fit cannot be sent."""
    reason = f"compute node c1 failed: RuntimeError('{BROKEN}')"

    how = ended(config_of(2), failing("c1", operation))

    assert str(how["c1"]) == reason
    assert str(how["c0"]) == f"compute node c1 gave up: {reason}"


def loading(node: NodeConfig) -> Callable[[str, Place | None], float]:
    """Weights take a second to load, on the follower two."""
    return lambda name, at: {"load": 2.0 if node.name == "c1" else 1.0}.get(name, 0.0)


@pytest.mark.parametrize("at_s", [0.1, 0.5, 1.5])
def test_the_front_blames_the_memory_node_that_is_lost_during_the_start(at_s: float) -> None:
    """And soon: it does not wait until weights are loaded. The other compute node waits for the front."""
    config = config_of(2)

    async def main(world: World) -> dict[str, BaseException | None]:
        world.network.set_model("c1", "m0", LinkModel(latency_s=0.05))
        async with new_cluster(world, config, seconds=loading) as cluster:
            await asyncio.sleep(at_s)
            cluster.kill("m0")
            await asyncio.sleep(1.1)
            return dict(cluster.ended)

    with World(1, model=LinkModel(latency_s=1e-3), tracing=False) as world:
        how = world.run(main(world))
    assert isinstance(how["c0"], NodeError)
    assert "memory node m0 was lost" in str(how["c0"])
    assert "c1" not in how


@pytest.mark.parametrize(("small", "bytes_per_token"), [(0, 768), (1, 768), (2, 512)])
def test_too_little_memory_is_told_of_the_node_that_has_it(small: int, bytes_per_token: int) -> None:
    """With its own bytes per token, where nodes have different numbers of heads: 3, 3 and 2."""
    sizes = [16 << 20] * 3
    sizes[small] = 64 << 10
    config = make_config(memory_nodes=3, memory=sizes)
    model = empty_model(config, kv_heads=8, context=100_000)

    async def main(world: World) -> BaseException | None:
        async with SimCluster(world, config, open_model=model, backend=EmptyBackend) as cluster:
            await asyncio.sleep(10)
            return cluster.ended["c0"]

    with World(1, model=LINK, tracing=False) as world:
        error = world.run(main(world))
    assert f"m{small} holds the least of this model's KV cache, 4096 tokens of {bytes_per_token} bytes" in str(error)
