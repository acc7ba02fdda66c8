"""The front is lost and does not come back: the next compute node takes its part, and clients go on there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lamina.config import PipelineConfig, RecoveryConfig
from lamina.errors import SupersededError
from lamina.node.compute import ComputeNode
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from tests.sim.asked import PIPELINE, Answer, ask_all, check, save_model
from tests.sim.clusters import JITTER, eventually, make_config, new_cluster, simulate

GRACE_S = 1.0
EMPTY = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24)
LAYOUTS: dict[str, tuple[range | None, ...]] = {
    "two": (None, None),
    "three": (None, None, None),
    "ranges": (range(2), range(2, 4)),
}
SEEDS, SLOW_SEEDS = range(12), range(12, 200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, which can chat."""
    return save_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, list[Answer]]:
    """What a run without losses gives."""
    return simulate(make_config(model, memory=4 << 20, pipeline=PIPELINE), lambda cluster: ask_all(cluster, Random(0)))


async def fronts(cluster: SimCluster) -> list[str]:
    """The compute nodes that answer clients now."""
    found = []
    for node in cluster.config.compute_nodes:
        serving = cluster.nodes.get(node.name)
        if not (cluster.is_running(node.name) and isinstance(serving, ComputeNode)):
            continue
        if serving._leads and serving._front is not None and not serving._superseded.done():
            found.append(node.name)
    return found


async def front_of(cluster: SimCluster, timeout_s: float = 60.0) -> str:
    """Wait until one node is the front; its name."""

    async def there_is_one() -> bool:
        return len(await fronts(cluster)) == 1

    await eventually(there_is_one, timeout_s)
    return (await fronts(cluster))[0]


async def settled(cluster: SimCluster) -> None:
    """Wait until no block is in use on any node, nor any request kept."""

    async def is_idle() -> bool:
        names = [await front_of(cluster), *(n.name for n in cluster.config.memory_nodes)]
        told = [await cluster.status(name) for name in names]
        return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in told)

    await eventually(is_idle)


async def stop(cluster: SimCluster) -> None:
    """Stop all nodes; none may have ended with an error, but for a front that another one has superseded."""
    for name, error in (await cluster.stop_all()).items():
        assert error is None or isinstance(error, SupersededError | asyncio.CancelledError), (name, error)


# -- at any moment


def run_with_losses(model: Path, seed: int) -> tuple[dict[str, list[Answer]], bool]:
    """All answers of a run in which fronts are killed at random moments, and whether requests may be missing."""
    chance = Random(f"failover {seed}")
    layout = chance.choice(list(LAYOUTS))
    journal: Any = chance.choice(("off", "process", "machine"))
    partition: Any = chance.choice(("heads", "requests", "tokens"))
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=64, partition=partition)
    config = make_config(
        model,
        compute=LAYOUTS[layout],
        memory=4 << 20,
        pipeline=pipeline,
        recovery=RecoveryConfig(journal=journal, grace=GRACE_S),
    )
    losses = chance.choice((1, 1, 2))

    async def main(world: World) -> dict[str, list[Answer]]:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asking = asyncio.create_task(ask_all(cluster, chance, is_lossy=journal == "off"))
            for _ in range(losses):
                await asyncio.sleep(0.12 * chance.random())
                lost = await front_of(cluster)
                cluster.kill(lost)
                # Before its standby acts, while that begins, or when it has.
                await asyncio.sleep(chance.choice((0.0, 0.5, 1.0, 1.001, 1.1, 1.3, 3.0)) * GRACE_S)
                if layout == "ranges" or chance.random() < 0.6:
                    await cluster.start(lost)
                if chance.random() < 0.7:
                    await front_of(cluster)
            found = await asking
            await settled(cluster)
            await stop(cluster)
            return found

    with World(seed, model=JITTER, tracing=False) as world:
        return world.run(main(world)), journal == "off"


@pytest.mark.parametrize(
    "seeds", [SEEDS, pytest.param(SLOW_SEEDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_front_that_is_lost_at_any_moment_loses_no_token(
    seeds: range, model: Path, undisturbed: dict[str, list[Answer]]
) -> None:
    """Whether it comes back or not, and when: each client gets every token once, and the same texts, scores and ends.
    Without a journal, a request that has begun may be lost, with an error."""
    for seed in seeds:
        found, is_lossy = run_with_losses(model, seed)
        expected = {name: undisturbed[name] for name in found} if is_lossy else undisturbed
        check(found, expected, f"seed {seed}")
