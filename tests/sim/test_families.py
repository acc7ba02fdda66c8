"""Every model family decodes over a cluster exactly as ``transformers`` does in one process."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from lamina.wire.admin import Status
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle, gaps
from tests.sim.clusters import LINK, WINDOWS, generate, make_config, simulate

TOKENS = 48
_random = random.Random(7)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(length)] for length in (1, 9, 33, 70, 300)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name: str, agreement: Agreement, tmp_path: Path) -> None:
    """Ragged prompts in one batch, over two memory nodes and over three with 2 + 1 + 1 KV heads."""
    path = FAMILIES[name].save(tmp_path / "checkpoint")
    oracle = Oracle(path)

    async def work(cluster: SimCluster) -> tuple[list[list[int]], Status]:
        async with cluster.client() as client:
            before = (await client.status()).steps
            answers = await generate(client, PROMPTS, max_tokens=TOKENS)
            status = await client.status()
        assert status.steps - before < 2 * TOKENS, "the prompts did not decode in one batch"
        return answers, status

    for heads, link in (([2, 2], WINDOWS), ([2, 1, 1], LINK)):
        answers, status = simulate(make_config(path, memory_nodes=len(heads)), work, link=link)
        assert [peer.kv_heads for peer in status.peers] == heads
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert len(answer) == TOKENS
            agreement.check(oracle, prompt, answer, f"{name}, {len(heads)} nodes, prompt of {len(prompt)}")


def test_keys_and_values_of_8_bits(tmp_path: Path) -> None:
    """Nearly four times the tokens of float32 in the same memory, and answers that float32 finds nearly as good."""
    path = FAMILIES["llama"].save(tmp_path / "checkpoint", head_dim=64)
    oracle = Oracle(path)

    async def work(cluster: SimCluster) -> tuple[int, list[list[int]]]:
        async with cluster.client() as client:
            answers = await generate(client, PROMPTS, max_tokens=TOKENS)
            return (await client.status()).kv_tokens_total, answers

    tokens, _ = simulate(make_config(path), work)
    for kv_dtype in ("int8", "float8_e4m3fn"):
        fitting, answers = simulate(make_config(path, kv_dtype=kv_dtype), work)
        assert 3.5 < fitting / tokens < 4
        assert gaps(oracle, PROMPTS, answers).mean < 0.02


def test_windows_and_chunks_of_prompts(agreement: Agreement, tmp_path: Path) -> None:
    """A model whose layers have windows and others that have none, with prompts in chunks, over whole nodes."""
    path = FAMILIES["gemma3_text"].save(tmp_path / "checkpoint")
    oracle = Oracle(path)
    pipeline = PipelineConfig(batches=2, max_batch=2, prefill_tokens=40, partition="requests")

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return await generate(client, PROMPTS, max_tokens=TOKENS)

    for prompt, answer in zip(PROMPTS, simulate(make_config(path, pipeline=pipeline), work), strict=True):
        agreement.check(oracle, prompt, answer, f"windows, prompt of {len(prompt)}")
