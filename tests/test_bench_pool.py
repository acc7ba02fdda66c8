"""``lamina bench pool``: what it compares differs in nothing but where keys and values may lie."""

from __future__ import annotations

import pytest
import torch

from lamina.bench.pool import NODES, SCALE, TRACES, Outcome, measure

PROMPTS = TRACES[1]
LONGEST = PROMPTS.longest // SCALE - 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_moves_let_more_requests_in() -> None:
    """Long prompts find space in parts: more memory is used, and more tokens come out; a run gives the same again."""
    asked = PROMPTS.draw(40, seed=2)
    without, with_moves, again = (
        measure(asked, PROMPTS.longest, nodes=NODES, moves=moves) for moves in (False, True, True)
    )

    assert without.refused == with_moves.refused == 0
    assert with_moves.kv_use > without.kv_use
    assert rate(with_moves) > 1.05 * rate(without)
    assert with_moves == again


def test_an_isolated_cluster_refuses_what_its_memory_cannot_hold() -> None:
    """And serves the rest."""
    asked = [*((min(prompt, 800), answer) for prompt, answer in PROMPTS.draw(10, seed=2)), (LONGEST, 32)]
    outcome = measure(asked, PROMPTS.longest, nodes=1, moves=False)

    assert outcome.refused == 1
    assert outcome.tokens


def rate(outcome: Outcome) -> float:
    return outcome.tokens / outcome.seconds
