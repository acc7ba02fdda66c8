"""However the KV cache lies on the memory nodes, tokens are those of ``transformers``, and prompts can be shared."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lamina.config import PipelineConfig
from lamina.errors import ConfigError
from lamina.sim.cluster import SimCluster
from lamina.wire.admin import Status
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import generate, make_config, simulate

TOKENS = 24
_random = random.Random(11)
LONG = [_random.randrange(VOCABULARY) for _ in range(480)]
PROMPTS = [LONG[:length] for length in (1, 40, 256)] + [LONG[20 : 20 + length] for length in (250, 300, 450)]
PARTITIONS = ("heads", "requests", "tokens")


@pytest.mark.parametrize("memory_nodes", [1, 3])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_tokens_are_those_of_transformers(
    partition: str, memory_nodes: int, llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """Prompts begin alike or do not, in two batches; the second time they find what the first ones left."""
    pipeline = PipelineConfig(batches=2, prefill_tokens=200, partition=partition)
    config = make_config(llama, memory_nodes=memory_nodes, pipeline=pipeline)

    async def work(cluster: SimCluster) -> tuple[list[list[int]], list[Status]]:
        answers, statuses = [], []
        async with cluster.client() as client:
            for _ in range(2):
                answers += await generate(client, PROMPTS, max_tokens=TOKENS)
                statuses.append(await client.status())
        return answers, statuses

    answers, (first, second) = simulate(config, work)
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
def test_a_context_larger_than_any_node(partition: str, llama: Path, oracle: Oracle, agreement: Agreement) -> None:
    """Under "tokens", and under "requests" for those that are too long: the nodes hold it together."""
    # 4 layers of 4 KV heads of 16 numbers in float32 take 2 KiB a token: a node holds 256.
    config = make_config(
        llama, memory_nodes=3, memory=512 << 10, pipeline=PipelineConfig(partition=partition), context=512
    )

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return await generate(client, (LONG, LONG[:20]), max_tokens=30)

    long, short = simulate(config, work)
    agreement.check(oracle, LONG, long, f"{partition}, long")
    agreement.check(oracle, LONG[:20], short, f"{partition}, short")


@pytest.mark.parametrize("partition", ["heads", "tokens"])
def test_prompts_beyond_what_the_compute_node_keeps(
    partition: str, llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """They go on over the memory nodes, which have all that came before."""
    # Room for 100 tokens: one prompt begins here, others do not even that.
    pipeline = PipelineConfig(partition=partition, prefill_tokens=70, prefill_kv=200 << 10)
    config = make_config(llama, pipeline=pipeline)

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return await generate(client, PROMPTS, max_tokens=TOKENS, share_prefix=False)

    for prompt, answer in zip(PROMPTS, simulate(config, work), strict=True):
        agreement.check(oracle, prompt, answer, f"{partition}, prompt of {len(prompt)}")


def test_windows_are_not_cut_into_stretches(tmp_path: Path) -> None:
    """A model with sliding windows is refused under "tokens", by name and with what to do."""
    path = FAMILIES["gemma2"].save(tmp_path / "checkpoint")
    config = make_config(path, pipeline=PipelineConfig(partition="tokens"))

    async def work(cluster: SimCluster) -> None:
        raise AssertionError("the front takes requests")

    with pytest.raises(
        ConfigError, match=r'"tokens" is not possible for a model with sliding windows, .*; use "heads"'
    ):
        simulate(config, work)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_sinks_count_once(partition: Any, tmp_path: Path, agreement: Agreement) -> None:
    """Each head's own, on one node of those that hold a part of the context, also where stripes of it lie on all."""
    path = FAMILIES["gpt_oss"].save(tmp_path / "checkpoint", layer_types=["full_attention"] * 3)
    oracle, prompts = Oracle(path), [LONG[:10], LONG[:300], LONG]
    config = make_config(path, memory_nodes=3, pipeline=PipelineConfig(partition=partition))

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return await generate(client, prompts, max_tokens=TOKENS)

    for prompt, answer in zip(prompts, simulate(config, work), strict=True):
        agreement.check(oracle, prompt, answer, f"sinks, {partition}, prompt of {len(prompt)}")
