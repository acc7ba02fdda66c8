"""The front is lost and does not come back: the next compute node takes its part, and clients go on there."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from lamina.client import Completion
from lamina.config import PipelineConfig, RecoveryConfig
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from tests.sim.clusters import JITTER, LINK, make_config, new_cluster, settled

EMPTY = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24)


def test_the_standby_takes_the_part_of_a_front_that_was_killed() -> None:
    config = make_config(compute=(None, None), pipeline=EMPTY)

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            async with cluster.client() as client:
                asked = [asyncio.create_task(client.generate([n], max_tokens=300)) for n in range(6)]
                await asyncio.sleep(0.02)
                cluster.kill("c0")
                answers = await asyncio.gather(*asked)
            assert [len(answer.tokens) for answer in answers] == [300] * 6
            assert (await cluster.status("c1")).front == "c1"

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))
