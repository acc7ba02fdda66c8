"""A `Partial` is the attention over one shard with its log-sum-exp, and `merge` joins several exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
"""This stands in for a maximum of -inf, so that an empty shard subtracts a finite number: -inf - -inf is NaN."""


class Partial(NamedTuple):
    """A partial is the attention of T rows over one shard, both tensors in float32.

    ``o``, [T, Hq, Dv], is normalised within the shard. ``lse``, [T, Hq], is the natural logarithm of the sum of
    exp(score). Where a row sees nothing of the shard, ``o`` is exactly 0 and ``lse`` is -inf.
    """

    o: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, tokens: int, heads: int, v_dim: int, *, device: torch.device) -> Self:
        """Return the attention to nothing, which is the neutral element of `merge`."""
        return cls(
            torch.zeros(tokens, heads, v_dim, device=device),
            torch.full((tokens, heads), -torch.inf, device=device),
        )


def merge(first: Partial, *others: Partial) -> Partial:
    """Compute the attention over a union of disjoint shards from the attention over each, exactly, in float32.

    Every order and grouping gives the same result up to rounding; a fixed order gives the same bits every time. The
    formula is that of Lamina (arXiv 2405.01814, section 4.2), ``A = (A1 S1 + A2 S2) / (S1 + S2)``. ``S`` is the softmax
    denominator, which is kept as its logarithm and shifted by the largest, as in flash-decoding.
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
    """Add the sinks of a layer to the denominator: once for each row, after all shards are merged."""
    if sinks is None:
        return partial
    score = torch.tensor(sinks, dtype=torch.float32, device=partial.o.device)
    return merge(partial, Partial(torch.zeros_like(partial.o), score.expand_as(partial.lse)))
