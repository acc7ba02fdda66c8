"""Whatever clients do, what a node keeps for them is bounded, others are served, and all space comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import CapacityError, LaminaError
from tests import harness
from tests.families import FAMILIES

REQUESTS = 10_000
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, checkpoint: Path, ports: list[int], pipeline: PipelineConfig
) -> AsyncIterator[tuple[ClusterConfig, harness.Node, lamina.AsyncClient]]:
    """A cluster and a client of it; afterwards no memory node may hold anything."""
    config = harness.write_config(folder, checkpoint, ports, pipeline=pipeline, memory=2 << 20)
    node = harness.start_node(config, "c0")
    with harness.running(node):
        await harness.ready(config, node)
        async with harness.client(config, peer_timeout=30.0) as client:
            yield config, node, client
            await harness.eventually(lambda: is_empty(config, client), timeout_s=20)
        assert node.stop() == 0


async def is_empty(config: ClusterConfig, client: lamina.AsyncClient) -> bool:
    states = [await client.status(), *[await harness.status_of(config, n) for n in config.memory_nodes]]
    return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in states)


def resident_bytes(node: harness.Node) -> int:
    """Of a node's memory, what is in use now."""
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def ask_for_one(client: lamina.AsyncClient, i: int, text: str = "") -> str:
    """How one of many small requests ends."""
    try:
        return (await client.generate(text or [1 + i % 200], max_tokens=1)).finish_reason
    except CapacityError as e:
        hint = "" if (e.retry_after_s or 0) >= 1 else ", and no hint"
        return str(e).split(";")[0] + hint


def test_ten_thousand_requests_wait_where_they_may(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """Meanwhile the node goes on to answer others; when their client goes, nothing is left of them."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=8, max_waiting=REQUESTS)
        async with cluster(tmp_path, checkpoint, memory_ports[:1], pipeline) as (config, node, client):
            before = resident_bytes(node)
            async with harness.client(config, peer_timeout=30.0) as leaving:
                asked = [asyncio.create_task(leaving.generate([1], max_tokens=500)) for _ in range(REQUESTS)]

                async def all_wait() -> bool:
                    status = await client.status()
                    return status.requests_waiting + status.requests_running == REQUESTS

                await harness.eventually(all_wait, timeout_s=60)
                assert (await client.generate([2], max_tokens=3, priority=1)).finish_reason == "length"
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(isinstance(end, LaminaError) for end in ends) > REQUESTS // 2
            assert resident_bytes(node) - before < 200 * MIB

    asyncio.run(main())


@pytest.mark.slow
def test_ten_thousand_requests_are_answered(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """All that came at once."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_waiting=REQUESTS)
        async with cluster(tmp_path, checkpoint, memory_ports[:1], pipeline) as (_, node, client):
            before = resident_bytes(node)
            ends = Counter(await asyncio.gather(*(ask_for_one(client, i) for i in range(REQUESTS))))
            assert ends == {"length": REQUESTS}
            assert resident_bytes(node) - before < 200 * MIB

    asyncio.run(main())
