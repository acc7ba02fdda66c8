"""These types say where sequences, and the rows of a step, are stored in a KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lamina.attention.rows import Rows

Integers = NDArray[np.int64]
Addresses = NDArray[np.uint64]


@dataclass(slots=True, eq=False)
class BlockReservation:
    """One sequence holds this: a column in the arrays of the cache, and one block table for each layer group.

    ``ahead`` is what was given to `KVCache.reserve`. ``outgrown`` keeps the tables that an extension replaced, each
    with the number of its group: steps that were placed before the extension hold their addresses.
    """

    slot: int
    tokens: int
    ahead: int | None
    tables: list[Integers]
    outgrown: list[tuple[int, Integers]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlacement:
    """The rows of a step are stored here: number i in each array belongs to ``rows.runs[i]``.

    The positions of a run begin at ``starts``, are ``counts`` in number and end before ``stops``; ``row_starts`` is its
    first row. Positions below ``frozen`` are in blocks that are published or shared, which are not overwritten.
    ``addresses``, uint64 [groups, runs], are the addresses of the block tables in memory. ``attend`` and ``store`` are
    what was given to `KVCache.place`. ``sound`` says for each layer that `KVCache.require_past` has nothing to find, as
    long as the cache still counts ``losses``.
    """

    rows: Rows
    starts: Integers
    counts: Integers
    stops: Integers
    row_starts: Integers
    frozen: Integers
    addresses: Addresses
    slots: Integers
    generations: Integers
    held: tuple[BlockReservation, ...]
    attend: bool
    store: bool
    sound: list[bool]
    losses: int

    def tables(self, group: int) -> list[Integers]:
        """Return the block table of each run in a layer group.

        Entry ``i`` is the byte offset, within the memory, of the block for the positions from ``i * block_tokens`` on.
        It is -1 where the sequence has no block, because none is assigned yet or it was returned.
        """
        return [reservation.tables[group] for reservation in self.held]
