"""Memory nodes that are much too small for all that is asked at once: requests give way to each other, and all are
answered as if they had been alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.families import VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import generate, make_config, simulate

CONTEXT = 192


def test_requests_that_lost_their_space_are_answered_all_the_same(
    llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """Greedy and seeded, while others are cancelled; in the end every block is free on every node."""
    chosen = random.Random(5)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 30))] for _ in range(8)]
    seeded = {"max_tokens": 120, "temperature": 1.0, "seed": 3}
    pipeline = PipelineConfig(batches=2, max_batch=8, prefill_tokens=24)
    config = make_config(llama, memory=448 << 10, context=CONTEXT, pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            alone = await client.generate(prompts[0], **seeded)

            async def impatient(i: int) -> None:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate([i], max_tokens=150), 0.1 * chosen.random())

            impatients = [asyncio.create_task(impatient(i)) for i in range(4)]
            asked = [asyncio.create_task(client.generate(p, max_tokens=150 + i)) for i, p in enumerate(prompts)]
            together = await client.generate(prompts[0], **seeded)
            answers = await asyncio.gather(*asked)
            await asyncio.gather(*impatients)
            assert together.tokens == alone.tokens
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                assert len(answer.tokens) == 150 + i
                agreement.check(oracle, prompt, answer.tokens, f"request {i}")
            status = await client.status()
            assert status.preemptions > 0, status.kv_tokens_total

    simulate(config, work)


def test_memory_nodes_that_forget_at_different_times_share_what_all_still_have(
    llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """One has twice the memory of the other, so it finds prompts that the other has had to forget."""
    chosen = random.Random(6)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(100)] for _ in range(6)]
    config = make_config(llama, memory=(320 << 10, 640 << 10), context=CONTEXT)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            for i in (0, 1, 2, 3, 2, 0, 4, 3, 5, 4, 5, 1, 0):
                (answer,) = await generate(client, [prompts[i]], max_tokens=8)
                agreement.check(oracle, prompts[i], answer, f"prompt {i}")
            status = await client.status()
            assert 0 < status.shared_tokens < status.prompt_tokens

    simulate(config, work)
