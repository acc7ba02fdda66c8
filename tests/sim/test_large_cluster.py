"""A cluster that no test machine could run in processes."""

from __future__ import annotations

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.sim.clusters import generate, make_config, simulate, statuses

COMPUTE, MEMORY = 8, 64
REQUESTS, TOKENS = 64, 3


@pytest.mark.parametrize(
    ("partition", "layers", "compute"),
    [
        ("heads", 2, [None] * COMPUTE),
        ("requests", 2, [None] * COMPUTE),
        ("tokens", 2, [None] * COMPUTE),
        ("requests", COMPUTE, [range(i, i + 1) for i in range(COMPUTE)]),
        pytest.param("heads", COMPUTE, [range(i, i + 1) for i in range(COMPUTE)], marks=pytest.mark.slow),
    ],
    ids=["heads", "requests", "tokens", "requests-ranges", "heads-ranges"],
)
def test_eight_compute_and_sixty_four_memory_nodes(partition: str, layers: int, compute: list[range | None]) -> None:
    """All of them take part, all requests are answered, and all blocks come back."""
    pipeline = PipelineConfig(batches=COMPUTE, max_batch=8, prefill_tokens=4, max_waiting=REQUESTS, partition=partition)
    config = make_config(compute=compute, memory_nodes=MEMORY, memory=1 << 18, pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            answers = await generate(client, [[i % 60, 1, 2] for i in range(REQUESTS)], max_tokens=TOKENS)
        assert [len(tokens) for tokens in answers] == [TOKENS] * REQUESTS
        everyone = await statuses(cluster, [node.name for node in config.node])
        assert len(everyone) == COMPUTE + MEMORY
        assert not [status.name for status in everyone if status.layers == 0]
        assert all(len(status.peers) == COMPUTE + MEMORY - 1 for status in everyone[:COMPUTE])

    simulate(config, work, layers=layers, context=64)
