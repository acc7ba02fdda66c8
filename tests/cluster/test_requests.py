"""Requests of real processes, over whichever transport the tests run; what else clients may ask stands in tests/sim."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import LaminaError, RequestError
from tests import harness
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle

SEED = 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="module")
def cluster(
    checkpoint: Path, memory_ports: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterConfig]:
    """Two batches in flight, and prompts in chunks shorter than they are."""
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=16)
    config = harness.write_config(
        tmp_path_factory.mktemp("cluster"), checkpoint, memory_ports[:2], pipeline=pipeline, memory=2 << 20
    )
    node = harness.start_node(config, "c0")
    with harness.running(node):
        asyncio.run(harness.ready(config, node))
        yield config
        assert node.stop() == 0


def ask(config: ClusterConfig, work: Callable[[lamina.AsyncClient], Awaitable[None]]) -> None:
    """Run ``work`` with a client, then check that no KV cache is left in use on any node."""

    async def main() -> None:
        async with harness.client(config) as client:
            await work(client)

            async def idle() -> bool:
                nodes = [await client.status(), *[await harness.status_of(config, n) for n in config.memory_nodes]]
                return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in nodes)

            await harness.eventually(idle)

    asyncio.run(main())


def prompts(count: int, longest: int = 120) -> list[list[int]]:
    chosen = random.Random(SEED)
    return [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, longest))] for _ in range(count)]


def test_cancelling_at_any_moment_harms_no_other(cluster: ClusterConfig, oracle: Oracle, agreement: Agreement) -> None:
    """While waiting, in mid-prompt and in mid-answer; the others' tokens stay right."""

    async def work(client: lamina.AsyncClient) -> None:
        chosen = random.Random(SEED)
        asked = prompts(14)

        async def one(i: int) -> None:
            if i % 2:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate(asked[i], max_tokens=300), chosen.random() / 2)
            else:
                answer = await client.generate(asked[i], max_tokens=12)
                await asyncio.to_thread(agreement.check, oracle, asked[i], answer.tokens, f"request {i}")

        await asyncio.gather(*(one(i) for i in range(len(asked))))

    ask(cluster, work)


CLIENT = """
import asyncio, os, signal, sys, lamina
from lamina.config import load

async def main():
    config = load(sys.argv[1])
    async with lamina.connect(config.front.address, secret=config.links.secret, tls=config.links.tls) as client:
        async for _ in client.stream([1, 2, 3], max_tokens=300):
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_client_that_dies_frees_its_requests(cluster: ClusterConfig) -> None:
    """No goodbye needed."""
    died = subprocess.run([sys.executable, "-c", CLIENT, str(cluster.file)], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL

    async def work(client: lamina.AsyncClient) -> None:
        assert len((await client.generate([1], max_tokens=2)).tokens) == 2

    ask(cluster, work)


def test_a_script_needs_no_event_loop(cluster: ClusterConfig) -> None:
    """The client without asyncio gives the same answers, from any thread, and leaves nothing behind."""
    links, prompt = cluster.links, [1, 2, 3]
    with lamina.Client(cluster.front.address, secret=links.secret, tls=links.tls) as client:
        answer = client.generate(prompt, max_tokens=8)
        stream = client.stream(prompt, max_tokens=8)
        assert [token.id for token in stream] == answer.tokens
        assert (stream.finish_reason, stream.prompt_tokens, stream.held_back) == ("length", 3, "")
        with ThreadPoolExecutor(4) as pool:
            others = [*pool.map(lambda _: client.generate(prompt, max_tokens=8).tokens, range(4))]
        assert others == [answer.tokens] * 4
        with pytest.raises(RequestError, match="token 300 at position 0"):
            client.generate([VOCABULARY])

        for _ in client.stream(prompt, max_tokens=300):
            break  # the request is aborted
        with client.stream(prompt, max_tokens=300) as left:
            next(left)
        unread = client.stream(prompt, max_tokens=300)
        next(unread)
        deadline = time.monotonic() + 5
        while client.status().requests_running > 1:  # until the step ends that they are in
            assert time.monotonic() < deadline
    with pytest.raises(LaminaError, match="the client is closed"):
        client.status()
    client.close()
    unread.close()
    assert "lamina-client" not in {thread.name for thread in threading.enumerate()}

    async def work(client: lamina.AsyncClient) -> None:
        """Nothing is left of it."""

    ask(cluster, work)
