"""The reference backend: torch operations in float32, on any device.

The runs of a step are cut into pieces of a few queries. Pieces with equally many queries are attended together,
their contexts gathered from the cache and padded to the longest. Nothing but stored positions is ever read.

In a block, a layer has k [block_tokens, Hkv, Dk], then v [block_tokens, Hkv, Dv], then, where the type has scales,
those of k and of v, float32 [block_tokens, Hkv]; each part starts at a multiple of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamina.attention.backend import Plan, Stored, check_key_value, check_past, check_query
from lamina.attention.cache import Integers, KVCache, Placement
from lamina.attention.dense import attend_visible, visible_keys
from lamina.attention.layout import ITEM_BYTES, SCALE_BYTES, SCALED, LayerShape
from lamina.attention.partial import Partial, add_sinks, merge
from lamina.attention.pool import ALIGNMENT
from lamina.attention.quantise import dequantise, quantise
from lamina.attention.rows import Rows, Run
from lamina.errors import UsageError

PIECE_QUERIES = 64
"""Queries of one run that are attended at once; bounds the scores held in memory."""

GATHER_TOKENS = 1 << 11
"""Positions gathered at once, padding included, unless one context is longer. Fewer would pay more for calls;
more would leave the caches of a core, and in the end pad short contexts to long ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some queries of run number ``run``: the rows from ``row``, at positions from ``position``, attend to
    first..end-1."""

    run: int
    row: int
    position: int
    queries: int
    first: int
    end: int

    @property
    def keys(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Places:
    """Of positions, in any ``shape``: for each part of a layer the int64 index of their rows in its `_Part`, flat."""

    shape: tuple[int, ...]
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """B pieces attended together. rows: int64 [B, Q]; places: of [B, K] keys; visible: bool [B, Q, K]."""

    rows: Tensor
    places: Places
    visible: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where a step's k and v go in a layer group: ``rows``, int64, lists those to be stored; None is all."""

    places: Places
    rows: Tensor | None


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """By layer group: what is read of the ``past`` of the runs, and of the ``new`` tokens; where these go."""

    placement: Placement
    past: list[list[Batch]]
    new: list[list[Batch]]
    targets: list[Target]

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class TorchBackend:
    """Computes with torch's own threads: how many there are and where they run is set for the whole process."""

    name = "torch"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        self.cache = cache
        self._device = cache.memory.tensor.device
        self._where = str(self._device)
        self._stores = [_Store(cache, layer) for layer in range(len(cache.layout.layers))]

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        shape = self.cache.shape(layer)
        check_key_value(layer, shape, rows.tokens, k, v, self._where)
        placement = self.cache.place(rows, attend=False)
        self._write(layer, placement, self._target(placement, self.cache.group_of(layer)), self._rounded(k, v))

    def plan(self, rows: Rows, *, store: bool = True) -> TorchPlan:
        placement = self.cache.place(rows, store=store)
        groups = range(len(self.cache.groups))
        return TorchPlan(
            placement,
            past=[self._batches(placement, group, new=False) for group in groups],
            new=[self._batches(placement, group, new=True) for group in groups if store],
            targets=[self._target(placement, group) for group in groups if store],
        )

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        assert isinstance(plan, TorchPlan)
        check_query(layer, self.cache.shape(layer), plan.rows.tokens, q, self._where)
        self.cache.require_past(layer, plan.placement)
        return self._attend(plan.past[self.cache.group_of(layer)], layer, q)

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, TorchPlan)
        self.cache.require_space(plan.placement)
        group, shape = self.cache.group_of(layer), self.cache.shape(layer)
        check_query(layer, shape, plan.rows.tokens, q, self._where)
        check_key_value(layer, shape, plan.rows.tokens, k, v, self._where)
        check_past(layer, shape, plan.rows.tokens, past, self._where)
        self._write(layer, plan.placement, plan.targets[group], self._rounded(k, v))
        # Read back from the cache, so that a token weighs now exactly what it will weigh in later steps.
        return add_sinks(merge(past, self._attend(plan.new[group], layer, q)), shape.sinks)

    def export(self, sequence: int, layer: int, start: int, stop: int) -> Stored:
        positions = np.arange(start, stop)
        table = self.cache.stored(sequence, layer, start, stop)
        return self._stores[layer].read(
            self._places(self.cache.group_of(layer), table[positions // self._size], positions)
        )

    def restore(self, sequence: int, layer: int, start: int, stored: Stored) -> None:
        tokens = len(stored.k)
        self._stores[layer].check(layer, tokens, stored)
        placement = self.cache.place(Rows((Run(sequence, start, tokens),)), attend=False)
        self._write(layer, placement, self._target(placement, self.cache.group_of(layer)), stored)

    def close(self) -> None:
        self._stores.clear()

    # -- storing

    @property
    def _size(self) -> int:
        return self.cache.layout.block_tokens

    def _rounded(self, k: Tensor, v: Tensor) -> Stored:
        dtype = self.cache.layout.dtype
        if dtype in SCALED:
            (k, k_scale), (v, v_scale) = quantise(k, dtype), quantise(v, dtype)
            return Stored(k, v, k_scale, v_scale)
        return Stored(k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype)))

    def _write(self, layer: int, placement: Placement, target: Target, stored: Stored) -> None:
        self.cache.require_past(layer, placement)
        if target.rows is not None:
            stored = Stored(*(None if part is None else part[target.rows] for part in stored))  # type: ignore[arg-type]
        self._stores[layer].write(target.places, stored)
        self.cache.advance(layer, placement)

    def _target(self, placement: Placement, group: int) -> Target:
        runs, tables = placement.rows.runs, placement.tables(group)
        positions = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        counts = placement.counts
        blocks = np.concatenate(
            [table[np.arange(run.start, run.stop) // self._size] for run, table in zip(runs, tables, strict=True)]
        )
        wanted = (positions >= np.repeat(placement.frozen, counts)) & (blocks >= 0)
        if wanted.all():
            return Target(self._places(group, blocks, positions), None)
        rows = np.nonzero(wanted)[0]
        return Target(self._places(group, blocks[rows], positions[rows]), self._tensor(rows))

    def _places(self, group: int, blocks: Integers, positions: Integers) -> Places:
        """``blocks``: the byte offsets of the blocks that hold ``positions``, in the same shape."""
        # In layers of a group rows have the same sizes, and often k the same as v.
        parts = self._stores[self.cache.groups[group].layers[0]].parts
        within = positions % self._size
        found: dict[tuple[int, int], Tensor] = {}
        for part in parts:
            if (size := (part.item, part.width)) not in found:
                found[size] = self._tensor((blocks // part.item + within * part.width).ravel())
        return Places(positions.shape, tuple(found[part.item, part.width] for part in parts))

    def _tensor(self, numbers: Integers) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    # -- attending

    def _attend(self, batches: list[Batch], layer: int, q: Tensor) -> Partial:
        shape, store = self.cache.shape(layer), self._stores[layer]
        out = Partial.empty(q.shape[0], shape.q_heads, shape.v_dim, device=q.device)
        for batch in batches:
            k, v, k_scale, v_scale = store.read(batch.places)
            if k_scale is not None and v_scale is not None:
                k, v = dequantise(k, k_scale), dequantise(v, v_scale)
            out.o[batch.rows], out.lse[batch.rows] = attend_visible(q[batch.rows], k, v, batch.visible, shape)
        return out

    def _batches(self, placement: Placement, group: int, *, new: bool) -> list[Batch]:
        """Join pieces of equally many queries and similar contexts, up to GATHER_TOKENS padded positions."""
        window, tables = self.cache.groups[group].window, placement.tables(group)
        joined: list[list[Piece]] = []
        pieces = _pieces(placement.rows, window, new=new)
        for piece in sorted(pieces, key=lambda piece: (piece.queries, piece.keys)):
            joins = (
                joined
                and joined[-1][0].queries == piece.queries
                and (len(joined[-1]) + 1) * piece.keys <= GATHER_TOKENS  # it is the longest so far
            )
            if joins:
                joined[-1].append(piece)
            else:
                joined.append([piece])
        return [self._batch(group, pieces, [tables[piece.run] for piece in pieces]) for pieces in joined]

    def _batch(self, group: int, pieces: list[Piece], tables: list[Integers]) -> Batch:
        numbers = np.array([(piece.row, piece.position, piece.first, piece.end) for piece in pieces])
        row, position, first, end = (column[:, None] for column in numbers.T)  # each [B, 1]
        key = first + np.arange(pieces[-1].keys)
        # Padding repeats the last position of the same sequence: stored, hence finite, and never another's.
        read = np.minimum(key, end - 1)
        blocks = np.stack([table[own] for table, own in zip(tables, read // self._size, strict=True)])
        query = np.arange(pieces[0].queries)
        window = self.cache.groups[group].window
        visible = visible_keys(self._tensor(position + query), self._tensor(key), window)
        return Batch(
            self._tensor(row + query),
            self._places(group, blocks, read),
            visible & self._tensor(key < end).unsqueeze(1),
        )


class _Store:
    """The keys and values of one layer, in the blocks of its group."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        shape, name = cache.shape(layer), cache.layout.dtype
        dtype, heads = getattr(torch, name), shape.kv_heads
        rows: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (dtype, (heads, shape.qk_dim)),
            (dtype, (heads, shape.v_dim)),
        ]
        if name in SCALED:
            rows += [(torch.float32, (heads,))] * 2
        self.parts: list[_Part] = []
        start = cache.layer_offset(layer)
        for row, nbytes in zip(rows, _part_bytes(shape, name, cache.layout.block_tokens), strict=True):
            self.parts.append(_Part(cache.memory.tensor, start, *row))
            start += nbytes

    def read(self, places: Places) -> Stored:
        parts = zip(self.parts, places.rows, strict=True)
        return Stored(*(part.read(rows).view(*places.shape, *part.row) for part, rows in parts))

    def check(self, layer: int, tokens: int, stored: Stored) -> None:
        """`UsageError` unless ``stored`` is what `read` gives for so many positions."""
        wanted = [((tokens, *part.row), part.dtype, str(part.device)) for part in self.parts]
        found = [(tuple(part.shape), part.dtype, str(part.device)) for part in stored if part is not None]
        if found != wanted:
            raise UsageError(f"layer {layer}: expected stored keys, values and scales like {wanted}, got {found}")

    def write(self, places: Places, stored: Stored) -> None:
        for part, rows, values in zip(self.parts, places.rows, stored, strict=False):
            assert values is not None
            part.write(rows, values)


class _Part:
    """One part of a layer, ``start`` bytes behind the beginning of each block: a row of ``width`` numbers for each
    position, which is called by its distance from ``start``, in numbers of ``item`` bytes."""

    def __init__(self, memory: Tensor, start: int, dtype: torch.dtype, row: tuple[int, ...]) -> None:
        self.dtype, self.row, self.item, self.width = dtype, row, dtype.itemsize, int(np.prod(row))
        self.device = memory.device
        # Types of 8 bits move as bytes: not every operation knows them.
        flat = memory[start : len(memory) // ALIGNMENT * ALIGNMENT].view(torch.uint8 if self.item == 1 else dtype)
        # A row may begin at any number, so the view has a row at each of them; they overlap, which only indexing uses.
        self._rows = flat.as_strided((max(0, len(flat) - self.width + 1), self.width), (1, 1))

    def read(self, rows: Tensor) -> Tensor:
        return self._rows.index_select(0, rows).view(self.dtype)

    def write(self, rows: Tensor, values: Tensor) -> None:
        self._rows.index_copy_(0, rows, values.reshape(-1, self.width).view(self._rows.dtype))


def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
    """Bytes of a block of ``block_tokens`` positions in one layer."""
    return sum(_part_bytes(shape, dtype, block_tokens))


def _part_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> list[int]:
    rows = [shape.kv_heads * dim * ITEM_BYTES[dtype] for dim in (shape.qk_dim, shape.v_dim)]
    if dtype in SCALED:
        rows += [shape.kv_heads * SCALE_BYTES] * 2
    return [-(-row * block_tokens // ALIGNMENT) * ALIGNMENT for row in rows]


def _pieces(rows: Rows, window: int | None, *, new: bool) -> Iterator[Piece]:
    """Cut the runs. New are the positions of a run itself; a piece that sees no position at all is left out."""
    row = 0
    for number, run in enumerate(rows.runs):
        for position in range(run.start, run.stop, PIECE_QUERIES):
            queries = min(PIECE_QUERIES, run.stop - position)
            oldest = 0 if window is None else max(0, position - window + 1)
            first, end = (max(oldest, run.start), position + queries) if new else (oldest, run.start)
            if first < end:
                yield Piece(number, row + position - run.start, position, queries, first, end)
        row += run.count
