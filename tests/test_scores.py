"""Scores say how likely the model alone found a token."""

from __future__ import annotations

import math

import pytest
import torch

from lamina.compute.scores import Asked, score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 3000])
def test_scores_are_a_softmax_in_float64(vocabulary: int, dtype: torch.dtype) -> None:
    """Logarithm, rank, and the likeliest tokens in order; of equal ones the smallest id first."""
    logits = (4 * torch.randn(30, vocabulary, generator=torch.Generator().manual_seed(3))).to(dtype)
    logits[:, vocabulary // 3] = logits.max(-1).values  # an equal one
    wanted = logits.double().log_softmax(-1)
    asked = [Asked(row, (7 * row) % vocabulary, row % 21) for row in range(29, -1, -1)]

    for (row, token, top), found in zip(asked, score(logits, asked), strict=True):
        assert found is not None
        assert found.logprob == pytest.approx(float(wanted[row, token]), abs=1e-6)
        assert found.rank == int((wanted[row] > wanted[row, token]).sum()) + 1
        order = logits[row].sort(descending=True, stable=True).indices[:top].tolist()
        assert [i for i, _ in found.top] == order
        assert [p for _, p in found.top] == pytest.approx(wanted[row, order].tolist(), abs=1e-6)


def test_a_row_has_the_same_scores_alone() -> None:
    """To the last bit, however many rows are scored with it."""
    logits = torch.randn(9, 50_000, generator=torch.Generator().manual_seed(3))
    asked = [Asked(row, row, 5) for row in range(9)]

    assert score(logits, asked) == [score(logits[row : row + 1], [Asked(0, row, 5)])[0] for row in range(9)]


def test_impossible_tokens_and_rows_without_numbers() -> None:
    """A token of probability 0 has one, and is never among the likeliest; a row with NaN has no score."""
    logits = torch.zeros(4, 70)
    logits[0, 3:] = -torch.inf
    logits[1, 69] = torch.nan
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf

    first, *others = score(logits, [Asked(row, 60, 20) for row in range(4)])

    assert first is not None
    assert (first.logprob, first.rank) == (-math.inf, 4)
    assert first.top == [(i, pytest.approx(-math.log(3))) for i in range(3)]
    assert others == [None] * 3
