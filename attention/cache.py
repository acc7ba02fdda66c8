"""A `KVCache` keeps account of the blocks of one tenant: reservations, block tables and watermarks.

The backend stores the keys and values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lamina.attention.blocks import BlockPool, check_key
from lamina.attention.layout import KVLayout, LayerGroup, LayerShape, window_blocks
from lamina.attention.placement import BlockPlacement, BlockReservation, Integers
from lamina.attention.pool import ALIGNMENT, ExtentPool, most_blocks
from lamina.attention.rows import Rows, Run
from lamina.errors import CapacityError, UsageError

T = TypeVar("T", bound=np.generic)
LayerBytes = Callable[[LayerShape, str, int], int]
"""A backend says with this how many bytes one layer takes in a block: it is called with the shape of the layer, the
type stored and the tokens of a block."""


class KVCache:
    """The cache keeps account of the blocks of many sequences, in extents of a pool that only this cache uses.

    The layers of a `LayerGroup` share blocks: a block holds ``layout.block_tokens`` positions in all layers of its
    group, one layer after the other, with ``layer_bytes`` for each. A sequence has a block table for each group. The
    blocks that it may need are set aside by `reserve`, and each is assigned when one of its positions is first placed.
    Where a group has a window, the blocks that lie wholly behind it are freed. Sequences may share the blocks of their
    prompts under keys of 16 bytes, which say what the blocks hold. The cache belongs to one thread. An operation that
    is refused changes nothing.
    """

    def __init__(self, layout: KVLayout, pool: ExtentPool, layer_bytes: LayerBytes) -> None:
        """Create an empty cache; `CapacityError` if the pool is too small for one block of every group.

        The cache takes extents from the pool when sequences reserve blocks.
        """
        self._pool = pool
        self.layout = layout
        self.memory = pool.memory
        self.extent_bytes = pool.extent_bytes
        """A block begins at a multiple of its size, counted from a multiple of this."""
        self.groups: tuple[LayerGroup, ...] = layout.groups
        self._group_of = [0] * len(layout.layers)
        self._offsets = [0] * len(layout.layers)
        self.block_bytes: list[int] = []
        """Each layer group has blocks of this many bytes, over all its layers."""
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
        """The cache can hold this many positions if no window saves space."""
        self._blocks = [
            BlockPool(pool, size, share=-(-blocks // (pool.extent_bytes // size)), returning=bool(group.window))
            for group, size in zip(self.groups, self.block_bytes, strict=True)
        ]
        self._windowed = [index for index, group in enumerate(self.groups) if group.window is not None]
        self._held: dict[int, BlockReservation] = {}
        # A sequence has a slot, its column in these arrays, so that all sequences of a step are looked up at once.
        self._free_slots: list[int] = []
        groups, layers = len(self.groups), len(layout.layers)
        self._tokens = np.zeros(0, np.int64)
        self._totals = np.zeros(0, np.int64)
        """All tokens of the sequence need this many blocks in each group."""
        self._frozen = np.zeros(0, np.int64)
        """Positions below this one are in published blocks."""
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
        self._losses = 0
        """This counts how often stored positions were lost: by a release, or because a window had passed a block."""

    @property
    def free_tokens(self) -> int:
        """The cache has space for this many more positions, in whole blocks, if no window saves space."""
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
        """These sequences hold a reservation."""
        return self._held.keys()

    # -- reservations

    def reserve(self, sequence: int, tokens: int, *, ahead: int | None = None, keys: Sequence[bytes] = ()) -> int:
        """Reserve space for the positions 0..tokens-1; `CapacityError` if there is too little.

        The layers of a group may be at most ``ahead`` positions apart, the rows of a step included: the smaller this
        is, the fewer blocks a windowed group sets aside. None allows any distance, so that windows save no space.
        ``keys`` name the content of the leading blocks. The result is how many leading positions were found published
        and are shared now, in whole blocks; every watermark of the sequence starts there. Where groups have windows,
        the result is below ``tokens``.
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
                blocks.free(own)
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
        self._held[sequence] = BlockReservation(slot, tokens, ahead, tables)
        return shared

    def extend(self, sequence: int, tokens: int) -> None:
        """Reserve space for more positions than before, 0..tokens-1; `CapacityError` if there is too little."""
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
                # The table grows by half, so that it is not copied each time that its sequence grows a little.
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
        """Free all blocks of a sequence; `UsageError` if it holds no reservation."""
        reservation = self._reservation(sequence)
        slot = reservation.slot
        for index, blocks in enumerate(self._blocks):
            table = reservation.tables[index]
            # The last blocks become idle first, because a published prompt is of no use without its first blocks.
            blocks.free(table[table >= 0][::-1].tolist())
            blocks.promised -= int(self._promised[index, slot])
            blocks.tidy()
        self._generation[slot] += 1
        self._losses += 1
        self._free_slots.append(slot)
        del self._held[sequence]

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

    # -- prompts that are shared

    def match(self, keys: Sequence[bytes]) -> int:
        """Return how many leading positions of a prompt whose blocks have these ``keys`` could be shared now.

        All of these blocks have to be published; in windowed groups only those that the window still reaches.
        """
        size = self.layout.block_tokens
        there = [True] * (len(keys) + 1)
        for group, blocks in zip(self.groups, self._blocks, strict=True):
            found = 0
            for usable, key in enumerate(keys, start=1):
                found = found + 1 if blocks.find(key) is not None else 0
                there[usable] &= found >= usable - self._behind(group, usable * size)
        return size * max(usable for usable, every in enumerate(there) if every)

    def publish(self, sequence: int, keys: Sequence[bytes], first: int = 0) -> None:
        """Let other sequences share ``len(keys)`` blocks of a sequence, from number ``first`` on; `UsageError` for
        incomplete blocks.

        The blocks are not overwritten from now on. A key that is taken already keeps its first block. Blocks that were
        freed behind a window are left out.
        """
        reservation = self._reservation(sequence)
        stop = (first + len(keys)) * self.layout.block_tokens
        complete = self.complete(sequence)
        if stop > complete:
            raise UsageError(
                f"sequence {sequence}: {first + len(keys)} blocks of {self.layout.block_tokens} positions are to be "
                f"published, but only {complete} positions are stored in every layer"
            )
        for key in keys:
            check_key(key)
        for blocks, table in zip(self._blocks, reservation.tables, strict=True):
            for key, block in zip(keys, table[first : first + len(keys)].tolist(), strict=True):
                if block >= 0:
                    blocks.publish(block, key)
        self._frozen[reservation.slot] = max(self._frozen[reservation.slot], stop)

    # -- for backends, which place the rows of a step once and use the placement in every layer

    def place(self, rows: Rows, *, attend: bool = True, store: bool = True) -> BlockPlacement:
        """Find the blocks of ``rows``, assign those that are used for the first time, and free those behind windows.

        Without ``store``, the rows will not be stored, and no blocks are assigned for them. `CapacityError` where rows
        lie beyond their reservation. With ``attend``, `UsageError` where the window of a row reaches positions that
        were freed already; without it, rows at such positions have no block and are not stored.
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
        moves = (first > self._first[:, slots]) | (last > self._next[:, slots])
        for index in np.nonzero(moves.any(axis=1))[0].tolist():
            which = np.nonzero(moves[index])[0]
            self._move(index, [held[i] for i in which.tolist()], first[index, which], last[index, which])
        return BlockPlacement(
            rows=rows,
            starts=starts,
            counts=counts,
            stops=stops,
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

    def require_past(self, layer: int, placement: BlockPlacement) -> None:
        """Raise `UsageError` unless all positions before each run are stored, in the blocks that were found for them.

        Where rows attend, no position that a window reaches may have been freed since the rows were placed.
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
                f"sequence {placement.rows.runs[i].sequence}, layer {layer}: positions before {gone[i]} were freed "
                f"after the step at {placement.starts[i]} had been planned, and its window reaches them; plan it anew "
                f"before later steps"
            )

    def advance(self, layer: int, placement: BlockPlacement) -> None:
        """Raise the watermarks of ``layer``, in which the rows are stored now. Errors are those of `require_past`."""
        self.require_past(layer, placement)
        filled, slots = self._filled[layer], placement.slots
        filled[slots] = np.maximum(filled[slots], placement.stops)

    def require_space(self, placement: BlockPlacement) -> None:
        """Raise `UsageError` for rows that were placed without ``store``."""
        if not placement.store:
            raise UsageError("rows that were planned without store are to be stored; plan them with it")

    def shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer; `UsageError` if there is no such layer."""
        if not 0 <= layer < len(self.layout.layers):
            raise UsageError(f"layer {layer}: expected 0 <= layer < {len(self.layout.layers)}")
        return self.layout.layers[layer]

    def group_of(self, layer: int) -> int:
        """Return the number of the layer group to which a layer belongs."""
        return self._group_of[layer]

    def layer_offset(self, layer: int) -> int:
        """Return where a layer begins within the blocks of its group, in bytes."""
        return self._offsets[layer]

    # -- inside

    def _reservation(self, sequence: int) -> BlockReservation:
        reservation = self._held.get(sequence)
        if reservation is None:
            raise UsageError(f"sequence {sequence} holds no reservation in this KV cache")
        return reservation

    def _count(self, group: LayerGroup, total: int, ahead: int) -> int:
        """Return how many blocks of a group a sequence can hold at once."""
        if group.window is None:
            return total
        return min(total, window_blocks(group.window, ahead, self.layout.block_tokens))

    def _behind(self, group: LayerGroup, position: int) -> int:
        """Return how many blocks of a group lie wholly behind the window of ``position``."""
        return 0 if group.window is None else max(0, position - group.window + 1) // self.layout.block_tokens

    def _find(self, keys: Sequence[bytes]) -> list[tuple[int, list[int]]]:
        """Return for each group the first block that ``len(keys)`` shared blocks need, and the blocks from there on."""
        found = []
        for group, blocks in zip(self.groups, self._blocks, strict=True):
            first = self._behind(group, len(keys) * self.layout.block_tokens)
            own = [blocks.find(key) for key in keys[first:]]
            found.append((first, [block for block in own if block is not None]))
        return found

    def _fits(self, needs: Sequence[int]) -> bool:
        """Return whether each group could promise this many more blocks."""
        wanted = sum(blocks.extents_for(need) for blocks, need in zip(self._blocks, needs, strict=True))
        beyond = sum(blocks.extents_beyond(need) for blocks, need in zip(self._blocks, needs, strict=True))
        return wanted <= self._pool.available + beyond

    def _make_room(self, needs: Sequence[int]) -> None:
        """Take the extents that the promises need, from other groups if the pool has none left; see `_fits`."""
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
        """Return the first block that each run of a step keeps in a windowed group, and change nothing yet."""
        window, size = self.groups[group].window or 0, self.layout.block_tokens
        before = self._first[group, slots]
        layers = np.array(self.groups[group].layers)
        oldest = np.minimum(starts, self._filled[layers[:, None], slots].min(0)) - window + 1
        reached = np.maximum(starts - window + 1, 0) // size
        if attend and (reached < before).any():
            i = int((reached < before).argmax())
            raise UsageError(
                f"sequence {rows.runs[i].sequence}: the window of position {starts[i]} reaches back to "
                f"{reached[i] * size}, but positions before {before[i] * size} were freed already"
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

    def _move(self, group: int, held: Sequence[BlockReservation], first: Integers, last: Integers) -> None:
        """Make sequences hold exactly the blocks first..last-1 of a group."""
        blocks = self._blocks[group]
        slots = np.array([reservation.slot for reservation in held], dtype=np.int64)
        freed, assigned = first - self._first[group, slots], last - self._next[group, slots]
        if freed.any():
            for reservation, stop, count in zip(held, first.tolist(), freed.tolist(), strict=True):
                if count:
                    table = reservation.tables[group]
                    blocks.free(table[stop - count : stop].tolist())
                    table[stop - count : stop] = -1
                    self._losses += 1
            # The sequences keep their right to a number of blocks: they may allocate others for those that they freed.
            blocks.promised += int(freed.sum())
        fresh = iter(blocks.allocate(int(assigned.sum())))
        for reservation, stop, count in zip(held, last.tolist(), assigned.tolist(), strict=True):
            if count:
                start, own = stop - count, list(islice(fresh, count))
                reservation.tables[group][start:stop] = own
                for index, old in reservation.outgrown:
                    if index == group:  # steps that were placed before read blocks that are assigned now
                        old[start:stop] = own[: max(0, len(old) - start)]
        self._first[group, slots], self._next[group, slots] = first, last
        promised = np.minimum(self._counts[group, slots] - (last - first), self._totals[slots] - last)
        blocks.promised += int((promised - self._promised[group, slots] - freed + assigned).sum())
        self._promised[group, slots] = promised
        if freed.any():
            blocks.tidy()

    def _unassigned(self, group: int, slot: int, count: int, total: int) -> int:
        """Return how many blocks to set aside for a sequence that may hold ``count`` at once, ``total`` in the end."""
        first, after = int(self._first[group, slot]), int(self._next[group, slot])
        return min(count - (after - first), total - after)

    def _missing(self, sequence: int, tokens: int, more: str = "") -> CapacityError:
        return CapacityError(
            f"sequence {sequence} needs {tokens} {more}tokens of KV cache, "
            f"{self.free_tokens} of {self.capacity_tokens} are free"
        )

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
