"""What generation_config.json says of tokens is followed as ``generate`` follows it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import UnsupportedModelError
from lamina.sim.cluster import SimCluster
from tests.families import FAMILIES
from tests.oracle import Oracle
from tests.sim.clusters import generate, make_config, simulate

TOKENS = 40
PROMPTS = [[7], [5, 17, 200, 41], list(range(30, 90))]


def checkpoint(path: Path, settings: dict[str, Any], **config: Any) -> Path:
    """A llama with these settings in its generation_config.json."""
    FAMILIES["llama"].save(path, **config)
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def answers(path: Path, **settings: Any) -> list[list[int]]:
    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return await generate(client, PROMPTS, max_tokens=TOKENS, **settings)

    return simulate(make_config(path), work)


def test_the_repetition_penalty_of_the_checkpoint(tmp_path: Path) -> None:
    """Requests that name none have it, and others their own."""
    plain, penalised = (
        checkpoint(tmp_path / name, settings)
        for name, settings in (("plain", {}), ("penalised", {"repetition_penalty": 1.5}))
    )
    expected, without = ([Oracle(path).greedy(prompt, TOKENS) for prompt in PROMPTS] for path in (penalised, plain))

    assert expected != without
    assert answers(penalised) == expected
    assert answers(penalised, repetition_penalty=1.0) == without


def test_end_tokens(tmp_path: Path) -> None:
    """Several may end an answer; without any in generation_config.json none does, whatever config.json says."""
    path = checkpoint(tmp_path / "several", {})
    long = [Oracle(path).greedy(prompt, TOKENS) for prompt in PROMPTS]
    ends = [long[0][5], long[1][20]]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    none = checkpoint(tmp_path / "none", {}, eos_token_id=ends[0])
    expected = [Oracle(path).greedy(prompt, TOKENS) for prompt in PROMPTS]

    assert len(expected[0]) <= 6
    assert answers(path) == expected
    assert answers(none) == [Oracle(none).greedy(prompt, TOKENS) for prompt in PROMPTS] == long


@pytest.mark.parametrize(
    ("name", "value"), [("no_repeat_ngram_size", 3), ("suppress_tokens", [5, 6]), ("num_beams", 4), ("min_length", 10)]
)
def test_what_is_not_followed_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {name: value})
    with pytest.raises(UnsupportedModelError, match=rf"generation_config.json: {name} is .*, which changes tokens"):
        answers(path)
