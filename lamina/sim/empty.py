"""A model and a backend that compute nothing, so that what is left of a step is the engine itself.

Devices decide how long their operations seem to take (`lamina.sim.device`); with real ones it is what the engine costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.attention import KVCache, LayerShape, Partial, Rows
from lamina.attention.backend import Plan
from lamina.attention.placement import BlockPlacement, Integers
from lamina.compute.peer_lane import Shape
from lamina.model.slices import Head, Tail
from lamina.node.model import ModelFacts


class EmptySlice:
    """A slice that returns tensors made before, cut to the rows of the step. Without a ``shape`` it is the last one."""

    def __init__(self, shape: LayerShape | None, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        self._is_last = shape is None
        if shape is None:
            self._out = torch.zeros(rows, vocabulary, dtype=dtype)
            return
        self._out = torch.zeros(rows, shape.q_heads, shape.qk_dim, dtype=dtype)
        self._k = torch.zeros(rows, shape.kv_heads, shape.qk_dim, dtype=dtype)
        self._v = torch.zeros(rows, shape.kv_heads, shape.v_dim, dtype=dtype)

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """See `ForwardSlice.head`. All logits are 0, so every token is token 0."""
        return Head(self._out[: constants[self._is_last]], ())

    def tail(self, constants: tuple[Any, ...], kept: tuple[Tensor, ...]) -> Tail:
        """See `ForwardSlice.tail`."""
        return Tail(self._k[: constants[0]], self._v[: constants[0]], ())


class EmptyForward:
    """A forward pass of empty slices for steps of at most ``rows`` rows.

    The constants of a step are the number of its rows and the number of those that are sampled.
    """

    def __init__(self, shapes: Sequence[LayerShape], *, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        self.shapes = shapes
        self.device = torch.device("cpu")
        slices = {shape: EmptySlice(shape, rows, vocabulary, dtype) for shape in {*shapes, None}}
        self._slices = [slices[shape] for shape in (*shapes, None)]

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """See `ForwardPass.begin`."""
        return len(token_ids), len(rows)

    def slice(self, index: int) -> EmptySlice:
        """See `ForwardPass.slice`."""
        return self._slices[index]

    def carry_shapes(self, index: int, tokens: int) -> list[Shape]:
        """See `ForwardPass.carry_shapes`: there is no carry."""
        return []


@dataclass(frozen=True)
class EmptyModel:
    """A model whose forward passes are empty; ``rows`` is the most that a step has."""

    facts: ModelFacts
    rows: int

    def carry_bytes(self, tokens: int) -> int:
        """See `ModelSource.carry_bytes`; a region has at least one byte."""
        return 64 + max(shape.q_heads * shape.v_dim for shape in self.facts.layers) * 4 * tokens

    def load(self, slices: range, device: torch.device) -> EmptyForward:
        """See `ModelSource.load`."""
        dtype = getattr(torch, self.facts.dtype)
        return EmptyForward(self.facts.layers, rows=self.rows, vocabulary=self.facts.vocabulary, dtype=dtype)


class EmptyBackend:
    """A backend that keeps account of its cache, and stores and attends to nothing: all attention is 0."""

    name = "empty"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        self.cache = cache
        self._partials: dict[tuple[int, int, int], Partial] = {}

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of a block in which nothing is stored."""
        return 64

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """See `Backend.append`."""
        self.cache.advance(layer, self.cache.place(rows, attend=False))

    def plan(self, rows: Rows, *, store: bool = True) -> Plan:
        """See `Backend.plan`."""
        return self.cache.place(rows, store=store)

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        """See `Backend.past`."""
        shape = self.cache.shape(layer)
        key = (plan.rows.tokens, shape.q_heads, shape.v_dim)
        if key not in self._partials:
            o, lse = torch.zeros(key), torch.zeros(key[:2])
            self._partials[key] = Partial(o, lse)
        return self._partials[key]

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        """See `Backend.finish`."""
        assert isinstance(plan, BlockPlacement)
        self.cache.advance(layer, plan)
        return past

    def read(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        """See `Backend.read`."""

    def write(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        """See `Backend.write`."""

    def close(self) -> None:
        """See `Backend.close`."""
