"""Memory nodes that are much too small for all that is asked at once: requests give way to each other, and all are
answered as if they had been alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig, PipelineConfig
from tests import harness
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle

CONTEXT = 192


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    config = harness.write_config(
        tmp_path_factory.mktemp("cluster"),
        checkpoint,
        harness.free_ports(2),
        memory=448 << 10,
        context=CONTEXT,
        pipeline=PipelineConfig(batches=2, max_batch=8, prefill_tokens=24),
    )
    nodes = [harness.start_node(config, name) for name in ("m0", "m1", "c0")]
    with harness.running(*nodes):
        asyncio.run(harness.ready(config, nodes[2]))
        yield config
        assert nodes[2].stop() == 0


def test_requests_that_lost_their_space_are_answered_all_the_same(
    cluster: ClusterConfig, checkpoint: Path, agreement: Agreement
) -> None:
    """Greedy and seeded, while others are cancelled; in the end every block is free on every node."""
    chosen, oracle = random.Random(5), Oracle(checkpoint)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 30))] for _ in range(8)]
    seeded = {"max_tokens": 120, "temperature": 1.0, "seed": 3}

    async def main() -> None:
        async with harness.client(cluster) as client:
            alone = await client.generate(prompts[0], **seeded)

            async def impatient(i: int) -> None:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate([i], max_tokens=150), chosen.random() / 2)

            impatients = [asyncio.create_task(impatient(i)) for i in range(4)]
            asked = [asyncio.create_task(client.generate(p, max_tokens=150 + i)) for i, p in enumerate(prompts)]
            together = await client.generate(prompts[0], **seeded)
            answers = await asyncio.gather(*asked)
            await asyncio.gather(*impatients)
            assert together.tokens == alone.tokens
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                assert len(answer.tokens) == 150 + i
                await asyncio.to_thread(agreement.check, oracle, prompt, answer.tokens, f"request {i}")
            status = await client.status()
            assert status.preemptions > 0, status.kv_tokens_total

            async def idle() -> bool:
                nodes = [await client.status(), *[await harness.status_of(cluster, n) for n in cluster.memory_nodes]]
                return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in nodes)

            await harness.eventually(idle)

    asyncio.run(main())


def test_memory_nodes_that_forget_at_different_times_share_what_all_still_have(
    checkpoint: Path, agreement: Agreement, tmp_path: Path
) -> None:
    """One has twice the memory of the other, so it finds prompts that the other has had to forget."""
    chosen, oracle = random.Random(6), Oracle(checkpoint)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(100)] for _ in range(6)]
    ports = harness.free_ports(2)
    config = harness.write_config(tmp_path, checkpoint, ports, context=CONTEXT)
    sizes = zip(ports, ("320KiB", "640KiB"), strict=True)
    nodes = [harness.start_memory(tmp_path, port, memory=memory) for port, memory in sizes]
    nodes.append(harness.start_node(config, "c0"))

    async def main() -> None:
        await harness.ready(config, nodes[-1])
        async with harness.client(config) as client:
            for i in (0, 1, 2, 3, 2, 0, 4, 3, 5, 4, 5, 1, 0):
                answer = await client.generate(prompts[i], max_tokens=8)
                await asyncio.to_thread(agreement.check, oracle, prompts[i], answer.tokens, f"prompt {i}")
            status = await client.status()
            assert 0 < status.shared_tokens < status.prompt_tokens

    with harness.running(*nodes):
        asyncio.run(main())
        assert nodes[-1].stop() == 0


def test_the_higher_priority_is_answered_first(cluster: ClusterConfig) -> None:
    """Of requests that wait, whenever they came."""

    async def main() -> None:
        ended: list[int] = []

        async def one(client: lamina.Client, priority: int) -> None:
            await client.generate([1] * 170, max_tokens=10, priority=priority)
            ended.append(priority)

        async with harness.client(cluster) as client:
            before = [asyncio.create_task(client.generate([2] * 100, max_tokens=90)) for _ in range(3)]
            await asyncio.sleep(0.1)
            await asyncio.gather(*before, *(one(client, priority) for priority in [0] * 5 + [1] * 5))
        # But for one in a few, which goes to the one that came first.
        assert sum(ended[:5]) >= 3

    asyncio.run(main())
