"""Whichever node is lost: every request ends with the tokens that it would have had, and every block is free again."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from functools import partial
from pathlib import Path

import pytest

from lamina.config import PipelineConfig, RecoveryConfig
from lamina.errors import NodeError
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from tests.families import VOCABULARY
from tests.sim.answers import answers_to
from tests.sim.clusters import (
    LINK,
    PEER_TIMEOUT_S,
    eventually,
    generate,
    is_idle,
    make_config,
    new_cluster,
    simulate,
)

CONTEXT = 256
_random = random.Random(5)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(_random.randint(1, 60))] for _ in range(8)]


answers = partial(answers_to, prompts=PROMPTS)


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_memory_node_is_killed(partition: str, batches: int, returns: bool, llama: Path) -> None:
    """Sixteen milliseconds into the answers, and started again a second later, or never."""
    pipeline = PipelineConfig(batches=batches, max_batch=8, partition=partition)
    config = make_config(llama, memory=8 << 20, context=CONTEXT, pipeline=pipeline)
    expected = simulate(config, answers)

    async def main(world: World) -> list[list[int]]:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asked = asyncio.ensure_future(answers(cluster))
            await asyncio.sleep(0.016)
            cluster.kill("m1")
            if returns:
                await asyncio.sleep(1.0)
                await cluster.start("m1")
            found = await asked
            if returns:
                cluster.check()
                await eventually(lambda: is_idle(cluster))
            return found

    with World(1, model=LINK, tracing=False, limit_s=60) as world:
        assert world.run(main(world)) == expected


COMPUTE = {
    "replicas": ((None,) * 3, True),
    "replicas, one for good": ((None,) * 3, False),
    "ranges": ((range(2), range(2, 4)), True),
}


@pytest.mark.parametrize("partition", ["heads", "requests"])
@pytest.mark.parametrize("kind", COMPUTE)
def test_a_compute_node_is_killed(kind: str, partition: str, llama: Path) -> None:
    """The others take over at once; where it alone has its layers, all wait for it. Keys and values stay."""
    compute, returns = COMPUTE[kind]
    pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition, prefill_tokens=24)
    config = make_config(llama, compute=compute, memory=8 << 20, context=CONTEXT, pipeline=pipeline)
    expected = simulate(config, answers)

    async def main(world: World) -> list[list[int]]:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asked = asyncio.ensure_future(answers(cluster))
            await asyncio.sleep(0.02)
            cluster.kill("c1")
            await asyncio.sleep(0.5)
            if returns:
                await cluster.start("c1")
            found = await asked
            await eventually(lambda: is_idle(cluster))
            assert (await cluster.status("c0")).preemptions == 0
            return found

    with World(1, model=LINK, tracing=False, limit_s=60) as world:
        assert world.run(main(world)) == expected


@pytest.mark.parametrize("partition", ["heads", "requests"])
@pytest.mark.parametrize("kind", COMPUTE)
def test_the_front_starts_again(kind: str, partition: str, llama: Path) -> None:
    """The other nodes have kept their weights and wait for it, and so do the streams of clients."""
    compute, _ = COMPUTE[kind]
    pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition, prefill_tokens=24)
    config = make_config(llama, compute=compute, memory=8 << 20, context=CONTEXT, pipeline=pipeline)
    expected = simulate(config, answers)

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asked = asyncio.ensure_future(answers(cluster))
            await asyncio.sleep(0.02)
            cluster.kill("c0")
            await asyncio.sleep(0.5)
            await cluster.start("c0")
            await cluster.ready()
            assert await asked == expected
            assert await answers(cluster) == expected
            await eventually(lambda: is_idle(cluster))
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended

    with World(1, model=LINK, tracing=False, limit_s=60) as world:
        world.run(main(world))


def test_lost_nodes_leave_no_memory_behind() -> None:
    """The regions of links to nodes that were lost are free on the nodes that go on, without the garbage collector."""
    # A node that is killed is a task here: the tracebacks of one that moves blocks would keep its own memory.
    pipeline = PipelineConfig(batches=2, partition="requests", moves=False)
    config = make_config(compute=(None, None), pipeline=pipeline)

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster, cluster.client() as client:
            await cluster.ready()
            counts = []
            for turn in range(6):
                asked = asyncio.ensure_future(generate(client, [[1] * 20] * 8, max_tokens=200))
                await asyncio.sleep(0.02)
                for name in ("m1", "c1"):
                    cluster.kill(name)
                    await asyncio.sleep(0.01)
                    await cluster.start(name)
                assert await asked == [[0] * 200] * 8
                await asyncio.sleep(20)
                counts.append(len(os.listdir("/proc/self/fd")))
                if not turn:
                    gc.collect()
                    gc.disable()
            assert counts[2:] == [counts[2]] * 4

    try:
        with World(1, model=LINK, tracing=False) as world:
            world.run(main(world))
    finally:
        gc.enable()


def test_layers_that_stay_away_are_not_waited_for_for_ever(llama: Path) -> None:
    """After the lease, requests fail with what is missing, and later ones at once; all is well when it is back."""
    compute, recovery = (range(2), range(2, 4)), RecoveryConfig(grace=1.0, lease=5.0)
    config = make_config(llama, compute=compute, memory=8 << 20, context=CONTEXT, recovery=recovery)
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        asked = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        cluster.kill("c1")
        loop = asyncio.get_running_loop()
        killed_s = loop.time()
        with pytest.raises(NodeError, match=r"nothing could be computed for 5 s, .*c1 lost"):
            await asked
        assert loop.time() - killed_s < PEER_TIMEOUT_S + 5.1
        with pytest.raises(NodeError, match="c1 lost"):
            await answers(cluster)
        assert loop.time() - killed_s < PEER_TIMEOUT_S + 5.2
        await cluster.start("c1")
        await eventually(lambda: is_whole(cluster))
        assert await answers(cluster) == expected

    simulate(config, work)


async def is_whole(cluster: SimCluster) -> bool:
    """Whether all members serve."""
    return all(member.state == "serving" for member in (await cluster.status("c0")).members)
