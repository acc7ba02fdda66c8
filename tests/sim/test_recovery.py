"""Whichever node is lost: every request ends with the tokens that it would have had, and every block is free again."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.families import VOCABULARY
from tests.sim.clusters import PEER_TIMEOUT_S, eventually, is_idle, make_config, new_cluster, simulate
from lamina.sim.world import World
from tests.sim.clusters import LINK

CONTEXT = 256
_random = random.Random(5)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(_random.randint(1, 60))] for _ in range(8)]


async def answers(cluster: SimCluster) -> list[list[int]]:
    async with cluster.client() as client:
        found = await asyncio.gather(
            *(client.generate(p, max_tokens=60, temperature=0.7 * (i % 2), seed=i) for i, p in enumerate(PROMPTS))
        )
    return [answer.tokens for answer in found]


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
            print(world.loop.time())
            if returns:
                cluster.check()
                await eventually(lambda: is_idle(cluster))
            return found

    with World(1, model=LINK, tracing=False, limit_s=60) as world:
        assert world.run(main(world)) == expected
