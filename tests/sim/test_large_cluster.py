"""A cluster that no test machine could run in processes."""

from __future__ import annotations

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.sim.clusters import generate, make_config, simulate, statuses

COMPUTE, MEMORY = 8, 64
REQUESTS, TOKENS = 64, 6


@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
@pytest.mark.parametrize("ranges", [False, True], ids=["replicas", "ranges"])
def test_eight_compute_and_sixty_four_memory_nodes(partition: str, ranges: bool) -> None:
    """All of them take part, all requests are answered, and all blocks come back."""
    layers = 8
    pipeline = PipelineConfig(batches=COMPUTE, max_batch=8, prefill_tokens=16, partition=partition)
    compute = [range(i, i + 1) for i in range(COMPUTE)] if ranges else [None] * COMPUTE
    config = make_config(compute=compute, memory_nodes=MEMORY, memory=1 << 20, pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            answers = await generate(client, [[i % 60, 1, 2] for i in range(REQUESTS)], max_tokens=TOKENS)
        assert [len(tokens) for tokens in answers] == [TOKENS] * REQUESTS
        everyone = await statuses(cluster, [node.name for node in config.node])
        assert len(everyone) == COMPUTE + MEMORY
        idle = [status.name for status in everyone if status.layers == 0]
        # A striped sequence begins on its first node, and none of these is longer than a stripe.
        assert not idle, idle
        assert all(len(status.peers) == COMPUTE + MEMORY - 1 for status in everyone[:COMPUTE])

    simulate(config, work, layers=layers, context=64)
