"""A `KVCache` keeps account of the blocks of one tenant: reservations, block tables and watermarks.

The backend stores the keys and values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from lamina.attention.blocks import BlockPools, check_key
from lamina.attention.layout import ALIGNMENT, KVLayout, LayerGroup, LayerShape, window_blocks
from lamina.attention.placement import BlockPlacement, BlockReservation, Integers
from lamina.attention.pool import ExtentPool, most_blocks
from lamina.attention.rows import Rows
from lamina.attention.slots import SequenceSlots
from lamina.attention.transfers import Transfers
from lamina.errors import CapacityError, UsageError

LayerBytes = Callable[[LayerShape, str, int], int]
"""A backend says with this how many bytes one layer takes in a block: it is called with the shape of the layer, the
type stored and the tokens of a block."""


class KVCache(SequenceSlots):
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
        super().__init__(layout)
        self.memory = pool.memory
        self.extent_bytes = pool.extent_bytes
        """A block begins at a multiple of its size, counted from a multiple of this."""
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
        self._pools = BlockPools(pool, self.block_bytes, blocks, [bool(group.window) for group in self.groups])
        self._blocks = self._pools.groups
        self.transfers = Transfers(self._pools)
        """Blocks that another cache sends."""
        self._windowed = [index for index, group in enumerate(self.groups) if group.window is not None]
        self._losses = 0
        """This counts how often stored positions were lost: by a release, or because a window had passed a block."""

    @property
    def free_tokens(self) -> int:
        """The cache has space for this many more positions, in whole blocks, if no window saves space."""
        size = self.layout.block_tokens
        return size * self._pools.most(self.capacity_tokens // size)

    # -- reservations

    def reserve(self, sequence: int, tokens: int, *, ahead: int | None = None, keys: Sequence[bytes] = ()) -> int:
        """Reserve space for the positions 0..tokens-1; `CapacityError` if there is too little.

        The layers of a group may be at most ``ahead`` positions apart, the rows of a step included: the smaller this
        is, the fewer blocks a windowed group sets aside. None allows any distance, so that windows save no space.
        ``keys`` name the content of the leading blocks. The result is how many leading positions were found published
        and are shared now, in whole blocks; every watermark of the sequence starts there. Where groups have windows,
        the result is below ``tokens``.
        """
        self._require_new(sequence, tokens)
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
        if not self._pools.fit(needs):
            for blocks, (_, own) in zip(self._blocks, found, strict=True):
                blocks.free(own)
            raise self._missing(sequence, tokens)
        self._pools.make_room(needs)

        tables = [_table(total, first, own) for first, own in found]
        slot = self._enter(sequence, tokens, ahead, tables)
        self._set_aside(slot, counts, needs)
        self._first[:, slot], self._next[:, slot] = [first for first, _ in found], shared // size
        self._frozen[slot] = self._filled[:, slot] = shared
        return shared

    def derive(
        self,
        sequence: int,
        tokens: int,
        *,
        parent: int | None = None,
        without: tuple[int, int] = (0, 0),
        transfer: int | None = None,
    ) -> int:
        """Reserve space for the positions 0..tokens-1 of a new sequence that consists of blocks that are there.

        It has the blocks of ``transfer``, which belong to it from now on, then those of ``parent``, also its last one,
        except (first, number) ``without``, which have to be full. Both sequences hold these; full ones are not
        overwritten for the new one, and a last one that is not full only one of the two may go on with. The result is
        how many leading positions are stored in every layer.

        `CapacityError` if there is too little space. `UsageError` for blocks that are not there or not full, and where
        layers have windows.
        """
        self._require_new(sequence, tokens)
        self.require_movable()
        if parent is None and transfer is None:
            raise UsageError(f"sequence {sequence} is derived from neither a parent nor a transfer")
        size, nothing = self.layout.block_tokens, [np.zeros(0, np.int64)] * len(self.groups)
        moved = nothing if transfer is None else self.transfers.blocks(transfer)
        kept, filled = nothing, np.zeros(len(self.layout.layers), np.int64)
        if parent is not None:
            first, count = without
            self.full_blocks(parent, first, count)  # or an error
            reservation = self._reservation(parent)
            held = zip(reservation.tables, self._next[:, reservation.slot].tolist(), strict=True)
            kept = [np.delete(table[:stop], np.s_[first : first + count]) for table, stop in held]
            filled = self._filled[:, reservation.slot] - count * size
        filled = filled + len(moved[0]) * size
        own = [np.concatenate(parts) for parts in zip(moved, kept, strict=True)]
        total = -(-tokens // size)
        if filled.max() > tokens or len(own[0]) > total:
            raise UsageError(f"sequence {sequence} has {len(own[0])} blocks of {size}, but space for {tokens} tokens")
        needs = [total - len(blocks) for blocks in own]
        if not self._pools.fit(needs):
            raise self._missing(sequence, tokens)
        self._pools.make_room(needs)
        for blocks, shared in zip(self._blocks, kept, strict=True):
            blocks.hold(shared.tolist())
        if transfer is not None:
            self.transfers.take(transfer)
        slot = self._enter(sequence, tokens, None, [_table(total, 0, blocks) for blocks in own])
        self._set_aside(slot, [total] * len(own), needs)
        self._first[:, slot], self._next[:, slot] = 0, [len(blocks) for blocks in own]
        self._filled[:, slot], complete = filled, int(filled.min())
        self._frozen[slot] = complete // size * size
        return complete

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
        if not self._pools.fit(needs):
            raise self._missing(sequence, tokens - reservation.tokens, "more ")
        self._pools.make_room(needs)
        for index, table in enumerate(reservation.tables):
            if total > len(table):
                # The table grows by half, so that it is not copied each time that its sequence grows a little.
                wider = np.full(max(total, 3 * len(table) // 2), -1, dtype=np.int64)
                wider[: len(table)] = table
                reservation.outgrown.append((index, table))
                reservation.tables[index] = wider
                self._addresses[index, slot] = wider.ctypes.data
        self._set_aside(slot, counts, needs)
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
        self._losses += 1
        self._leave(sequence)

    def full_blocks(self, sequence: int, first: int, count: int) -> list[Integers]:
        """Return blocks of a sequence in each group, as byte offsets; `UsageError` unless they are full in every
        layer."""
        self.require_movable()
        stop, complete = first + count, self.complete(sequence) // self.layout.block_tokens
        if not 0 <= first <= stop <= complete:
            raise UsageError(
                f"sequence {sequence} has {complete} full blocks; expected {stop} at least, from {first} on"
            )
        return [table[first:stop].copy() for table in self._reservation(sequence).tables]

    def require_movable(self) -> None:
        """Raise `UsageError` where the attention of layers depends on positions, and blocks behind windows are gone."""
        if any(layer.knows_positions for layer in self.layout.layers):
            raise UsageError("blocks cannot be moved or derived, as attention depends on positions")

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

    def group_of(self, layer: int) -> int:
        """Return the number of the layer group to which a layer belongs."""
        return self._group_of[layer]

    def layer_offset(self, layer: int) -> int:
        """Return where a layer begins within the blocks of its group, in bytes."""
        return self._offsets[layer]

    # -- inside

    def _require_new(self, sequence: int, tokens: int) -> None:
        if sequence in self._held:
            raise UsageError(f"sequence {sequence} already holds a reservation; release it first")
        if tokens < 1:
            raise UsageError(f"sequence {sequence}: expected a reservation of at least 1 token, got {tokens}")

    def _set_aside(self, slot: int, counts: Sequence[int], needs: Sequence[int]) -> None:
        """Promise a sequence ``needs`` more blocks of each group, of which it may hold ``counts`` at once."""
        self._counts[:, slot] = counts
        for index, need in enumerate(needs):
            self._promised[index, slot] += need
            self._blocks[index].promised += need

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


def _table(total: int, first: int, blocks: Sequence[int] | Integers) -> Integers:
    """Return a block table of this length, with blocks from number ``first`` on."""
    table = np.full(total, -1, dtype=np.int64)
    table[first : first + len(blocks)] = blocks
    return table
