"""The oracle accepts the answer of ``generate`` and true ties, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import FAMILIES
from tests.oracle import Agreement, Oracle

PROMPT = [5, 17, 200, 41]
TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose tokens 2n and 2n + 1 always have the same logit, but not the same embedding."""
    model = FAMILIES["llama"].model()
    unembedding = model.get_output_embeddings().weight
    with torch.no_grad():
        unembedding[1::2] = unembedding[::2]
    path = tmp_path_factory.mktemp("twins")
    model.save_pretrained(path)
    return path


def test_the_answer_of_generate_agrees(checkpoint: Path) -> None:
    oracle, agreement = Oracle(checkpoint), Agreement()
    agreement.check(oracle, PROMPT, oracle.greedy(PROMPT, TOKENS), "same")
    assert (agreement.tokens, agreement.ties) == (TOKENS, [])


def test_ties_are_counted_and_the_rest_is_compared_with_what_follows_them(checkpoint: Path) -> None:
    """At two places the other token of a pair is chosen, and what generate says after that."""
    oracle, agreement = Oracle(checkpoint), Agreement()
    answer = oracle.greedy(PROMPT, 3)
    answer[-1] ^= 1
    answer += oracle.greedy([*PROMPT, *answer], TOKENS - 3)
    answer[-1] ^= 1
    agreement.check(oracle, PROMPT, answer, "ties")
    assert [tie.split(",")[0] for tie in agreement.ties] == ["ties: token 2", f"ties: token {TOKENS - 1}"]


@pytest.mark.parametrize("place", [0, 5, TOKENS - 1])
def test_another_token_is_no_tie(place: int, checkpoint: Path) -> None:
    oracle = Oracle(checkpoint)
    answer = oracle.greedy(PROMPT, TOKENS)
    answer[place] = (answer[place] + 7) % 300
    with pytest.raises(AssertionError, match=f"token {place} is {answer[place]}, the oracle prefers"):
        Agreement().check(oracle, PROMPT, answer, "wrong")
