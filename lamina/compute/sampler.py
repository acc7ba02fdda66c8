"""Choose the next token of each sequence from its logits.

The processors work in this order; each is skipped where it would change nothing:

1. what is not allowed: ``mask`` and ``banned`` tokens get -inf;
2. ``logit_bias``;
3. ``repetition_penalty``, over prompt and answer;
4. ``presence_penalty`` and ``frequency_penalty``, over the answer;
5. ``temperature``, ``top_k``, ``top_p``, ``min_p``.

The order and the results are those of the `transformers` library, as far as it has them: its ``sequence_bias`` is a
bias, ``top_k`` keeps all tokens that are as likely as the k-th, and of equally likely tokens at the edge of ``top_p``
those with the larger ids stay.

Randomness is a function of (seed, position) alone, so that neither the other sequences of a batch nor a repeated step
change what a request is answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lamina.compute.rows import BLOCK, in_blocks, level_of, reaching, total_of
from lamina.wire.orders import NONE_ALLOWED, Choice

CHUNK_BYTES = 64 << 20
"""The most bytes of logits that are worked on at once."""
FIRST_LOOK = 512
"""How many tokens at least are looked at first for those that together have the probability ``top_p``."""


def rows_at_once(vocabulary: int) -> int:
    """Return how many rows of logits in float32 are worked on at once."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[int | None]:
    """Choose tokens from logits [S, vocabulary], by the choice for each row.

    A row from which none can be chosen gets None, if a logit is NaN or the largest is infinite, or ``NONE_ALLOWED``, if
    its choice allows no token.
    """
    largest = logits.max(-1)  # the first of the largest, a fourth of argmax's time; NaN counts as larger than all
    tokens: list[int | None] = largest.indices.tolist()
    are_numbers: list[bool] = largest.values.isfinite().tolist()
    worked_on = []
    for row, choice in enumerate(choices):
        if not are_numbers[row]:
            tokens[row] = None
        elif choice.sampling.temperature > 0 or choice.changes_logits:
            worked_on.append(row)
    size = rows_at_once(logits.shape[1])
    for start in range(0, len(worked_on), size):
        rows = worked_on[start : start + size]
        chosen = _choose(in_blocks(logits, rows), [choices[row] for row in rows], logits.shape[1])
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is the same for the same seed and position on every machine."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _choose(blocks: Tensor, choices: Sequence[Choice], vocabulary: int) -> list[int | None]:
    """Choose tokens from rows [n, C, BLOCK], which are changed."""
    _edit(blocks.view(len(choices), -1), choices, vocabulary)
    maxima = blocks.amax(-1)
    peaks = maxima.amax(-1)
    tokens: list[int | None] = [
        0 if np.isfinite(peak) else NONE_ALLOWED if peak == -np.inf else None for peak in peaks.tolist()
    ]
    greedy: list[int] = []
    whole: list[int] = []
    narrow: list[int] = []
    wide: list[int] = []
    for row, choice in enumerate(choices):
        s = choice.sampling
        k = s.top_k if s.top_k < vocabulary else 0
        if tokens[row] != 0:
            continue
        if not s.temperature:
            greedy.append(row)
        elif not k and s.top_p == 1:
            whole.append(row)
        else:
            (narrow if (k or FIRST_LOOK) <= maxima.shape[1] // 2 else wide).append(row)
    if greedy:
        best = _rows(blocks, greedy).flatten(1).max(-1).indices
        _put(tokens, greedy, best)
    if whole:
        drawn = _Drawn(_rows(blocks, whole), _rows(maxima, whole), [choices[row] for row in whole])
        _put(tokens, whole, drawn.from_all())
    if narrow:
        drawn = _Drawn(_rows(blocks, narrow), _rows(maxima, narrow), [choices[row] for row in narrow])
        found, enough = drawn.from_largest()
        _put(tokens, narrow, found)
        wide += [row for row, is_enough in zip(narrow, enough.tolist(), strict=True) if not is_enough]
    for row in wide:  # each alone, as their widths differ
        drawn = _Drawn(blocks[row : row + 1], maxima[row : row + 1], [choices[row]])
        _put(tokens, [row], drawn.from_nearly_all(vocabulary))
    return tokens


def _put(tokens: list[int | None], rows: Sequence[int], chosen: Tensor) -> None:
    for row, token in zip(rows, chosen.tolist(), strict=True):
        tokens[row] = token


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    return values if len(rows) == len(values) else values[torch.tensor(rows, device=values.device)]


# -- from logits to logits


def _edit(logits: Tensor, choices: Sequence[Choice], vocabulary: int) -> None:
    """Change logits [n, width >= vocabulary] in place, by all that does not depend on the other logits."""
    if masks := [(row, choice.mask) for row, choice in enumerate(choices) if choice.mask is not None]:
        packed = np.stack([np.frombuffer(mask, np.uint8, -(-vocabulary // 8)) for _, mask in masks])
        refused = np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little") == 0
        for (row, _), own in zip(masks, torch.from_numpy(refused).to(logits.device), strict=True):
            logits[row, :vocabulary].masked_fill_(own, -torch.inf)
    flat = logits.view(-1)
    width = logits.shape[1]

    def at(tokens: Callable[[Choice], Sequence[np.ndarray]], of: Callable[[Choice], bool]) -> tuple[Tensor, Tensor]:
        """Return the rows and the places in ``flat`` of the tokens of some choices."""
        own = [(row, part) for row, c in enumerate(choices) if of(c) for part in tokens(c) if len(part)]
        if not own:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        rows = np.repeat([row for row, _ in own], [len(part) for _, part in own])
        place = rows * width + np.concatenate([part for _, part in own])
        return torch.from_numpy(rows).to(logits.device), torch.from_numpy(place).to(logits.device)

    def each(value: Callable[[Choice], float]) -> Tensor:
        return torch.tensor([value(choice) for choice in choices], dtype=torch.float32, device=logits.device)

    _, place = at(lambda c: [np.array(c.banned, np.int64)], lambda c: bool(c.banned))
    if len(place):
        flat[place] = -torch.inf
    _, place = at(lambda c: [np.array(list(c.sampling.logit_bias), np.int64)], lambda c: bool(c.sampling.logit_bias))
    if len(place):
        bias = [value for choice in choices for value in choice.sampling.logit_bias.values()]
        flat[place] += torch.tensor(bias, dtype=torch.float32, device=logits.device)
    rows, place = at(lambda c: [_tokens(c.prompt), _tokens(c.answer)], lambda c: c.sampling.repetition_penalty != 1)
    if len(place):
        value, penalty = flat[place], each(lambda c: c.sampling.repetition_penalty)[rows]
        flat[place] = torch.where(value < 0, value * penalty, value / penalty)
    _, place = at(
        lambda c: [_tokens(c.answer)], lambda c: bool(c.sampling.presence_penalty or c.sampling.frequency_penalty)
    )
    if len(place):
        place, count = place.unique(return_counts=True)
        rows = place // width
        frequency, presence = each(lambda c: c.sampling.frequency_penalty), each(lambda c: c.sampling.presence_penalty)
        flat[place] -= count * frequency[rows] + presence[rows]


def _tokens(history: bytes) -> np.ndarray:
    return np.frombuffer(history, "<i4")


# -- from logits to a token


class _Drawn:
    """Draws a token for each of some rows [n, C, BLOCK], with block maxima [n, C], by inverting the cumulative
    distribution of the tokens that are kept, at `uniform`.

    The weight of a token is its probability over that of the likeliest one.
    """

    def __init__(self, blocks: Tensor, maxima: Tensor, choices: Sequence[Choice]) -> None:
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
        width = blocks.shape[1] * BLOCK
        self._top_k = torch.tensor([min(s.top_k, width) for s in settings], device=blocks.device)
        self._has_min_p = any(s.min_p for s in settings)
        self._needs_total = any(not s.top_k for s in settings)

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
        total = total_of(self._weights(self._blocks.clone()))[1] if self._needs_total else self._u
        return self._from(level_of(self._maxima, counts), total)

    def from_nearly_all(self, vocabulary: int) -> Tensor:
        """The same for a single row that `from_largest` does not suit."""
        total = total_of(self._weights(self._blocks.clone()))[1]
        if int(self._top_k):
            level = torch.full_like(self._peaks, -torch.inf)
        else:
            # All tokens below this weight have less than half of what top_p leaves out.
            least = (1 - self._top_p) * total / (2 * vocabulary)
            level = (self._peaks + self._temperature * least.log()).float()
        return self._from(level, total)[0]

    def _weights(self, blocks: Tensor) -> Tensor:
        """Turn logits [n, C, BLOCK] into weights, in place."""
        # Below the peak, so that however small a temperature overflows to -inf, which is weight 0.
        temperature = self._temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
        return blocks.sub_(self._peaks[:, None, None]).div_(temperature[:, None, None]).exp_()

    def _from(self, level: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        ids, values = reaching(self._blocks, self._maxima, level)
        # Of equal values the one with the largest id comes first.
        values, order = values.flip(-1).sort(descending=True, stable=True)
        ids = ids.flip(-1).gather(1, order)
        weights = (values.double() - self._peaks[:, None]).div_(self._temperature[:, None]).exp_()
        is_limited = self._top_k > 0
        last = (self._top_k - 1).clamp(0, ids.shape[1] - 1)
        smallest = values.gather(1, last[:, None]).masked_fill_(~is_limited[:, None], -torch.inf)
        weights.masked_fill_(values < smallest, 0)
        sums = weights.cumsum(-1)
        wanted = self._top_p * torch.where(is_limited, sums[:, -1], total)
        enough = is_limited | (sums[:, -1] >= wanted)
        is_kept = weights >= self._min_p[:, None]
        # A token stays if those before it do not reach top_p.
        is_kept[:, 1:] &= (sums[:, :-1] < wanted[:, None]) | (self._top_p == 1)[:, None]
        weights.masked_fill_(~is_kept, 0)
        place, _ = _invert(weights, self._u)
        return ids.gather(1, place[:, None])[:, 0], enough


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
