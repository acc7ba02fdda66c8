"""Attention output over one shard with its log-sum-exp, and the exact merge of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
"""Stands in for a maximum of -inf, so that an empty shard subtracts something finite: -inf - -inf is NaN."""


class Partial(NamedTuple):
    """Attention of T rows over one shard, both tensors in float32.

    ``o``: [T, Hq, Dv], normalised within the shard. ``lse``: [T, Hq], the natural logarithm of the sum of
    exp(score). Where a row sees nothing of the shard, ``o`` is exactly 0 and ``lse`` is -inf.
    """

    o: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, tokens: int, heads: int, v_dim: int, *, device: torch.device) -> Self:
        """The neutral element of `merge`: what attending to nothing gives."""
        return cls(
            torch.zeros(tokens, heads, v_dim, device=device),
            torch.full((tokens, heads), -torch.inf, device=device),
        )


def merge(first: Partial, *others: Partial) -> Partial:
    """Attention over the union of disjoint shards, from the attention over each: exact, in float32.

    Equal for every order and grouping up to rounding; a fixed order gives the same bits every time.
    The formula is that of Lamina (arXiv 2405.01814, section 4.2), ``A = (A1 S1 + A2 S2) / (S1 + S2)`` with ``S`` the
    softmax denominator, which is kept as its logarithm and shifted by the largest, as in flash-decoding.
    """
    partials = (first, *others)
    lses = torch.stack([partial.lse.float() for partial in partials])
    peak = lses.amax(0).clamp_min(LOWEST)
    weights = torch.exp(lses - peak)
    total = weights.sum(0)

    o = torch.zeros_like(first.o, dtype=torch.float32)
    for weight, partial in zip(weights, partials, strict=True):
        o += weight.unsqueeze(-1) * partial.o
    # The largest weight is exp(0), so total is >= 1 where any shard was seen; elsewhere it is 0, and so is o.
    return Partial(o / total.clamp_min(1).unsqueeze(-1), peak + total.log())


def add_sinks(partial: Partial, sinks: Sequence[float] | None) -> Partial:
    """``partial`` with the sinks of a layer in its denominator: once for each row, after all shards are merged."""
    if sinks is None:
        return partial
    score = torch.tensor(sinks, dtype=torch.float32, device=partial.o.device)
    return merge(partial, Partial(torch.zeros_like(partial.o), score.expand_as(partial.lse)))
