"""Find the largest values of wide rows without sorting them.

Rows of logits are laid out in blocks. The k-th largest of the blocks' maxima is a level that at least k values of the
row reach, and seldom many more; only the blocks that reach it have to be looked at. All values from a level on are
found, so equal values are found together, and what is done with them does not depend on how they were found.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""The values of a block."""


def in_blocks(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a copy of some rows of logits [S, V] as float32 [n, C, BLOCK]; what is left of the last block is -inf."""
    everything = list(rows) == list(range(len(logits)))
    chosen = logits if everything else logits[torch.tensor(rows, device=logits.device)]
    vocabulary = logits.shape[1]
    missing = -vocabulary % BLOCK
    if missing:
        copy = pad(chosen.float(), (0, missing), value=-torch.inf)
    else:
        copy = chosen.to(torch.float32, copy=chosen is logits)
    return copy.view(len(chosen), -1, BLOCK)


def level_of(maxima: Tensor, counts: Tensor) -> Tensor:
    """Return for each row a level [n] that at least so many of its values reach, counts [n] <= C, given the maxima
    [n, C] of its blocks."""
    largest = maxima.topk(int(counts.max())).values
    return largest.gather(1, counts[:, None] - 1)[:, 0]


def reaching(blocks: Tensor, maxima: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and values [n, M] of all values of each row, in the order of their ids, that reach its level [n] and
    are more than -inf. Rows that have fewer than M end with id 0 and value -inf."""
    row, block = (maxima >= level[:, None]).nonzero(as_tuple=True)
    inside = blocks[row, block]
    found, offset = ((inside >= level[row, None]) & (inside > -torch.inf)).nonzero(as_tuple=True)
    row, block = row[found], block[found]
    counts = torch.bincount(row, minlength=len(blocks))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = len(blocks), int(counts.max())
    ids = torch.zeros(shape, dtype=torch.int64, device=row.device)
    values = torch.full(shape, -torch.inf, device=row.device)
    ids[row, place] = block * BLOCK + offset
    values[row, place] = inside[found, offset]
    return ids, values


def total_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the blocks [n, C] and of the rows [n] of weights [n, C, BLOCK], as float64.

    A sum over a whole row at once would depend on the number of rows, by which it is divided among threads.
    """
    sums = weights.sum(-1).double()
    return sums, sums.cumsum(-1)[:, -1]
