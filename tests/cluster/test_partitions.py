"""However the KV cache lies on the memory nodes, tokens are those of ``transformers``, and prompts can be shared."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from lamina.config import PipelineConfig
from lamina.wire.admin import Status
from tests import harness
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle

TOKENS = 24
_random = random.Random(11)
LONG = [_random.randrange(VOCABULARY) for _ in range(480)]
PROMPTS = [LONG[:length] for length in (1, 40, 256)] + [LONG[20 : 20 + length] for length in (250, 300, 450)]
PARTITIONS = ("heads", "requests", "tokens")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")
    return path, Oracle(path)


@pytest.mark.parametrize("memory_nodes", [1, 3])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_tokens_are_those_of_transformers(
    partition: str,
    memory_nodes: int,
    llama: tuple[Path, Oracle],
    memory_ports: list[int],
    agreement: Agreement,
    tmp_path: Path,
) -> None:
    """Of prompts that begin alike and prompts that do not, in two batches; the second time they find the first's."""
    path, oracle = llama
    pipeline = PipelineConfig(batches=2, prefill_tokens=200, partition=partition)
    config = harness.write_config(tmp_path, path, memory_ports[:memory_nodes], pipeline=pipeline)
    node = harness.start_node(config, "c0")

    async def decode() -> tuple[list[list[int]], list[Status]]:
        await harness.ready(config, node)
        answers, statuses = [], []
        async with harness.client(config) as client:
            for _ in range(2):
                answers += await asyncio.gather(*(client.generate(p, max_tokens=TOKENS) for p in PROMPTS))
                statuses.append(await client.status())
        return [a.tokens for a in answers], statuses

    with harness.running(node):
        answers, (first, second) = asyncio.run(decode())
        assert node.stop() == 0

    for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
        assert len(answer) == TOKENS
        agreement.check(oracle, prompt, answer, f"{partition}, {memory_nodes} nodes, prompt of {len(prompt)}")
    assert second.kv_tokens_free == second.kv_tokens_total
    shared = second.shared_tokens - first.shared_tokens
    asked = second.prompt_tokens - first.prompt_tokens
    assert asked == sum(map(len, PROMPTS))
    # Whole blocks, and never the last token.
    assert shared == sum((len(p) - 1) // 16 * 16 for p in PROMPTS)


@pytest.mark.parametrize("partition", ["requests", "tokens"])
def test_a_context_larger_than_any_node(
    partition: str, llama: tuple[Path, Oracle], agreement: Agreement, tmp_path: Path
) -> None:
    """Under "tokens", and under "requests" for those that are too long: the nodes hold it together."""
    path, oracle = llama
    ports = harness.free_ports(3)
    # 4 layers of 4 KV heads of 16 numbers in float32 take 2 KiB a token: a node holds 256.
    nodes = [harness.start_memory(tmp_path, port, memory="512KiB") for port in ports]
    pipeline = PipelineConfig(partition=partition)
    config = harness.write_config(tmp_path, path, ports, pipeline=pipeline, context=512)
    node = harness.start_node(config, "c0")

    async def decode() -> list[list[int]]:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            answers = await asyncio.gather(*(client.generate(p, max_tokens=30) for p in (LONG, LONG[:20])))
        return [a.tokens for a in answers]

    with harness.running(node, *nodes):
        long, short = asyncio.run(decode())
        assert node.stop() == 0
    agreement.check(oracle, LONG, long, f"{partition}, long")
    agreement.check(oracle, LONG[:20], short, f"{partition}, short")


@pytest.mark.parametrize("partition", ["heads", "tokens"])
def test_prompts_beyond_what_the_compute_node_keeps(
    partition: str, llama: tuple[Path, Oracle], memory_ports: list[int], agreement: Agreement, tmp_path: Path
) -> None:
    """They go on over the memory nodes, which have all that came before."""
    path, oracle = llama
    # Room for 100 tokens: one prompt begins here, others do not even that.
    pipeline = PipelineConfig(partition=partition, prefill_tokens=70, prefill_kv=200 << 10)
    config = harness.write_config(tmp_path, path, memory_ports[:2], pipeline=pipeline)
    node = harness.start_node(config, "c0")

    async def decode() -> list[list[int]]:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            asked = [client.generate(p, max_tokens=TOKENS, share_prefix=False) for p in PROMPTS]
            return [answer.tokens for answer in await asyncio.gather(*asked)]

    with harness.running(node):
        answers = asyncio.run(decode())
        assert node.stop() == 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        agreement.check(oracle, prompt, answer, f"{partition}, prompt of {len(prompt)}")


def test_windows_are_not_cut_into_stretches(memory_ports: list[int], tmp_path: Path) -> None:
    """A model with sliding windows is refused under "tokens", by name and with what to do."""
    path = FAMILIES["gemma2"].save(tmp_path / "checkpoint")
    config = harness.write_config(tmp_path, path, memory_ports[:2], pipeline=PipelineConfig(partition="tokens"))
    node = harness.start_node(config, "c0")
    with harness.running(node):
        assert node.wait(60) == 2
        assert 'pipeline.partition: "tokens" is not possible for a model with sliding windows' in node.log.read_text()
