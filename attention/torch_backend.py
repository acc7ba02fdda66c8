"""The reference backend uses torch operations in float32 and runs on any device.

The runs of a step are cut into pieces of a few queries. Pieces with equally many queries attend together: their
contexts are gathered from the cache and padded to the longest. Only stored positions are ever read.

A block holds each layer in its plain form: see `lamina.attention.layout.plain_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.attention.backend import Plan, check_key_value, check_past, check_plain, check_query
from lamina.attention.cache import KVCache
from lamina.attention.dense import attend_visible, distances, visible_keys
from lamina.attention.layout import ALIGNMENT, SCALED, LayerShape, plain_parts
from lamina.attention.partial import Partial, add_sinks, merge
from lamina.attention.placement import BlockPlacement, Integers
from lamina.attention.quantise import dequantise, quantise
from lamina.attention.rows import Rows

PIECE_QUERIES = 64
"""At most this many queries of a run attend at once, which bounds the scores in memory."""

GATHER_TOKENS = 1 << 11
"""At most this many positions are gathered at once, padding included, unless one context is longer. With fewer, calls
would cost more; more would not fit into the caches of a core, and would pad short contexts to long ones."""


@dataclass(frozen=True, slots=True)
class QueryPiece:
    """A piece has some queries of run number ``run``: the rows from ``row`` on, at the positions from ``position`` on.

    They attend to the positions first..end-1.
    """

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
class RowIndices:
    """Positions in any ``shape`` have these rows: flat int64 indices into each `_LayerPart` of a layer."""

    shape: tuple[int, ...]
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class PieceBatch:
    """B pieces attend together. rows: int64 [B, Q]; places: those of [B, K] keys; visible: bool [B, Q, K]; distance:
    int64 [B, Q, K]."""

    rows: Tensor
    places: RowIndices
    visible: Tensor
    distance: Tensor


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """The k and v of a step go to these places in a layer group. ``rows``, int64, are those to store; None is all."""

    places: RowIndices
    rows: Tensor | None


class Stored(NamedTuple):
    """This holds keys and values as they are stored.

    k: [n, Hkv, Dk] and v: [n, Hkv, Dv] of the layout's type; their scales, if the type has any, are float32 [n, Hkv].
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """A plan has for each layer group batches over the ``past`` and the ``new`` tokens, and targets for the latter."""

    placement: BlockPlacement
    past: list[list[PieceBatch]]
    new: list[list[PieceBatch]]
    targets: list[StoreTarget]

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class TorchBackend:
    """This backend computes with torch's own threads, whose number and processors are set for the whole process."""

    name = "torch"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        self.cache = cache
        self._device = cache.memory.tensor.device
        self._where = str(self._device)
        self._stores = [_LayerStore(cache, layer) for layer in range(len(cache.layout.layers))]

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of a block in one layer."""
        return sum(plain_parts(shape, dtype, block_tokens))

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
        # The new tokens are read back from the cache, so that they weigh exactly what they will weigh in later steps.
        return add_sinks(merge(past, self._attend(plan.new[group], layer, q)), shape.sinks)

    def read(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        for row, block in zip(self._plain(layer, blocks, plain), plain, strict=True):
            block.copy_(row)

    def write(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        for row, block in zip(self._plain(layer, blocks, plain), plain, strict=True):
            row.copy_(block)

    def close(self) -> None:
        self._stores.clear()

    def _plain(self, layer: int, blocks: Integers, plain: Tensor) -> list[Tensor]:
        """Return the bytes of a layer in each of the blocks."""
        check_plain(layer, self.cache, blocks, plain)
        offset, size = self.cache.layer_offset(layer), plain.shape[1]
        return [self.cache.memory.tensor[start : start + size] for start in (blocks + offset).tolist()]

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

    def _write(self, layer: int, placement: BlockPlacement, target: StoreTarget, stored: Stored) -> None:
        self.cache.require_past(layer, placement)
        if target.rows is not None:
            stored = Stored(*(None if part is None else part[target.rows] for part in stored))  # type: ignore[arg-type]
        self._stores[layer].write(target.places, stored)
        self.cache.advance(layer, placement)

    def _target(self, placement: BlockPlacement, group: int) -> StoreTarget:
        runs, tables = placement.rows.runs, placement.tables(group)
        positions = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        counts = placement.counts
        blocks = np.concatenate(
            [table[np.arange(run.start, run.stop) // self._size] for run, table in zip(runs, tables, strict=True)]
        )
        wanted = (positions >= np.repeat(placement.frozen, counts)) & (blocks >= 0)
        if wanted.all():
            return StoreTarget(self._places(group, blocks, positions), None)
        rows = np.nonzero(wanted)[0]
        return StoreTarget(self._places(group, blocks[rows], positions[rows]), self._tensor(rows))

    def _places(self, group: int, blocks: Integers, positions: Integers) -> RowIndices:
        """Find the rows of ``positions``, whose blocks have the byte offsets ``blocks``, in the same shape."""
        # Rows have the same sizes in all layers of a group, and often the same for k and v.
        parts = self._stores[self.cache.groups[group].layers[0]].parts
        within = positions % self._size
        found: dict[tuple[int, int], Tensor] = {}
        for part in parts:
            if (size := (part.item, part.width)) not in found:
                found[size] = self._tensor((blocks // part.item + within * part.width).ravel())
        return RowIndices(positions.shape, tuple(found[part.item, part.width] for part in parts))

    def _tensor(self, numbers: Integers) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    # -- attending

    def _attend(self, batches: list[PieceBatch], layer: int, q: Tensor) -> Partial:
        shape, store = self.cache.shape(layer), self._stores[layer]
        out = Partial.empty(q.shape[0], shape.q_heads, shape.v_dim, device=q.device)
        for batch in batches:
            k, v, k_scale, v_scale = store.read(batch.places)
            if k_scale is not None and v_scale is not None:
                k, v = dequantise(k, k_scale), dequantise(v, v_scale)
            out.o[batch.rows], out.lse[batch.rows] = attend_visible(
                q[batch.rows], k, v, batch.visible, shape, batch.distance
            )
        return out

    def _batches(self, placement: BlockPlacement, group: int, *, new: bool) -> list[PieceBatch]:
        """Join pieces of equally many queries and similar contexts, up to `GATHER_TOKENS` padded positions."""
        first_visible = self.cache.shape(self.cache.groups[group].layers[0]).first_visible
        tables = placement.tables(group)
        joined: list[list[QueryPiece]] = []
        pieces = _pieces(placement.rows, first_visible, new=new)
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

    def _batch(self, group: int, pieces: list[QueryPiece], tables: list[Integers]) -> PieceBatch:
        numbers = np.array([(piece.row, piece.position, piece.first, piece.end) for piece in pieces])
        row, position, first, end = (column[:, None] for column in numbers.T)  # each [B, 1]
        key = first + np.arange(pieces[-1].keys)
        # Padding repeats the last position of the same sequence, which is stored and hence finite.
        read = np.minimum(key, end - 1)
        blocks = np.stack([table[own] for table, own in zip(tables, read // self._size, strict=True)])
        query = np.arange(pieces[0].queries)
        own, at, keys = self.cache.groups[group], self._tensor(position + query), self._tensor(key)
        visible = visible_keys(at, keys, own.window, own.chunk)
        return PieceBatch(
            self._tensor(row + query),
            self._places(group, blocks, read),
            visible & self._tensor(key < end).unsqueeze(1),
            distances(at, keys),
        )


class _LayerStore:
    """A store reads and writes the keys and values of one layer in the blocks of its group."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        shape, name = cache.shape(layer), cache.layout.dtype
        dtype, heads = getattr(torch, name), shape.kv_heads
        rows: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (dtype, (heads, shape.qk_dim)),
            (dtype, (heads, shape.v_dim)),
        ]
        if name in SCALED:
            rows += [(torch.float32, (heads,))] * 2
        self.parts: list[_LayerPart] = []
        start = cache.layer_offset(layer)
        for row, nbytes in zip(rows, plain_parts(shape, name, cache.layout.block_tokens), strict=True):
            self.parts.append(_LayerPart(cache.memory.tensor, start, *row))
            start += nbytes

    def read(self, places: RowIndices) -> Stored:
        parts = zip(self.parts, places.rows, strict=True)
        return Stored(*(part.read(rows).view(*places.shape, *part.row) for part, rows in parts))

    def write(self, places: RowIndices, stored: Stored) -> None:
        for part, rows, values in zip(self.parts, places.rows, stored, strict=False):
            assert values is not None
            part.write(rows, values)


class _LayerPart:
    """A part of a layer begins ``start`` bytes after the beginning of each block and has a row for each position.

    A row has ``width`` numbers of ``item`` bytes. Its index is its distance from ``start``, in numbers.
    """

    def __init__(self, memory: Tensor, start: int, dtype: torch.dtype, row: tuple[int, ...]) -> None:
        self.dtype, self.row, self.item, self.width = dtype, row, dtype.itemsize, int(np.prod(row))
        self.device = memory.device
        # Types of 8 bits move as bytes, because not every operation supports them.
        flat = memory[start : len(memory) // ALIGNMENT * ALIGNMENT].view(torch.uint8 if self.item == 1 else dtype)
        # A row may begin at any number, so the view has a row at each of them. The rows overlap, but are only indexed.
        self._rows = flat.as_strided((max(0, len(flat) - self.width + 1), self.width), (1, 1))

    def read(self, rows: Tensor) -> Tensor:
        return self._rows.index_select(0, rows).view(self.dtype)

    def write(self, rows: Tensor, values: Tensor) -> None:
        self._rows.index_copy_(0, rows, values.reshape(-1, self.width).view(self._rows.dtype))


def _pieces(rows: Rows, first_visible: Callable[[int], int], *, new: bool) -> Iterator[QueryPiece]:
    """Cut the runs into pieces over the past, or with ``new`` over the run itself; leave out those that see nothing."""
    row = 0
    for number, run in enumerate(rows.runs):
        for position in range(run.start, run.stop, PIECE_QUERIES):
            queries = min(PIECE_QUERIES, run.stop - position)
            oldest = first_visible(position)
            first, end = (max(oldest, run.start), position + queries) if new else (oldest, run.start)
            if first < end:
                yield QueryPiece(number, row + position - run.start, position, queries, first, end)
        row += run.count
