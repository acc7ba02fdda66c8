"""Every model family decodes over real nodes exactly as ``transformers`` does in one process."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import harness
from tests.families import FAMILIES, VOCABULARY, Family
from tests.oracle import Agreement, Oracle

TOKENS = 48
_random = random.Random(7)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(length)] for length in (1, 9, 33, 70, 300)]


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, Oracle]:
    chosen = FAMILIES[request.param]
    path = chosen.save(tmp_path_factory.mktemp(chosen.name) / "checkpoint")
    return chosen, path, Oracle(path)


TWO_NODES_BY_DEFAULT = {"llama", "gemma2", "mixtral"}


def nodes_and_families() -> list[Any]:
    """Every family over three memory nodes, the harder case; over two, most of them only among the slow tests."""
    cases = []
    for name in FAMILIES:
        marks = () if name in TWO_NODES_BY_DEFAULT else pytest.mark.slow
        cases += [pytest.param(name, 2, marks=marks, id=f"{name}-2"), pytest.param(name, 3, id=f"{name}-3")]
    return cases


@pytest.mark.parametrize(("family", "memory_nodes"), nodes_and_families(), indirect=["family"])
def test_tokens_are_those_of_transformers(
    family: tuple[Family, Path, Oracle],
    memory_nodes: int,
    transport: str,
    memory_ports: list[int],
    agreement: Agreement,
    tmp_path: Path,
) -> None:
    """Ragged prompts in one batch, over two memory nodes and over three with 2 + 1 + 1 KV heads."""
    chosen, path, oracle = family
    wiring = replace(harness.default, kind="tcp" if transport == "tls" else transport)
    config = harness.write_config(tmp_path, path, memory_ports[:memory_nodes], wiring=wiring)
    node = harness.start_node(config, "c0")

    async def decode() -> list[list[int]]:
        status = await harness.ready(config, node)
        assert [p.kv_heads for p in status.peers] == ([2, 2] if memory_nodes == 2 else [2, 1, 1])
        assert wiring.kind in ("auto", *{p.transport for p in status.peers})
        async with harness.client(config) as client:
            answers = await asyncio.gather(*(client.generate(p, max_tokens=TOKENS) for p in PROMPTS))
            status = await client.status()
            assert status.steps < 2 * TOKENS, "the prompts did not decode in one batch"
            assert status.kv_tokens_free == status.kv_tokens_total
        return [a.tokens for a in answers]

    with harness.running(node):
        answers = asyncio.run(decode())
        assert node.stop() == 0

    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == TOKENS
        agreement.check(oracle, prompt, answer, f"{chosen.name}, prompt of {len(prompt)}")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_is_as_close_as_the_library(
    compiled: bool, memory_ports: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding changes tokens only where float32 sees little difference: no more than it does in `transformers`."""
    path = FAMILIES["llama"].save(tmp_path / "checkpoint")
    config = harness.write_config(tmp_path, path, memory_ports, dtype="bfloat16", compiled=compiled)
    node = harness.start_node(config, "c0")

    async def decode() -> list[list[int]]:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            answers = await asyncio.gather(*(client.generate(p, max_tokens=TOKENS) for p in PROMPTS))
        return [a.tokens for a in answers]

    with harness.running(node):
        ours = gaps(Oracle(path), asyncio.run(decode()))
    log = node.log.read_text()
    assert "event=not_compiled" not in log
    assert ("event=compiled" in log) == compiled
    rounded = Oracle(path, torch.bfloat16)
    theirs = gaps(Oracle(path), [rounded.greedy(p, TOKENS) for p in PROMPTS])

    with capsys.disabled():
        print(f"\nbfloat16: chosen logits lie {ours} behind float32's best, in transformers {theirs}")  # noqa: T201
    assert ours.worst <= 2 * theirs.worst
    assert ours.mean <= 2 * theirs.mean


class Gaps(NamedTuple):
    """How far the logits of chosen tokens lie behind the best, in standard deviations of the logits."""

    worst: float
    mean: float

    def __str__(self) -> str:
        return f"{self.worst:.3f} σ (mean {self.mean:.5f} σ)"


def gaps(oracle: Oracle, answers: list[list[int]]) -> Gaps:
    """Of ``answers`` to all prompts, as ``oracle`` sees them."""
    found = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = oracle.logits(prompt, answer)
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        found.append((logits.max(-1).values - chosen) / logits.std(-1))
    every = torch.cat(found)
    return Gaps(float(every.max()), float(every.mean()))
