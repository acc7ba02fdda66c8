"""The reference backend: torch operations in float32, on any device.

The runs of a step are cut into pieces of a few queries. Pieces with equally many queries are attended together,
their contexts gathered from the cache and padded to the longest. Nothing but stored positions is ever read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.attention.backend import Plan
from lamina.attention.cache import KVCache, Placement, Reservation
from lamina.attention.dense import attend_visible, visible_keys
from lamina.attention.partial import Partial, merge
from lamina.attention.rows import Rows

PIECE_QUERIES = 64
"""Queries of one run that are attended at once; bounds the scores held in memory."""

GATHER_TOKENS = 1 << 11
"""Positions gathered at once, padding included, unless one context is longer. Fewer would pay more for calls;
more would leave the caches of a core, and in the end pad short contexts to long ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some queries of a run: the rows from ``row``, at positions from ``position``, attend to first..end-1."""

    held: Reservation
    row: int
    position: int
    queries: int
    first: int
    end: int

    @property
    def keys(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Batch:
    """B pieces attended together. rows: int64 [B, Q]; slots: int64 [B, K]; visible: bool [B, Q, K]."""

    rows: Tensor
    slots: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """By the window of a layer: what is read of the ``past`` of the runs, and of the ``new`` tokens themselves."""

    placement: Placement
    past: dict[int | None, list[Batch]]
    new: dict[int | None, list[Batch]]

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class TorchBackend:
    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._windows = {layer.window for layer in cache.layout.layers}

    def plan(self, rows: Rows) -> TorchPlan:
        placement = self._cache.place(rows)
        return TorchPlan(
            placement,
            past={window: self._batches(_pieces(placement, window, new=False), window) for window in self._windows},
            new={window: self._batches(_pieces(placement, window, new=True), window) for window in self._windows},
        )

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        assert isinstance(plan, TorchPlan)
        window = self._cache.shape(layer).window
        self._cache.require_past(layer, plan.placement)
        return self._attend(plan.past[window], layer, q)

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, TorchPlan)
        self._cache.write(layer, plan.placement, k, v)
        # Read back from the cache, so that a token weighs now exactly what it will weigh in later steps.
        return merge(past, self._attend(plan.new[self._cache.shape(layer).window], layer, q))

    def _attend(self, batches: list[Batch], layer: int, q: Tensor) -> Partial:
        shape = self._cache.shape(layer)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = Partial.empty(q.shape[0], shape.q_heads, shape.v_dim, device=q.device)
        for batch in batches:
            k, v = _gather(keys, batch.slots), _gather(values, batch.slots)
            out.o[batch.rows], out.lse[batch.rows] = attend_visible(q[batch.rows], k, v, batch.visible, shape)
        return out

    def _batches(self, pieces: Iterator[Piece], window: int | None) -> list[Batch]:
        """Join pieces of equally many queries and similar contexts, up to GATHER_TOKENS padded positions."""
        groups: list[list[Piece]] = []
        for piece in sorted(pieces, key=lambda piece: (piece.queries, piece.keys)):
            joins = (
                groups
                and groups[-1][0].queries == piece.queries
                and (len(groups[-1]) + 1) * piece.keys <= GATHER_TOKENS  # it is the longest so far
            )
            if joins:
                groups[-1].append(piece)
            else:
                groups.append([piece])
        return [self._batch(group, window) for group in groups]

    def _batch(self, pieces: list[Piece], window: int | None) -> Batch:
        device = self._cache.device
        numbers = [(piece.row, piece.position, piece.first, piece.end) for piece in pieces]
        row, position, first, end = torch.tensor(numbers, device=device).unsqueeze(-1).unbind(1)  # each [B, 1]
        query = torch.arange(pieces[0].queries, device=device)
        key = first + torch.arange(pieces[-1].keys, device=device)
        # Padding repeats the last position of the same sequence: stored, hence finite, and never another's.
        slots = self._cache.slots(
            [piece.held for piece in pieces],
            torch.arange(len(pieces), device=device).unsqueeze(-1),
            key.minimum(end - 1),
        )
        visible = visible_keys(position + query, key, window) & (key < end).unsqueeze(1)
        return Batch(row + query, slots, visible)


def _pieces(placement: Placement, window: int | None, *, new: bool) -> Iterator[Piece]:
    """Cut the runs. New are the positions of a run itself; a piece that sees no position at all is left out."""
    row = 0
    for run, held in zip(placement.rows.runs, placement.held, strict=True):
        for position in range(run.start, run.stop, PIECE_QUERIES):
            queries = min(PIECE_QUERIES, run.stop - position)
            oldest = 0 if window is None else max(0, position - window + 1)
            first, end = (max(oldest, run.start), position + queries) if new else (oldest, run.start)
            if first < end:
                yield Piece(held, row + position - run.start, position, queries, first, end)
        row += run.count


def _gather(store: Tensor, slots: Tensor) -> Tensor:
    """store: [slots, heads, dim]; slots: int64 [B, K]; returns [B, K, heads, dim]."""
    return store.index_select(0, slots.flatten()).view(*slots.shape, *store.shape[1:])
