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
from lamina.demo.run import CHECKPOINT as DEMO
from lamina.errors import CapacityError, LaminaError, TransportError
from lamina.transport import Hello, Link, Options
from lamina.transport import connect as connect_link
from lamina.wire.admin import AskStatus
from lamina.wire.codec import encode
from lamina.wire.requests import Generate, Request
from tests import harness
from tests.families import FAMILIES, MAX_CONTEXT

REQUESTS = 10_000
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, checkpoint: Path, ports: list[int], pipeline: PipelineConfig
) -> AsyncIterator[tuple[ClusterConfig, harness.Node, lamina.Client]]:
    """A cluster and a client of it; afterwards no memory node may hold anything."""
    config = harness.write_config(folder, checkpoint, ports, pipeline=pipeline, memory=2 << 20)
    node = harness.start_node(config, "c0")
    with harness.running(node):
        await harness.ready(config, node)
        async with harness.client(config, peer_timeout=30.0) as client:
            yield config, node, client
            await harness.eventually(lambda: is_empty(config, client), timeout_s=20)
        assert node.stop() == 0


async def is_empty(config: ClusterConfig, client: lamina.Client) -> bool:
    states = [await client.status(), *[await harness.status_of(config, n) for n in config.memory_nodes]]
    return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in states)


def resident_bytes(node: harness.Node) -> int:
    """Of a node's memory, what is in use now."""
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def ask_for_one(client: lamina.Client, i: int, text: str = "") -> str:
    """How one of many small requests ends."""
    try:
        return (await client.generate(text or [1 + i % 200], max_tokens=1)).finish_reason
    except CapacityError as e:
        hint = "" if (e.retry_after_s or 0) >= 1 else ", and no hint"
        return str(e).split(";")[0] + hint


def test_ten_thousand_requests_are_refused_beyond_the_limit(
    checkpoint: Path, memory_ports: list[int], tmp_path: Path
) -> None:
    """At once, each with a hint when to ask again; who is being answered goes on, and a later one is taken."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=4, max_waiting=64)
        async with cluster(tmp_path, checkpoint, memory_ports[:1], pipeline) as (config, node, client):
            before = resident_bytes(node)
            stream = client.stream([1, 2, 3], max_tokens=200)
            await anext(stream)
            async with harness.client(config, peer_timeout=30.0) as flooding:
                asked = [asyncio.create_task(ask_for_one(flooding, i)) for i in range(REQUESTS)]
                await asyncio.sleep(0)
                assert (await client.status()).requests_waiting <= 64
                ends = Counter(await asyncio.gather(*asked))
            assert set(ends) == {"length", "64 requests are waiting already, the limit is 64"}
            assert 64 <= ends["length"] < REQUESTS
            assert len([token async for token in stream]) == 199
            assert await ask_for_one(client, 0) == "length"
            assert resident_bytes(node) - before < 100 * MIB

    asyncio.run(main())


def test_texts_that_become_tokens_count_as_waiting(memory_ports: list[int], tmp_path: Path) -> None:
    """They are refused before that, beyond the limit; those that were taken are answered."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=4, max_waiting=16)
        async with cluster(tmp_path, DEMO, memory_ports[:1], pipeline) as (_, _, client):
            ends = Counter(await asyncio.gather(*(ask_for_one(client, i, "Once upon a time") for i in range(500))))
            assert set(ends) == {"length", "16 requests are waiting already, the limit is 16"}
            assert ends["length"] >= 16
            assert await ask_for_one(client, 0, "The end") == "length"

    asyncio.run(main())


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


@contextlib.asynccontextmanager
async def raw(config: ClusterConfig) -> AsyncIterator[Link]:
    """A client's link that nobody reads from."""
    links = config.links
    options = Options(kind="control", secret=links.secret, tls=links.tls, peer_timeout=30.0)
    link = await connect_link(config.front.address, Hello("client", "deaf"), options, deadline_s=20)
    try:
        yield link
    finally:
        link.abort("the test is over")


def test_a_client_that_stops_reading_is_left(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """When it has left some megabytes unread: its requests are cancelled, and another client's go on."""

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=8)
        async with cluster(tmp_path, checkpoint, memory_ports[:2], pipeline) as (config, node, client):
            before = resident_bytes(node)
            stream = client.stream([1, 2, 3], max_tokens=400)
            await anext(stream)
            async with raw(config) as deaf:
                for i in range(4):
                    deaf.send(encode(Generate(id=i, request=Request([i + 1], 500))))

                async def runs() -> bool:
                    return (await client.status()).requests_running == 5

                await harness.eventually(runs, timeout_s=20)
                # Its answers would fill the buffers in a while; what else it asks for does so at once.
                log = node.log

                async def is_left() -> bool:
                    with contextlib.suppress(TransportError):
                        for _ in range(200):
                            deaf.send(encode(AskStatus()))
                    return "bytes are left unread" in log.read_text()

                await harness.eventually(is_left, timeout_s=60)

                async def cancelled() -> bool:
                    return (await client.status()).requests_running <= 1

                await harness.eventually(cancelled, timeout_s=20)
            assert len([token async for token in stream]) == 399
            assert resident_bytes(node) - before < 100 * MIB

    asyncio.run(main())


@pytest.mark.parametrize("partition", ["heads", "requests"])
def test_cancelling_in_the_middle_of_a_prompt_frees_every_block(
    partition: str, checkpoint: Path, memory_ports: list[int], tmp_path: Path
) -> None:
    """The account of every node is exact while the prompt goes through the slices, and afterwards."""
    prompt = [i % 250 for i in range(MAX_CONTEXT - 10)]

    async def main() -> None:
        pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=1, partition=partition)
        async with cluster(tmp_path, checkpoint, memory_ports[:2], pipeline) as (config, _, client):
            async with harness.client(config) as leaving:
                asked = [asyncio.create_task(leaving.generate(prompt, max_tokens=8)) for _ in range(2)]
                stream = client.stream([1, 2, 3], max_tokens=60)
                await anext(stream)  # a step or more after the others have begun
                states = [await harness.status_of(config, n) for n in config.memory_nodes]
                needed = -(-(len(prompt) + 8) // 16) * 16
                holding = [s.kv_tokens_total - s.kv_tokens_free for s in states]
                assert sum(holding) >= 2 * needed
                assert sum(s.sequences for s in states) == (6 if partition == "heads" else 3)
                tokens = (await client.status()).tokens_generated
                assert not any(task.done() for task in asked)
                asked[0].cancel()
                await asyncio.gather(asked[0], return_exceptions=True)
            # The client that left cancelled the other one.
            assert len([token async for token in stream]) == 59
            await harness.eventually(lambda: is_empty(config, client))
            assert (await client.status()).tokens_generated - tokens <= 60
            # All of it can be had again.
            assert (await client.generate([1], max_tokens=MAX_CONTEXT - 1)).finish_reason == "length"

    asyncio.run(main())
