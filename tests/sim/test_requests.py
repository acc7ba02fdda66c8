"""What clients can ask of a running cluster, and what happens when they leave or ask for the impossible."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import CapacityError, LaminaError, RequestError
from tests import harness
from tests.families import FAMILIES, MAX_CONTEXT, VOCABULARY
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


def ask(config: ClusterConfig, work: Callable[[lamina.Client], Awaitable[None]]) -> None:
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


def test_more_requests_than_a_batch_holds(cluster: ClusterConfig, oracle: Oracle, agreement: Agreement) -> None:
    """Continuous admission over two batches in flight, prompts in chunks among decoding: all answers are right."""

    async def work(client: lamina.Client) -> None:
        asked = prompts(12)
        answers = await asyncio.gather(*(client.generate(p, max_tokens=5 + i) for i, p in enumerate(asked)))
        for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            assert (len(answer.tokens), answer.finish_reason) == (5 + i, "length")
            assert answer.prompt_tokens == len(prompt)
            await asyncio.to_thread(agreement.check, oracle, prompt, answer.tokens, f"request {i}")

    ask(cluster, work)


def test_sampling_depends_on_seed_and_position_alone(cluster: ClusterConfig) -> None:
    """Alone or among others, a seeded request gets the same tokens; another seed gives others."""

    async def work(client: lamina.Client) -> None:
        settings = {"max_tokens": 20, "temperature": 1.2, "top_k": 50, "top_p": 0.95}
        prompt, *others = prompts(7, longest=30)
        alone = await client.generate(prompt, seed=3, **settings)
        together, other, *_ = await asyncio.gather(
            client.generate(prompt, seed=3, **settings),
            client.generate(prompt, seed=4, **settings),
            *(client.generate(p, seed=5, **settings) for p in others),
        )
        assert together.tokens == alone.tokens
        assert other.tokens != alone.tokens
        greedy = await client.generate(prompt, max_tokens=20)
        first_only = await client.generate(prompt, seed=9, **{**settings, "top_k": 1})
        assert first_only.tokens == greedy.tokens

    ask(cluster, work)


def test_leaving_the_iterator_aborts(cluster: ClusterConfig) -> None:
    """By break, by closing and by cancellation; the KV cache is free again on every node."""

    async def work(client: lamina.Client) -> None:
        prompt = prompts(1)[0]
        async for _ in client.stream(prompt, max_tokens=300):
            break
        async with client.stream(prompt, max_tokens=300) as stream:
            await anext(stream)
        task = asyncio.create_task(client.generate(prompt, max_tokens=300))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    ask(cluster, work)


def test_giving_up_on_a_status_harms_nobody(cluster: ClusterConfig) -> None:
    """Its answer comes when nobody waits any more."""

    async def work(client: lamina.Client) -> None:
        stream = client.stream([1, 2, 3], max_tokens=20)
        await anext(stream)
        asked = asyncio.create_task(client.status())
        await asyncio.sleep(0)
        asked.cancel()
        assert len([token async for token in stream]) == 19

    ask(cluster, work)


def test_cancelling_at_any_moment_harms_nobody(cluster: ClusterConfig, oracle: Oracle, agreement: Agreement) -> None:
    """While waiting, in mid-prompt and in mid-answer; the others' tokens stay right."""

    async def work(client: lamina.Client) -> None:
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

    async def work(client: lamina.Client) -> None:
        assert len((await client.generate([1], max_tokens=2)).tokens) == 2

    ask(cluster, work)


@pytest.mark.parametrize(
    ("prompt", "settings", "kind", "message"),
    [
        ([], {}, RequestError, "the prompt is empty"),
        ([1] * MAX_CONTEXT, {}, RequestError, f"the prompt has {MAX_CONTEXT} tokens, the context is {MAX_CONTEXT}"),
        ([1, 2], {"max_tokens": MAX_CONTEXT}, RequestError, f"ask for at most {MAX_CONTEXT - 2}"),
        ([1, VOCABULARY], {}, RequestError, f"token {VOCABULARY} at position 1"),
        ("text", {}, RequestError, "no tokenizer.json"),
        ("a" * 2**21, {}, RequestError, "the prompt is too long to be sent"),
        ([1], {"temperature": -1.0}, RequestError, "temperature: expected float >= 0"),
        ([1], {"top_p": 1.5}, RequestError, "top_p: expected float <= 1"),
        ([1], {"max_tokens": 0}, RequestError, "max_tokens: expected int >= 1"),
        ([1], {"seed": -1}, RequestError, "seed: expected int >= 0"),
        ([-1], {}, RequestError, "prompt[0]: expected int >= 0, got -1"),
    ],
)
def test_an_impossible_request_is_refused_alone(
    cluster: ClusterConfig, prompt: list[int] | str, settings: dict[str, float], kind: type[LaminaError], message: str
) -> None:
    """A sentence that says what is wrong, while another request on the same connection goes on."""

    async def work(client: lamina.Client) -> None:
        good = asyncio.create_task(client.generate([1, 2, 3], max_tokens=10))
        with pytest.raises(kind) as caught:
            await client.generate(prompt, **settings)  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert len((await good).tokens) == 10

    ask(cluster, work)


def test_a_full_queue_refuses(cluster: ClusterConfig) -> None:
    """The limit is told; what was taken is answered."""

    async def work(client: lamina.Client) -> None:
        asked = [asyncio.create_task(client.generate([1, 2], max_tokens=30)) for _ in range(40)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, CapacityError)]
        assert refused
        assert "the limit is 16; retry in " in str(refused[0])
        assert (refused[0].retry_after_s or 0) >= 1
        assert all(len(a.tokens) == 30 for a in answers if isinstance(a, lamina.Completion))
        assert len(refused) < len(answers)

    ask(cluster, work)


def test_a_memory_node_sends_clients_away(memory_ports: list[int]) -> None:
    """Instead of leaving them to wait."""

    async def main() -> None:
        address = harness.default.memory_address(memory_ports[0])
        async with lamina.connect(address, secret=harness.default.secret, tls=harness.default.tls) as client:
            with pytest.raises(LaminaError, match="is a memory node; clients talk to the compute node"):
                await client.generate([1])

    asyncio.run(main())


def test_nobody_there(tmp_path: Path) -> None:
    """An address and a deadline in the message."""

    async def main() -> None:
        (port,) = harness.free_ports(1)
        with pytest.raises(LaminaError, match=f"127.0.0.1:{port}"):
            async with lamina.connect(f"tcp://127.0.0.1:{port}", deadline_s=0.3):
                pass

    asyncio.run(main())


def test_a_client_after_its_end(cluster: ClusterConfig) -> None:
    """Says so, and does not wait."""

    async def main() -> None:
        async with harness.client(cluster) as client:
            pass
        with pytest.raises(LaminaError, match="closed"):
            await client.generate([1])

    asyncio.run(main())
