"""Say how likely the model found tokens, before any processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.compute.rows import BLOCK, in_blocks, level_of, reaching, total_of
from lamina.wire.requests import Score


class Asked(NamedTuple):
    """The score of ``token`` is wanted, given the logits of ``row``, with the ``top`` likeliest tokens."""

    row: int
    token: int
    top: int


def score(logits: Tensor, asked: Sequence[Asked]) -> list[Score | None]:
    """Return scores by logits [S, vocabulary]; the caller bounds how many at once. None where a logit is NaN, or the
    largest is infinite.

    Logarithms are those of a softmax in float64, up to the rounding of float32. Of equally likely tokens that with the
    smallest id comes first.
    """
    blocks = in_blocks(logits, [row for row, _, _ in asked])
    tokens = torch.tensor([token for _, token, _ in asked], device=logits.device)
    maxima = blocks.amax(-1)
    peaks = maxima.amax(-1)
    chosen = blocks[torch.arange(len(asked), device=logits.device), tokens // BLOCK, tokens % BLOCK]
    ranks = (blocks > chosen[:, None, None]).sum((1, 2)) + 1
    tops = [top for _, _, top in asked]
    ids, values = _likeliest(blocks, maxima, max(tops))
    norm = total_of(blocks.sub_(peaks[:, None, None]).exp_())[1].log() + peaks
    columns = (
        (chosen - norm).tolist(),
        ranks.tolist(),
        ids.tolist(),
        (values - norm[:, None]).tolist(),
        peaks.isfinite().tolist(),
    )
    return [
        Score(logprob, rank, [(i, p) for i, p in zip(best[:top], each[:top], strict=True) if p > -torch.inf])
        if is_number
        else None
        for top, logprob, rank, best, each, is_number in zip(tops, *columns, strict=True)
    ]


def _likeliest(blocks: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ids and values [n, M] of the ``count`` largest values of each row, in order, or of fewer."""
    if not count:
        return torch.zeros(len(blocks), 0, dtype=torch.int64), torch.zeros(len(blocks), 0)
    if count <= maxima.shape[1]:
        level = level_of(maxima, torch.full((len(blocks),), count, device=blocks.device))
    else:
        level = torch.full((len(blocks),), -torch.inf, device=blocks.device)
    ids, values = reaching(blocks, maxima, level)
    values, order = values.sort(descending=True, stable=True)
    return ids.gather(1, order)[:, :count], values[:, :count]
