"""A front that starts again does without nodes that stay away; one that starts for the first time names them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import ConnectError
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.watch import ClusterWatch
from tests.families import VOCABULARY
from tests.sim.answers import answers_to
from tests.sim.clusters import LINK, eventually, is_idle, make_config, new_cluster, simulate

GRACE_S = 6.0
CONTEXT = 256
_random = random.Random(11)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(_random.randint(1, 60))] for _ in range(6)]


answers = partial(answers_to, prompts=PROMPTS)


async def states(cluster: SimCluster) -> dict[str, str]:
    return {member.name: member.state for member in (await cluster.status("c0")).members}


async def ready(cluster: SimCluster) -> None:
    """Wait until the front takes requests, with nodes that were killed and stay away."""

    async def is_ready() -> bool:
        return (await cluster.status("c0")).state == "ready"

    await eventually(is_ready)


def run(config: ClusterConfig, work: Callable[[SimCluster], Awaitable[None]]) -> None:
    """Do ``work`` with a cluster that is ready; in the end no block is in use, and no node ends with an error."""

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            await work(cluster)
            await eventually(lambda: is_idle(cluster))
            assert set((await cluster.stop_all()).values()) == {None}, cluster.ended

    with World(1, model=LINK, tracing=False, limit_s=300) as world:
        world.run(main(world))


@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
def test_the_front_comes_up_without_a_memory_node(partition: str, llama: Path) -> None:
    """Lost together with it, while requests run: they end with the tokens that they would have had. When the node is
    there at last it is taken in."""
    pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition)
    config = make_config(
        llama, memory=8 << 20, context=CONTEXT, pipeline=pipeline, recovery=RecoveryConfig(grace=GRACE_S)
    )
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        asked = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.016)
        cluster.kill("c0")
        cluster.kill("m1")
        await cluster.start("c0")
        await asyncio.sleep(GRACE_S - 1)
        waiting = await cluster.status("c0")
        assert (waiting.state, waiting.waiting_for) == ("waiting", "m1")
        await asyncio.sleep(2)
        await ready(cluster)
        assert await states(cluster) == {"c0": "serving", "m0": "serving", "m1": "lost"}
        async with ClusterWatch(config, name="watch", network=cluster.world.network) as watch:
            assert [view.word for view in await watch.look()] == ["ready", "ready", "lost"]
        assert await asked == expected
        await cluster.start("m1")

        async def is_whole() -> bool:
            return set((await states(cluster)).values()) == {"serving"}

        await eventually(is_whole)
        assert await answers(cluster) == expected

    run(config, work)


def test_the_front_comes_up_without_a_replica() -> None:
    """All processes were lost, and one has not been started again."""
    config = make_config(compute=(None, None), recovery=RecoveryConfig(grace=GRACE_S))

    async def work(cluster: SimCluster) -> None:
        for node in config.node:
            cluster.kill(node.name)
        for name in ("c0", "m0", "m1"):
            await cluster.start(name)
        await ready(cluster)
        assert (await states(cluster))["c1"] == "lost"
        await cluster.start("c1")
        await cluster.ready("c1")
        assert (await states(cluster))["c1"] == "serving"

    run(config, work)


def test_what_does_not_fit_waits_for_more_memory(llama: Path) -> None:
    """The node that is there cannot hold a whole context: the front comes up, and what is too long waits for the rest,
    as it would have without the new start."""
    pipeline = PipelineConfig(batches=2, max_batch=8, partition="heads")
    recovery = RecoveryConfig(grace=GRACE_S)
    config = make_config(llama, memory=320 << 10, context=CONTEXT, pipeline=pipeline, recovery=recovery)
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        cluster.kill("c0")
        cluster.kill("m1")
        await cluster.start("c0")
        await ready(cluster)
        asked = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(1)
        await cluster.start("m1")
        assert await asked == expected

    run(config, work)


def test_a_first_start_names_the_node_that_is_missing() -> None:
    """However many others are there; and so does one that has no journal to tell it of an earlier start."""
    for recovery in (RecoveryConfig(grace=1.0), RecoveryConfig(grace=1.0, journal="off")):
        config = make_config(memory_nodes=3, recovery=recovery, start_timeout=20.0)

        async def main(world: World, config: ClusterConfig = config) -> None:
            cluster = new_cluster(world, config)
            for name in ("c0", "m0", "m1"):
                await cluster.start(name)
            await asyncio.sleep(21)
            error = cluster.ended["c0"]
            assert isinstance(error, ConnectError)
            assert "memory node m2 could not be reached within 20 s" in str(error)
            assert set((await cluster.stop_all()).values()) == {error, None}

        with World(1, model=LINK, tracing=False) as world:
            world.run(main(world))


@pytest.mark.parametrize(
    ("compute", "gone", "reason"),
    [
        ((None,), ("m0", "m1"), "no memory node is there"),
        ((range(2), range(2, 4)), ("c1",), "nobody else has the layers of c1"),
        ((None, None), ("c1", "m0"), "c1 may be the front by now, with m0; take out of the cluster file what is gone"),
    ],
)
def test_a_front_waits_for_what_it_cannot_do_without(
    compute: tuple[range | None, ...], gone: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory, layers; and the only compute node that may be the front of a memory node that is missing. It ends with an
    error, and its next start comes up when they are there."""
    config = make_config(compute=compute, recovery=RecoveryConfig(grace=1.0), start_timeout=20.0)

    async def work(cluster: SimCluster) -> None:
        for name in ("c0", *gone):
            cluster.kill(name)
        await cluster.start("c0")
        await asyncio.sleep(19)
        assert cluster.is_running("c0")
        await asyncio.sleep(3)
        assert isinstance(error := cluster.ended["c0"], ConnectError)
        assert "within 20 s" in str(error)
        assert reason in str(error)
        await cluster.start("c0")
        for name in gone:
            await cluster.start(name)
        await cluster.ready()

    with caplog.at_level("WARNING", "lamina"):
        run(config, work)
    assert "event=not_starting_without" in caplog.text


def test_there_is_no_second_front_behind_a_cut() -> None:
    """The standby serves with one memory node. The earlier front reaches only the other one, which is free: it waits,
    as it does not know of the standby, and follows it when it does."""
    config = make_config(
        compute=(None, None), pipeline=PipelineConfig(partition="requests"), recovery=RecoveryConfig(grace=1.0)
    )

    async def work(cluster: SimCluster) -> None:
        network = cluster.world.network
        cluster.kill("m0")
        await asyncio.sleep(2)
        cluster.kill("c0")
        await eventually(lambda: leads(cluster, "c1"), 20)
        for ends in (("c0", "c1"), ("c0", "m1"), ("c1", "m0")):
            network.cut(*ends)
        await cluster.start("m0")
        await cluster.start("c0")
        for _ in range(50):
            await asyncio.sleep(0.5)
            assert not await leads(cluster, "c0")
            assert await leads(cluster, "c1")
        for ends in (("c0", "c1"), ("c0", "m1"), ("c1", "m0")):
            network.mend(*ends)
        await cluster.ready("c0")
        assert (await cluster.status("c0")).front == "c1"
        await cluster.stop("c1")  # the first node of the file has the part again
        await eventually(lambda: leads(cluster, "c0"), 20)

    run(config, work)


async def leads(cluster: SimCluster, name: str) -> bool:
    status = await cluster.status(name)
    return status.front == name and status.state == "ready"
