"""The keys and values of prompts on their way from the compute node to the memory nodes."""

from __future__ import annotations

import asyncio

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from lamina.sim.link import LinkModel
from tests.sim.clusters import make_config, simulate

SLOW = LinkModel(latency_s=1e-5, bytes_per_s=1e6)
"""A link that takes about 0.1 s for a prompt of 400 tokens of the empty model: 256 bytes each."""


def test_prompts_of_requests_that_are_over_delay_no_other() -> None:
    """Ten requests end with their first token, a second of sending behind; what is left of them is not sent."""

    async def work(cluster: SimCluster) -> float:
        loop = asyncio.get_running_loop()
        async with cluster.client() as client:
            for token in range(10):
                await client.generate([token] * 400, max_tokens=1, share_prefix=False)
            begun_s = loop.time()
            await client.generate([1] * 10, max_tokens=2)
            return loop.time() - begun_s

    pipeline = PipelineConfig(batches=1, prefill_tokens=400, max_batch=8)
    config = make_config(memory_nodes=1, pipeline=pipeline)

    assert simulate(config, work, link=SLOW) < 0.2
