"""With a seed, a request's tokens are its own: no batch mate, no preemption and no repetition changes them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.config import PipelineConfig
from tests import harness
from tests.families import FAMILIES, VOCABULARY

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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, checkpoint: Path, memory: int, pipeline: PipelineConfig
) -> AsyncIterator[lamina.Client]:
    """A client of a cluster with two memory nodes."""
    config = harness.write_config(
        folder,
        checkpoint,
        harness.free_ports(2),
        memory=memory,
        context=CONTEXT,
        pipeline=pipeline,
    )
    nodes = [harness.start_node(config, name) for name in ("m0", "m1", "c0")]
    with harness.running(*nodes):
        await harness.ready(config, nodes[-1])
        async with harness.client(config) as client:
            yield client
        assert nodes[-1].stop() == 0


@pytest.mark.parametrize("batches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_batch_changes_no_token(batches: int, checkpoint: Path, tmp_path: Path) -> None:
    """Alone, one after the other, and then all together among greedy ones, prompts in chunks."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=batches, max_batch=8, prefill_tokens=24)
        async with cluster(tmp_path, checkpoint, 8 << 20, pipeline) as client:
            alone = [(await client.generate(prompt, **settings(i))).tokens for i, prompt in enumerate(ASKED)]
            mates = [asyncio.create_task(client.generate([i], max_tokens=60)) for i in range(8 * batches - PROMPTS)]
            answers = await asyncio.gather(*(client.generate(p, **settings(i)) for i, p in enumerate(ASKED)))
            await asyncio.gather(*mates)
            assert [answer.tokens for answer in answers] == alone
            other = await client.generate(ASKED[0], **{**settings(0), "seed": 99})
            assert other.tokens != alone[0]

    asyncio.run(main())


@pytest.mark.parametrize("partition", ["heads", pytest.param("requests", marks=pytest.mark.slow)])
def test_preemption_changes_no_token(partition: str, checkpoint: Path, tmp_path: Path) -> None:
    """Of a request that loses its space to those of a higher priority, and goes on when they are answered."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition)
        async with cluster(tmp_path, checkpoint, 448 << 10, pipeline) as client:
            for i in range(len(SETTINGS)):
                own = {**settings(i), "max_tokens": 150}
                alone = await client.generate(ASKED[i], **own)
                before = (await client.status()).preemptions
                higher = (client.generate([9, j], max_tokens=180, priority=1) for j in range(2))
                together, *_ = await asyncio.gather(client.generate(ASKED[i], **own, share_prefix=False), *higher)
                assert (await client.status()).preemptions > before
                assert together.tokens == alone.tokens

    asyncio.run(main())
