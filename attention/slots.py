"""`SequenceSlots` keeps what a cache knows of each sequence in arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lamina.attention.layout import KVLayout, LayerGroup, LayerShape
from lamina.attention.placement import BlockReservation, Integers
from lamina.attention.rows import Run
from lamina.errors import UsageError

T = TypeVar("T", bound=np.generic)


class SequenceSlots:
    """A sequence has a slot, its column in these arrays, so that all sequences of a step are looked up at once."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.groups: tuple[LayerGroup, ...] = layout.groups
        self._held: dict[int, BlockReservation] = {}
        self._free_slots: list[int] = []
        groups, layers = len(self.groups), len(layout.layers)
        self._tokens = np.zeros(0, np.int64)
        self._totals = np.zeros(0, np.int64)
        """All tokens of the sequence need this many blocks in each group."""
        self._frozen = np.zeros(0, np.int64)
        """Positions below this one are in blocks that others may hold too."""
        self._generation = np.zeros(0, np.int64)
        """This counts the sequences that have left the slot."""
        self._filled = np.zeros((layers, 0), np.int64)
        """These are the watermarks: positions 0..filled-1 are stored."""
        self._first = np.zeros((groups, 0), np.int64)
        """Blocks before this one were freed or never needed; from here up to ``_next`` blocks are assigned."""
        self._next = np.zeros((groups, 0), np.int64)
        self._counts = np.zeros((groups, 0), np.int64)
        """The sequence may hold this many blocks at once."""
        self._promised = np.zeros((groups, 0), np.int64)
        """This many blocks are set aside for the sequence and not assigned yet."""
        self._addresses = np.zeros((groups, 0), np.uint64)
        """The block tables of the sequence begin at these addresses in memory."""
        self._grow_slots(64)

    @property
    def sequences(self) -> Collection[int]:
        """These sequences hold a reservation."""
        return self._held.keys()

    def filled(self, sequence: int, layer: int) -> int:
        """Return the watermark of a layer: its positions 0..filled-1 are stored."""
        self.shape(layer)
        return int(self._filled[layer, self._reservation(sequence).slot])

    def reserved(self, sequence: int) -> int | None:
        """Return how many positions a sequence has space for; None if it holds no reservation."""
        reservation = self._held.get(sequence)
        return None if reservation is None else reservation.tokens

    def complete(self, sequence: int) -> int:
        """Return how many leading positions of a sequence are stored in every layer."""
        return int(self._filled[:, self._reservation(sequence).slot].min())

    def behind(self, runs: Sequence[Run]) -> tuple[Run, ...]:
        """Return the runs before whose start some position is not stored yet in some layer."""
        slots = np.array([self._reservation(run.sequence).slot for run in runs], dtype=np.int64)
        late = self._filled[:, slots].min(axis=0) < np.array([run.start for run in runs], dtype=np.int64)
        return tuple(run for run, is_late in zip(runs, late.tolist(), strict=True) if is_late) if late.any() else ()

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer; `UsageError` if there is no such layer."""
        if not 0 <= layer < len(self.layout.layers):
            raise UsageError(f"layer {layer}: expected 0 <= layer < {len(self.layout.layers)}")
        return self.layout.layers[layer]

    # -- inside

    def _reservation(self, sequence: int) -> BlockReservation:
        reservation = self._held.get(sequence)
        if reservation is None:
            raise UsageError(f"sequence {sequence} holds no reservation in this KV cache")
        return reservation

    def _enter(self, sequence: int, tokens: int, ahead: int | None, tables: list[Integers]) -> int:
        """Give a new sequence a slot, with these block tables for each group."""
        if not self._free_slots:
            self._grow_slots(2 * len(self._tokens))
        slot = self._free_slots.pop()
        self._tokens[slot], self._totals[slot], self._promised[:, slot] = tokens, len(tables[0]), 0
        self._addresses[:, slot] = [table.ctypes.data for table in tables]
        self._held[sequence] = BlockReservation(slot, tokens, ahead, tables)
        return slot

    def _leave(self, sequence: int) -> None:
        """Take a slot back."""
        slot = self._held.pop(sequence).slot
        self._generation[slot] += 1
        self._free_slots.append(slot)

    def _grow_slots(self, slots: int) -> None:
        """Make room for this many sequences at once."""
        before = len(self._tokens)
        self._free_slots += range(slots - 1, before - 1, -1)

        def widened(array: NDArray[T]) -> NDArray[T]:
            more = np.zeros((*array.shape[:-1], slots - before), array.dtype)
            return np.concatenate([array, more], axis=-1)

        self._tokens, self._totals = widened(self._tokens), widened(self._totals)
        self._frozen, self._generation = widened(self._frozen), widened(self._generation)
        self._filled, self._addresses = widened(self._filled), widened(self._addresses)
        self._first, self._next = widened(self._first), widened(self._next)
        self._counts, self._promised = widened(self._counts), widened(self._promised)
