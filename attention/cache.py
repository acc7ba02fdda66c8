"""The paged KV cache of one tenant: reservations, block tables and watermarks. Keys and values are the backend's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lamina.attention.blocks import Blocks, check_key
from lamina.attention.layout import KVLayout, LayerGroup, LayerShape, window_blocks
from lamina.attention.pool import ALIGNMENT, Pool, most_blocks
from lamina.attention.rows import Rows
from lamina.errors import CapacityError, UsageError

T = TypeVar("T", bound=np.generic)
Integers = NDArray[np.int64]
Addresses = NDArray[np.uint64]

LayerBytes = Callable[[LayerShape, str, int], int]
"""Bytes of a block of so many tokens in one layer, from its shape and the type stored: a backend's choice."""


@dataclass(slots=True, eq=False)
class Reservation:
    """What one sequence holds: its column in the arrays of the cache, and by layer group its block table.

    ``ahead`` is what it was reserved with. ``outgrown`` tables are kept, since steps that were placed before an
    extension have their addresses.
    """

    slot: int
    tokens: int
    ahead: int | None
    tables: list[Integers]
    outgrown: list[tuple[int, Integers]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the rows of a step live: number i in each array belongs to ``rows.runs[i]``.

    starts, counts: its positions; row_starts: its first row; frozen: positions below are in published blocks, which
    are not to be overwritten; addresses: uint64 [groups, runs], where the block tables lie in memory; attend: whether
    the rows may attend, and store: whether they may be stored, see `KVCache.place`; sound: by layer, whether
    `KVCache.require_past` has nothing to find as long as the cache counts so many ``losses``.
    """

    rows: Rows
    starts: Integers
    counts: Integers
    row_starts: Integers
    frozen: Integers
    addresses: Addresses
    slots: Integers
    generations: Integers
    held: tuple[Reservation, ...]
    attend: bool
    store: bool
    sound: list[bool]
    losses: int

    def tables(self, group: int) -> list[Integers]:
        """The block table of each run in a layer group: for positions from ``i * block_tokens`` on, the byte offset of
        their block within the memory; -1 where there is none, because none is assigned yet or it went back."""
        return [reservation.tables[group] for reservation in self.held]


class KVCache:
    """The blocks of many sequences, in extents of a pool that is the cache's alone.

    The layers of a `LayerGroup` share blocks: a block holds ``layout.block_tokens`` positions in all layers of its
    group, one layer behind the other, of ``layer_bytes`` each. A sequence has a block table for each group. What it may
    come to need is set aside at `reserve`, and assigned when a position is first placed. Where a group has a window,
    blocks wholly behind it go back. Blocks of prompts may be shared under keys of 16 bytes, which say what they hold.
    Belongs to one thread. A refused operation changes nothing.
    """

    def __init__(self, layout: KVLayout, pool: Pool, layer_bytes: LayerBytes) -> None:
        """Take no memory yet. `CapacityError` when not even one block of every group could be had."""
        self._pool = pool
        self.layout = layout
        self.memory = pool.memory
        self.extent_bytes = pool.extent_bytes
        """Blocks lie at multiples of their size behind multiples of this."""
        self.groups: tuple[LayerGroup, ...] = layout.groups
        self._group_of = [0] * len(layout.layers)
        self._offsets = [0] * len(layout.layers)
        self.block_bytes: list[int] = []
        """By layer group: bytes of a block in all its layers."""
        for index, group in enumerate(self.groups):
            size = 0
            for layer in group.layers:
                self._group_of[layer], self._offsets[layer] = index, size
                size += layer_bytes(layout.layers[layer], layout.dtype, layout.block_tokens)
            if size % ALIGNMENT:
                raise UsageError(f"blocks of {size} bytes; expected a multiple of {ALIGNMENT}")
            self.block_bytes.append(size)
        blocks = most_blocks(pool.extents, pool.extent_bytes, self.block_bytes)
        if not blocks:
            raise CapacityError(
                f"a KV cache of {pool.memory.nbytes} bytes cannot hold one block: {layout.block_tokens} tokens "
                f"take {sum(self.block_bytes)} bytes, in extents of {pool.extent_bytes}; give it more memory"
            )
        self.capacity_tokens = blocks * layout.block_tokens
        """Positions that it can hold if no window saves anything."""
        self._blocks = [
            Blocks(pool, size, share=-(-blocks // (pool.extent_bytes // size)), returning=bool(group.window))
            for group, size in zip(self.groups, self.block_bytes, strict=True)
        ]
        self._windowed = [index for index, group in enumerate(self.groups) if group.window is not None]
        self._held: dict[int, Reservation] = {}
        # Of each sequence, in the column of its slot, so that a step's sequences are looked up all at once:
        self._free_slots: list[int] = []
        groups, layers = len(self.groups), len(layout.layers)
        self._tokens = np.zeros(0, np.int64)
        self._totals = np.zeros(0, np.int64)
        """Blocks of each group for all of its tokens."""
        self._frozen = np.zeros(0, np.int64)
        """Positions below are in published blocks."""
        self._generation = np.zeros(0, np.int64)
        """How many sequences have left the slot."""
        self._filled = np.zeros((layers, 0), np.int64)
        """Watermarks: positions 0..filled-1 have been stored."""
        self._first = np.zeros((groups, 0), np.int64)
        """Blocks before this one went back, or were never needed; from here to ``_next`` they are assigned."""
        self._next = np.zeros((groups, 0), np.int64)
        self._counts = np.zeros((groups, 0), np.int64)
        """Blocks that it may hold at once."""
        self._promised = np.zeros((groups, 0), np.int64)
        """Blocks set aside for it and not yet assigned."""
        self._addresses = np.zeros((groups, 0), np.uint64)
        """Where its block tables lie in memory."""
        self._grow_slots(64)
        self._losses = 0
        """How often somebody's positions went away: sequences released, and blocks that a window had passed."""

    @property
    def free_tokens(self) -> int:
        """Positions that can still be reserved, in whole blocks, if no window saves anything."""
        low, high = 0, self.capacity_tokens // self.layout.block_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits([middle] * len(self.groups)):
                low = middle
            else:
                high = middle - 1
        return low * self.layout.block_tokens

    @property
    def sequences(self) -> Collection[int]:
        """The sequences that hold a reservation."""
        return self._held.keys()

    # -- reservations

    def reserve(self, sequence: int, tokens: int, *, ahead: int | None = None, keys: Sequence[bytes] = ()) -> int:
        """Hold space for the positions 0..tokens-1; `CapacityError` if there is too little.

        ``ahead`` is the most positions by which layers of a group can be apart, a step's own rows included; the less,
        the fewer blocks a windowed group sets aside. None: any number, so that windows save nothing.
        ``keys`` name the content of the leading blocks. Returns how many leading positions were found published and
        are shared, in whole blocks, and where groups have windows never all: the watermark of every layer starts there.
        """
        if sequence in self._held:
            raise UsageError(f"sequence {sequence} already holds a reservation; release it first")
        if tokens < 1:
            raise UsageError(f"sequence {sequence}: expected a reservation of at least 1 token, got {tokens}")
        if ahead is not None and ahead < 1:
            raise UsageError(f"sequence {sequence}: expected ahead >= 1, got {ahead}")
        size = self.layout.block_tokens
        total = -(-tokens // size)
        shared = self.match(keys[: (tokens - bool(self._windowed)) // size])
        found = self._find(keys[: shared // size])
        counts = [self._count(group, total, ahead or tokens) for group in self.groups]
        needs = [min(count - len(own), total - shared // size) for count, (_, own) in zip(counts, found, strict=True)]
        for blocks, (_, own) in zip(self._blocks, found, strict=True):
            blocks.hold(own)
        if not self._fits(needs):
            for blocks, (_, own) in zip(self._blocks, found, strict=True):
                blocks.give(own)
            raise self._missing(sequence, tokens)
        self._make_room(needs)

        if not self._free_slots:
            self._grow_slots(2 * len(self._tokens))
        slot = self._free_slots.pop()
        tables = []
        for index, (first, own) in enumerate(found):
            table = np.full(total, -1, dtype=np.int64)
            table[first : first + len(own)] = own
            tables.append(table)
            self._addresses[index, slot] = table.ctypes.data
            self._first[index, slot], self._next[index, slot] = first, shared // size
            self._counts[index, slot], self._totals[slot] = counts[index], total
            self._promised[index, slot] = needs[index]
            self._blocks[index].promised += needs[index]
        self._tokens[slot] = tokens
        self._frozen[slot] = shared
        self._filled[:, slot] = shared
        self._held[sequence] = Reservation(slot, tokens, ahead, tables)
        return shared

    def extend(self, sequence: int, tokens: int) -> None:
        """Hold space for more positions than before, 0..tokens-1; `CapacityError` if there is too little."""
        reservation = self._reservation(sequence)
        if tokens <= reservation.tokens:
            raise UsageError(
                f"sequence {sequence} holds {reservation.tokens} tokens; expected more for an extension, got {tokens}"
            )
        slot, total = reservation.slot, -(-tokens // self.layout.block_tokens)
        counts = [self._count(group, total, reservation.ahead or tokens) for group in self.groups]
        needs = [self._unassigned(i, slot, c, total) - int(self._promised[i, slot]) for i, c in enumerate(counts)]
        if not self._fits(needs):
            raise self._missing(sequence, tokens - reservation.tokens, "more ")
        self._make_room(needs)
        for index, table in enumerate(reservation.tables):
            if total > len(table):
                # By half, so that a sequence that grows by little is not copied each time.
                wider = np.full(max(total, 3 * len(table) // 2), -1, dtype=np.int64)
                wider[: len(table)] = table
                reservation.outgrown.append((index, table))
                reservation.tables[index] = wider
                self._addresses[index, slot] = wider.ctypes.data
            self._counts[index, slot] = counts[index]
            self._promised[index, slot] += needs[index]
            self._blocks[index].promised += needs[index]
        self._totals[slot] = total
        self._tokens[slot] = reservation.tokens = tokens

    def release(self, sequence: int) -> None:
        """Give all blocks of a sequence back; `UsageError` if it holds none."""
        reservation = self._reservation(sequence)
        slot = reservation.slot
        for index, blocks in enumerate(self._blocks):
            table = reservation.tables[index]
            # From the end, because without its first blocks a published prompt is of no use.
            blocks.give(table[table >= 0][::-1].tolist())
            blocks.promised -= int(self._promised[index, slot])
            blocks.tidy()
        self._generation[slot] += 1
        self._losses += 1
        self._free_slots.append(slot)
        del self._held[sequence]

    def filled(self, sequence: int, layer: int) -> int:
        """The watermark of a layer: its positions 0..filled-1 have all been stored."""
        self.shape(layer)
        return int(self._filled[layer, self._reservation(sequence).slot])

    def reserved(self, sequence: int) -> int:
        """Positions that a sequence has space for; `UsageError` if it holds none."""
        return self._reservation(sequence).tokens

    def complete(self, sequence: int) -> int:
        """How many leading positions have been stored in every layer."""
        return int(self._filled[:, self._reservation(sequence).slot].min())

    # -- prompts that are shared

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading positions of a prompt whose blocks have these ``keys`` could be shared now.

        All blocks have to be there, of windowed groups those that the window still reaches.
        """
        size = self.layout.block_tokens
        there = [True] * (len(keys) + 1)
        for group, blocks in zip(self.groups, self._blocks, strict=True):
            found = 0
            for usable, key in enumerate(keys, start=1):
                found = found + 1 if blocks.find(key) is not None else 0
                there[usable] &= found >= usable - self._behind(group, usable * size)
        return size * max(usable for usable, every in enumerate(there) if every)

    def publish(self, sequence: int, keys: Sequence[bytes]) -> None:
        """Let others share the leading ``len(keys)`` blocks of a sequence, which have to be complete in every layer.

        They are not overwritten from now on. Where a key is taken already, its first block stays; blocks that went
        back from behind a window are left out.
        """
        reservation = self._reservation(sequence)
        stop = len(keys) * self.layout.block_tokens
        complete = self.complete(sequence)
        if stop > complete:
            raise UsageError(
                f"sequence {sequence}: {len(keys)} blocks of {self.layout.block_tokens} positions are to be published, "
                f"but only {complete} positions are stored in every layer"
            )
        for key in keys:
            check_key(key)
        for blocks, table in zip(self._blocks, reservation.tables, strict=True):
            for key, block in zip(keys, table[: len(keys)].tolist(), strict=True):
                if block >= 0:
                    blocks.publish(block, key)
        self._frozen[reservation.slot] = max(self._frozen[reservation.slot], stop)

    # -- for backends: place the rows of a step once, use what was found in every layer

    def place(self, rows: Rows, *, attend: bool = True, store: bool = True) -> Placement:
        """Find where ``rows`` live, assign the blocks that they are first to use, and let those behind windows go.
        Without ``store``, rows are not going to be stored, and have no blocks.

        `CapacityError` where they go beyond their reservations. With ``attend``, `UsageError` where a row's window
        reaches positions that went back already; without, rows at such positions have no block and are not stored.
        """
        held = tuple([self._reservation(run.sequence) for run in rows.runs])
        slots = np.array([reservation.slot for reservation in held], dtype=np.int64)
        starts = np.array([run.start for run in rows.runs], dtype=np.int64)
        counts = np.array([run.count for run in rows.runs], dtype=np.int64)
        stops = starts + counts
        if store and (stops > self._tokens[slots]).any():
            i = int((stops > self._tokens[slots]).argmax())
            raise CapacityError(
                f"sequence {rows.runs[i].sequence} has space reserved for {held[i].tokens} tokens, "
                f"position {stops[i] - 1} needs {stops[i]}"
            )
        size = self.layout.block_tokens
        last = self._next[:, slots]
        if store:
            last = np.maximum(last, -(-stops // size))
        first = self._first[:, slots]
        for index in self._windowed:
            first[index] = self._new_first(index, rows, slots, starts, last[index], attend=attend)
        for index, i in zip(*np.nonzero((first > self._first[:, slots]) | (last > self._next[:, slots])), strict=True):
            self._move(int(index), held[i], int(first[index, i]), int(last[index, i]))
        return Placement(
            rows=rows,
            starts=starts,
            counts=counts,
            row_starts=np.cumsum(counts) - counts,
            frozen=self._frozen[slots],
            addresses=self._addresses[:, slots],
            slots=slots,
            generations=self._generation[slots],
            held=held,
            attend=attend,
            store=store,
            sound=((self._filled[:, slots] - starts).min(axis=1) >= 0).tolist(),
            losses=self._losses,
        )

    def require_past(self, layer: int, placement: Placement) -> None:
        """`UsageError` unless every position before each run is there, in the blocks that were found for it.

        Of rows that attend, no position that a window reaches may have gone back since they were placed.
        """
        if placement.sound[layer] and placement.losses == self._losses:
            return
        slots = placement.slots
        if (self._generation[slots] != placement.generations).any():
            i = int((self._generation[slots] != placement.generations).argmax())
            raise UsageError(f"sequence {placement.rows.runs[i].sequence} was released after its step had been planned")
        filled = self._filled[layer, slots]
        if (placement.starts > filled).any():
            i = int((placement.starts > filled).argmax())
            raise UsageError(
                f"sequence {placement.rows.runs[i].sequence}, layer {layer}: position {placement.starts[i]} comes "
                f"after {filled[i]} stored ones; the positions between are missing"
            )
        placement.sound[layer] = True
        group = self._group_of[layer]
        window = self.groups[group].window
        if window is None or not placement.attend:
            return
        gone = self._first[group, slots] * self.layout.block_tokens
        if (gone > np.maximum(placement.starts - window + 1, 0)).any():
            i = int((gone > np.maximum(placement.starts - window + 1, 0)).argmax())
            raise UsageError(
                f"sequence {placement.rows.runs[i].sequence}, layer {layer}: positions before {gone[i]} went back "
                f"after the step at {placement.starts[i]} had been planned, and its window reaches them; plan it anew "
                f"before later steps"
            )

    def advance(self, layer: int, placement: Placement) -> None:
        """The rows have been stored in ``layer``: raise its watermarks. Errors are those of `require_past`."""
        self.require_past(layer, placement)
        filled, slots = self._filled[layer], placement.slots
        filled[slots] = np.maximum(filled[slots], placement.starts + placement.counts)

    def require_space(self, placement: Placement) -> None:
        """`UsageError` for rows that are not to be stored."""
        if not placement.store:
            raise UsageError("rows that were planned without store are to be stored; plan them with it")

    def stored(self, sequence: int, layer: int, start: int, stop: int) -> Integers:
        """The block table for reading the positions start..stop-1 of a layer; `UsageError` unless all are there."""
        reservation = self._reservation(sequence)
        filled, group = self.filled(sequence, layer), self.group_of(layer)
        gone = int(self._first[group, reservation.slot]) * self.layout.block_tokens
        if not gone <= start < stop <= filled:
            raise UsageError(
                f"sequence {sequence}, layer {layer}: the positions {start}..{stop - 1} were asked for, "
                f"there are {gone}..{filled - 1}"
            )
        return reservation.tables[group]

    def shape(self, layer: int) -> LayerShape:
        """The shape of a layer; `UsageError` if there is no such layer."""
        if not 0 <= layer < len(self.layout.layers):
            raise UsageError(f"layer {layer}: expected 0 <= layer < {len(self.layout.layers)}")
        return self.layout.layers[layer]

    def group_of(self, layer: int) -> int:
        """The number of the layer group that a layer belongs to."""
        return self._group_of[layer]

    def layer_offset(self, layer: int) -> int:
        """Where a layer begins within the blocks of its group, in bytes."""
        return self._offsets[layer]

    # -- inside

    def _reservation(self, sequence: int) -> Reservation:
        if sequence not in self._held:
            raise UsageError(f"sequence {sequence} holds no reservation in this KV cache")
        return self._held[sequence]

    def _count(self, group: LayerGroup, total: int, ahead: int) -> int:
        """Blocks that a sequence can hold at once in a group."""
        if group.window is None:
            return total
        return min(total, window_blocks(group.window, ahead, self.layout.block_tokens))

    def _behind(self, group: LayerGroup, position: int) -> int:
        """How many blocks of a group lie wholly behind the window of ``position``."""
        return 0 if group.window is None else max(0, position - group.window + 1) // self.layout.block_tokens

    def _find(self, keys: Sequence[bytes]) -> list[tuple[int, list[int]]]:
        """By group: the first block that ``len(keys)`` shared blocks need, and those from there on."""
        found = []
        for group, blocks in zip(self.groups, self._blocks, strict=True):
            first = self._behind(group, len(keys) * self.layout.block_tokens)
            own = [blocks.find(key) for key in keys[first:]]
            found.append((first, [block for block in own if block is not None]))
        return found

    def _fits(self, needs: Sequence[int]) -> bool:
        """Whether each group could promise so many more blocks."""
        wanted = sum(blocks.extents_for(need) for blocks, need in zip(self._blocks, needs, strict=True))
        beyond = sum(blocks.extents_beyond(need) for blocks, need in zip(self._blocks, needs, strict=True))
        return wanted <= self._pool.available + beyond

    def _make_room(self, needs: Sequence[int]) -> None:
        """Take the extents that the promises need, where there are none left from other groups; see `_fits`."""
        for blocks, need in zip(self._blocks, needs, strict=True):
            for _ in range(blocks.extents_for(need)):
                if self._pool.available < 1:
                    next(b for b, n in zip(self._blocks, needs, strict=True) if b.extents_beyond(n)).shrink()
                blocks.grow()
        for blocks, need in zip(self._blocks, needs, strict=True):
            blocks.keep_idle(need)

    def _new_first(
        self, group: int, rows: Rows, slots: Integers, starts: Integers, last: Integers, *, attend: bool
    ) -> Integers:
        """The first block that each run of a step leaves in a windowed group. Changes nothing yet."""
        window, size = self.groups[group].window or 0, self.layout.block_tokens
        before = self._first[group, slots]
        layers = np.array(self.groups[group].layers)
        oldest = np.minimum(starts, self._filled[layers[:, None], slots].min(0)) - window + 1
        reached = np.maximum(starts - window + 1, 0) // size
        if attend and (reached < before).any():
            i = int((reached < before).argmax())
            raise UsageError(
                f"sequence {rows.runs[i].sequence}: the window of position {starts[i]} reaches back to "
                f"{reached[i] * size}, but positions before {before[i] * size} went back already"
            )
        first: Integers = np.maximum(before, np.maximum(oldest, 0) // size)
        if (last - first > self._counts[group, slots]).any():
            i = int((last - first > self._counts[group, slots]).argmax())
            raise CapacityError(
                f"sequence {rows.runs[i].sequence}, layers with a window of {window}: positions {first[i] * size} to "
                f"{last[i] * size - 1} are needed at once, {self._counts[group, slots[i]]} blocks of {size} were "
                f"reserved; layers are further apart than the reservation said"
            )
        return first

    def _move(self, group: int, reservation: Reservation, first: int, last: int) -> None:
        """Let a sequence hold exactly the blocks first..last-1 of a group."""
        blocks, table, slot = self._blocks[group], reservation.tables[group], reservation.slot
        old_first, old_next = int(self._first[group, slot]), int(self._next[group, slot])
        if first > old_first:
            blocks.give(table[old_first:first].tolist())
            table[old_first:first] = -1
            self._losses += 1
            # What was given back can be taken again: this sequence has a right to a number of blocks.
            blocks.promised += first - old_first
        if last > old_next:
            table[old_next:last] = blocks.take(last - old_next)
            for index, old in reservation.outgrown:
                if index == group:  # read by steps that only meet what is there when they come to it
                    old[old_next:last] = table[old_next : min(last, len(old))]
        self._first[group, slot], self._next[group, slot] = first, last
        promised = self._unassigned(group, slot, int(self._counts[group, slot]), int(self._totals[slot]))
        blocks.promised += promised - int(self._promised[group, slot]) - (first - old_first) + (last - old_next)
        self._promised[group, slot] = promised
        if first > old_first:
            blocks.tidy()

    def _unassigned(self, group: int, slot: int, count: int, total: int) -> int:
        """Blocks to be set aside for one that may hold ``count`` at once, of ``total`` in the end."""
        first, after = int(self._first[group, slot]), int(self._next[group, slot])
        return min(count - (after - first), total - after)

    def _missing(self, sequence: int, tokens: int, more: str = "") -> CapacityError:
        return CapacityError(
            f"sequence {sequence} needs {tokens} {more}tokens of KV cache, "
            f"{self.free_tokens} of {self.capacity_tokens} are free"
        )

    def _grow_slots(self, slots: int) -> None:
        """Room for so many sequences at once."""
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
