"""Long texts of one client do not keep the others waiting."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

import lamina
from lamina.config import PipelineConfig
from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from tests import harness
from tests.families import FAMILIES

LONG = "Once upon a time there was a story. " * 25_000
"""A text that takes most of a second to encode."""


def test_a_long_text_keeps_no_other_request_waiting(tmp_path: Path, memory_ports: list[int]) -> None:
    """Neither one that gets its tokens meanwhile, nor one with a short text; in vain, as the long texts are refused."""
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint", vocab_size=1600)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    # With such a token, no length is too much for the context before it is encoded.
    tokenizer.add_tokens([AddedToken("=" * 2000)])
    tokenizer.save_pretrained(checkpoint)
    config = harness.write_config(tmp_path, checkpoint, memory_ports[:1], pipeline=PipelineConfig(), memory=2 << 20)
    node = harness.start_node(config, "c0")

    async def refused(client: lamina.AsyncClient) -> float:
        with pytest.raises(RequestError, match=r"the prompt has \d+ tokens"):
            await client.generate(LONG)
        return time.perf_counter()

    async def token_times(client: lamina.AsyncClient, until: asyncio.Future[list[float]]) -> list[float]:
        times = []
        while not until.done():
            async for _ in client.stream([1, 2, 3], max_tokens=400):
                times.append(time.perf_counter())
        return times

    async def work() -> None:
        await harness.ready(config, node)
        async with harness.client(config) as client, harness.client(config, peer_timeout=30.0) as other:
            begun = time.perf_counter()
            long = asyncio.gather(*(refused(other) for _ in range(4)))
            times = asyncio.create_task(token_times(client, long))
            await asyncio.sleep(0.1)
            await client.generate("Once", max_tokens=1)
            answered = time.perf_counter()
            ends = await long
            longest = max(after - before for before, after in pairwise(await times))
            assert longest < (max(ends) - begun) / 8, f"{longest:.3f} of {max(ends) - begun:.3f} s"
            assert answered < min(ends)

    with harness.running(node):
        asyncio.run(work())
        assert node.stop() == 0
