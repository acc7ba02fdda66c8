"""What a sliding window saves lets more requests run at once, and changes no token of theirs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.families import FAMILIES, MAX_CONTEXT, VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import generate, make_config, simulate, statuses

REQUESTS, NEW_TOKENS = 6, 400


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = FAMILIES["mistral"].save(tmp_path_factory.mktemp("mistral") / "checkpoint")
    return path, Oracle(path)


@pytest.mark.parametrize(
    ("partition", "compute"),
    [("heads", [None]), ("requests", [None]), ("heads", [None, None])],
    ids=["heads", "requests", "heads-replicas"],
)
def test_long_answers_hold_a_window_each(
    partition: str, compute: list[None], mistral: tuple[Path, Oracle], agreement: Agreement
) -> None:
    """All layers have a window of 16 tokens: no request has to give way, though all answers together would not fit."""
    checkpoint, oracle = mistral
    chosen = random.Random(3)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 40))] for _ in range(REQUESTS)]
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, partition=partition)
    memory = (288 if partition == "heads" else 576) << 10
    config = make_config(checkpoint, pipeline=pipeline, memory=memory, compute=compute)

    async def work(cluster: SimCluster) -> list[list[int]]:
        (front,) = await statuses(cluster, ["c0"])
        assert MAX_CONTEXT <= front.kv_tokens_total < REQUESTS * NEW_TOKENS // 2
        async with cluster.client() as client:
            answers = await generate(client, prompts, max_tokens=NEW_TOKENS)
            assert (await client.status()).preemptions == 0
        return answers

    for i, (prompt, answer) in enumerate(zip(prompts, simulate(config, work), strict=True)):
        agreement.check(oracle, prompt, answer, f"request {i}")
