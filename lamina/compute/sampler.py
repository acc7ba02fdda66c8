"""Choose the next token of each sequence from its logits.

Randomness is a function of (seed, position) alone, so that neither the other sequences of a batch nor a repeated
step change what a request is answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.wire.requests import Sampling


def sample(logits: Tensor, choices: Sequence[tuple[Sampling, int]]) -> list[int | None]:
    """Choose tokens from logits [S, vocabulary]; ``choices`` gives each row's sampling and the position it is for.

    A row from which none can be chosen gets None: a logit is NaN, or the largest is infinite.
    """
    largest = logits.max(-1)  # the first of the largest, a fourth of argmax's time; NaN counts as larger than all
    tokens: list[int | None] = largest.indices.tolist()
    are_numbers: list[bool] = largest.values.isfinite().tolist()
    for row, (sampling, position) in enumerate(choices):
        if not are_numbers[row]:
            tokens[row] = None
        elif sampling.temperature > 0:
            assert sampling.seed is not None, "the front draws it"
            tokens[row] = _draw(logits[row], sampling, uniform(sampling.seed, position))
    return tokens


def _draw(logits: Tensor, sampling: Sampling, u: float) -> int:
    """Invert the cumulative distribution of the tokens that top-k and top-p leave, at ``u`` in [0, 1)."""
    ordered, ids = logits.double().sort(descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    # Below the largest, so that however small a temperature overflows to -inf, which is probability 0.
    probabilities = (ordered - ordered[0]).div(sampling.temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # Up to and including the token with which the sum reaches top_p, so that one token always stays.
        last = int(torch.searchsorted(cumulative, sampling.top_p))
        cumulative = cumulative[: last + 1]
    place = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    return int(ids[min(place, len(cumulative) - 1)])


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is the same for the same seed and position on every machine."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
