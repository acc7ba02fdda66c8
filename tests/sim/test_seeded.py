"""With a seed, a request's tokens are its own: no batch mate, no preemption and no repetition changes them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.families import VOCABULARY
from tests.sim.clusters import make_config, simulate

CONTEXT = 192
PROMPTS = 7
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
]

_random = random.Random(8)
ASKED = [[_random.randrange(VOCABULARY) for _ in range(_random.randint(1, 40))] for _ in range(PROMPTS)]


def settings(i: int) -> dict[str, Any]:
    return {**SETTINGS[i % len(SETTINGS)], "seed": i // 2, "max_tokens": 60}


@pytest.mark.parametrize("batches", [1, 2])
def test_a_full_batch_changes_no_token(batches: int, llama: Path) -> None:
    """Alone, one after the other, and then all together among greedy ones, prompts in chunks."""
    pipeline = PipelineConfig(batches=batches, max_batch=8, prefill_tokens=24)
    config = make_config(llama, memory=8 << 20, context=CONTEXT, pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            alone = [(await client.generate(prompt, **settings(i))).tokens for i, prompt in enumerate(ASKED)]
            mates = [asyncio.create_task(client.generate([i], max_tokens=60)) for i in range(8 * batches - PROMPTS)]
            answers = await asyncio.gather(*(client.generate(p, **settings(i)) for i, p in enumerate(ASKED)))
            await asyncio.gather(*mates)
            assert [answer.tokens for answer in answers] == alone
            other = await client.generate(ASKED[0], **{**settings(0), "seed": 99})
            assert other.tokens != alone[0]

    simulate(config, work)


@pytest.mark.parametrize("partition", [pytest.param("heads", marks=pytest.mark.slow), "requests"])
def test_preemption_changes_no_token(partition: str, llama: Path) -> None:
    """A request loses its space to those of a higher priority, and goes on when they are answered."""
    pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition)
    config = make_config(llama, memory=448 << 10, context=CONTEXT, pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            for i in range(len(SETTINGS)):
                own = {**settings(i), "max_tokens": 150}
                alone = await client.generate(ASKED[i], **own)
                before = (await client.status()).preemptions
                higher = (client.generate([9, j], max_tokens=180, priority=1) for j in range(2))
                together, *_ = await asyncio.gather(client.generate(ASKED[i], **own, share_prefix=False), *higher)
                assert (await client.status()).preemptions > before
                assert together.tokens == alone.tokens

    simulate(config, work)


def test_without_a_seed_chance_is_the_hosts(llama: Path) -> None:
    """Two requests without a seed differ, and a second run of the same world gives both again."""
    config = make_config(llama, context=CONTEXT)

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return [(await client.generate([1, 2], max_tokens=20, temperature=1.0)).tokens for _ in range(2)]

    first, again, other = (simulate(config, work, seed=seed) for seed in (1, 1, 2))
    assert first[0] != first[1]
    assert first == again
    assert first != other
