"""Draw tokens at random from those that are kept, by the temperature and the probabilities of a choice.

Randomness is a function of (seed, position) alone, so that neither the other sequences of a batch nor a repeated step
change what a request is answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.compute.rows import BLOCK, level_of, reaching, total_of
from lamina.wire.orders import Choice
from lamina.wire.requests import Sampling

FIRST_LOOK = 512
"""How many tokens at least are looked at first for those that together have the probability ``top_p``."""


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is the same for the same seed and position on every machine."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def limit_of(sampling: Sampling, vocabulary: int) -> int:
    """Return how many tokens ``top_k`` keeps; 0 is all of the vocabulary."""
    return sampling.top_k if sampling.top_k < vocabulary else 0


class Draws:
    """Draws a token for each of some rows [n, C, BLOCK], with block maxima [n, C], by inverting the cumulative
    distribution of the tokens that are kept, at `uniform`.

    The weight of a token is its probability over that of the likeliest one.
    """

    def __init__(self, blocks: Tensor, maxima: Tensor, choices: Sequence[Choice], vocabulary: int) -> None:
        self._blocks = blocks
        self._maxima = maxima
        self._peaks = maxima.amax(-1)
        settings = [choice.sampling for choice in choices]
        numbers = [
            (s.temperature, s.top_p, s.min_p, uniform(s.seed or 0, choice.position))
            for s, choice in zip(settings, choices, strict=True)
        ]
        columns = torch.tensor(numbers, dtype=torch.float64, device=blocks.device).unbind(1)
        self._temperature, self._top_p, self._min_p, self._u = columns
        limits = [limit_of(s, vocabulary) for s in settings]
        self._top_k = torch.tensor(limits, device=blocks.device)
        self._vocabulary = vocabulary
        self._has_min_p = any(s.min_p for s in settings)
        self._needs_total = not all(limits)

    def from_all(self) -> Tensor:
        """Draw from all tokens that ``min_p`` keeps, in the order of their ids. The blocks are not needed any more."""
        weights = self._weights(self._blocks)
        if self._has_min_p:
            weights.masked_fill_(weights < self._min_p.float()[:, None, None], 0)
        block, rest = _invert(total_of(weights)[0], self._u)
        inside = weights[torch.arange(len(block), device=block.device), block]
        return block * BLOCK + _invert(inside.double(), rest)[0]

    def from_largest(self) -> tuple[Tensor, Tensor]:
        """Draw from the tokens that are kept, the likeliest first. Returns tokens, and whether enough of the likeliest
        tokens were looked at for that."""
        counts = torch.where(self._top_k > 0, self._top_k, FIRST_LOOK)
        total = total_of(self._weights(self._blocks.clone()))[1] if self._needs_total else torch.zeros_like(self._u)
        return self._from(level_of(self._maxima, counts), total)

    def from_nearly_all(self) -> Tensor:
        """The same for rows that `from_largest` does not suit: all tokens that can be kept are looked at."""
        total = total_of(self._weights(self._blocks.clone()))[1]
        # All tokens below this weight have less than half of what top_p leaves out.
        least = (1 - self._top_p) * total / (2 * self._vocabulary)
        level = (self._peaks + self._temperature * least.log()).float()
        return self._from(level.masked_fill_(self._top_k > 0, -torch.inf), total)[0]

    def _weights(self, blocks: Tensor) -> Tensor:
        """Turn logits [n, C, BLOCK] into weights, in place."""
        # Below the peak, so that however small a temperature overflows to -inf, which is weight 0.
        temperature = self._temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
        return blocks.sub_(self._peaks[:, None, None]).div_(temperature[:, None, None]).exp_()

    def keep(self, level: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and weights [n, M] of the tokens that reach a level [n], the likeliest first, and whether no
        other token is kept. Those that are not kept have weight 0. ``total`` [n] is the weight of all tokens together;
        it does not matter where ``top_k`` limits them."""
        ids, values = reaching(self._blocks, self._maxima, level)
        values, order = values.sort(descending=True, stable=True)  # of equal values the one with the smallest id first
        ids = ids.gather(1, order)
        weights = (values.double() - self._peaks[:, None]).div_(self._temperature[:, None]).exp_()
        is_limited = self._top_k > 0
        last = (self._top_k - 1).clamp(0, ids.shape[1] - 1)
        smallest = values.gather(1, last[:, None]).masked_fill_(~is_limited[:, None], -torch.inf)
        weights.masked_fill_(values < smallest, 0)
        sums = weights.cumsum(-1)
        wanted = self._top_p * torch.where(is_limited, sums[:, -1], total)
        is_complete = is_limited | (sums[:, -1] >= wanted)
        is_kept = weights >= self._min_p[:, None]
        # A token stays if those before it do not reach top_p.
        is_kept[:, 1:] &= (sums[:, :-1] < wanted[:, None]) | (self._top_p == 1)[:, None]
        return ids, weights.masked_fill_(~is_kept, 0), is_complete

    def _from(self, level: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights, is_complete = self.keep(level, total)
        place, _ = _invert(weights, self._u)
        return ids.gather(1, place[:, None])[:, 0], is_complete


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return for rows of weights [n, m] >= 0 the place [n] where their sum passes ``u`` of the whole, and where within
    the weight there, from 0 to 1."""
    sums = weights.cumsum(-1)
    whole = sums[:, -1:].contiguous()
    target = u[:, None] * whole
    last = torch.searchsorted(sums, whole)  # rounding must not lead to a weight of 0 behind it
    place = torch.minimum(torch.searchsorted(sums, target, right=True), last)
    weight = weights.gather(1, place)
    rest = (target - (sums.gather(1, place) - weight)) / weight
    return place[:, 0], rest[:, 0].clamp(0, 1)
