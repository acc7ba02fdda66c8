"""Choose the next token of each sequence from its logits.

The processors work in this order; each is skipped where it would change nothing:

1. what is not allowed: ``mask`` and ``banned`` tokens get -inf;
2. ``logit_bias``;
3. ``repetition_penalty``, over prompt and answer;
4. ``presence_penalty`` and ``frequency_penalty``, over the answer;
5. ``temperature``, ``top_k``, ``top_p``, ``min_p``.

The order and the results are those of the `transformers` library, as far as it has them: its ``sequence_bias`` is a
bias, and ``top_k`` keeps all tokens that are as likely as the k-th. Of equally likely tokens at the edge of ``top_p``,
those with the smallest ids stay, where the library has no rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lamina.compute.draws import FIRST_LOOK, Draws, limit_of
from lamina.compute.processors import edit
from lamina.compute.rows import in_blocks
from lamina.wire.orders import NONE_ALLOWED, Choice

CHUNK_BYTES = 64 << 20
"""The most bytes of logits that are worked on at once."""

WIDE_VALUES = 1 << 18
"""The most logits of rows that are sorted together. Few large rows, as some need far fewer of their tokens than others.
"""


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


def _choose(blocks: Tensor, choices: Sequence[Choice], vocabulary: int) -> list[int | None]:
    """Choose tokens from rows [n, C, BLOCK], which are changed."""
    edit(blocks.view(len(choices), -1), choices, vocabulary)
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
        k = limit_of(s, vocabulary)
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
        drawn = Draws(_rows(blocks, whole), _rows(maxima, whole), [choices[row] for row in whole], vocabulary)
        _put(tokens, whole, drawn.from_all())
    if narrow:
        drawn = Draws(_rows(blocks, narrow), _rows(maxima, narrow), [choices[row] for row in narrow], vocabulary)
        found, enough = drawn.from_largest()
        _put(tokens, narrow, found)
        wide = sorted([*wide, *(row for row, is_enough in zip(narrow, enough.tolist(), strict=True) if not is_enough)])
    size = max(1, WIDE_VALUES // vocabulary)
    for start in range(0, len(wide), size):
        rows = wide[start : start + size]
        drawn = Draws(_rows(blocks, rows), _rows(maxima, rows), [choices[row] for row in rows], vocabulary)
        _put(tokens, rows, drawn.from_nearly_all())
    return tokens


def _put(tokens: list[int | None], rows: Sequence[int], chosen: Tensor) -> None:
    for row, token in zip(rows, chosen.tolist(), strict=True):
        tokens[row] = token


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows, without a copy if they are all."""
    return values if len(rows) == len(values) else values[torch.tensor(rows, device=values.device)]
