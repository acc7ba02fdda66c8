"""What a sliding window saves lets more requests run at once, and changes no token of theirs."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from lamina.config import PipelineConfig
from tests import harness
from tests.families import FAMILIES, MAX_CONTEXT, VOCABULARY
from tests.oracle import Agreement, Oracle

REQUESTS, NEW_TOKENS = 6, 400


@pytest.mark.parametrize(
    ("partition", "compute"),
    [
        ("heads", [None]),
        pytest.param("requests", [None], marks=pytest.mark.slow),
        pytest.param("heads", [None, None], marks=pytest.mark.slow),
    ],
)
def test_long_answers_hold_a_window_each(
    partition: str, compute: list[None], agreement: Agreement, tmp_path: Path
) -> None:
    """All layers have a window of 16 tokens: nobody has to give way, though all answers together would not fit."""
    checkpoint = FAMILIES["mistral"].save(tmp_path / "checkpoint")
    oracle, chosen = Oracle(checkpoint), random.Random(3)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 40))] for _ in range(REQUESTS)]
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, partition=partition)
    memory = (288 if partition == "heads" else 576) << 10
    ports = harness.free_ports(2)
    config = harness.write_config(tmp_path, checkpoint, ports, pipeline=pipeline, memory=memory, compute=compute)
    nodes = {node.name: harness.start_node(config, node.name) for node in config.node}

    async def main() -> None:
        status = await harness.ready(config, nodes["c0"])
        assert MAX_CONTEXT <= status.kv_tokens_total < REQUESTS * NEW_TOKENS // 2
        async with harness.client(config) as client:
            answers = await asyncio.gather(*(client.generate(p, max_tokens=NEW_TOKENS) for p in prompts))
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                await asyncio.to_thread(agreement.check, oracle, prompt, answer.tokens, f"request {i}")
            assert (await client.status()).preemptions == 0

            async def idle() -> bool:
                everybody = [await client.status(), *[await harness.status_of(config, n) for n in config.memory_nodes]]
                return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in everybody)

            await harness.eventually(idle)

    with harness.running(*nodes.values()):
        asyncio.run(main())
        assert nodes["c0"].stop() == 0
