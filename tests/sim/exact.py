"""A tiny model that computes with whole numbers, so that its tokens tell whether all keys and values were right.

Its attention is that of any model, and goes through the real backends. Queries and keys are made so that each weight is
1 or 2 times a common factor, and values are small whole numbers. The first value tells the sum of the weights, so a
slice gets the exact weighted sums back from what was rounded in float32, in whatever order it was added up. Everything
behind is arithmetic of whole numbers: one wrong, missing, doubled or stale key changes all that follows, and nothing
else changes anything. So tokens can be compared without regard to ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.compute.peer_lane import Shape
from lamina.compute.sampler import sample
from lamina.config import ClusterConfig
from lamina.front.choices import choice_for
from lamina.front.sequence import Sequence as Answering
from lamina.model.slices import Head, Tail
from lamina.node.model import ModelFacts, OpenModel
from lamina.wire.geometry import aligned
from lamina.wire.requests import Request, Sampling

VOCABULARY = 256
DIM = 8
STATES = 1 << 12
"""States that queries, keys, values and logits are made of; that of a token is one of 2**64."""
LARGEST = 31
"""The largest value. Sums stay far below 2**24, above which float32 has no room for what is rounded."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_FOR_KEYS = np.uint64(40)
_STATES = np.uint64(STATES)


class Tables(NamedTuple):
    """What each state gives: q, k and v [STATES, heads, DIM]; and the factors of the sums, uint64 [heads, DIM]."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Any


@cache
def tables(heads: int) -> Tables:
    """The same in every process."""
    random = np.random.default_rng(heads)
    q = np.zeros((STATES, heads, DIM), np.float32)
    chosen = random.integers(0, DIM, (STATES, heads))
    np.put_along_axis(q, chosen[..., None], np.float32(math.log(2)), -1)
    k = random.integers(0, 2, (STATES, heads, DIM)).astype(np.float32)
    v = random.integers(0, LARGEST + 1, (STATES, heads, DIM)).astype(np.float32)
    v[..., 0] = 0
    sums = random.integers(1, 1 << 62, (heads, DIM), np.uint64) | np.uint64(1)
    return Tables(*map(torch.from_numpy, (q, k, v)), sums)


@cache
def logits() -> Tensor:
    """The logits of each state, [STATES, VOCABULARY]."""
    return torch.from_numpy(np.random.default_rng(0).normal(0, 3, (STATES, VOCABULARY)).astype(np.float32))


def mixed(state: Any, more: Any) -> Any:
    """The next states, uint64: a few steps of multiplying and shifting (splitmix64), in which every bit counts."""
    state = (state ^ more) * _FACTOR
    state = (state ^ (state >> _SHIFT)) * _FACTOR
    return state ^ (state >> _SHIFT)


class ExactSlice:
    """Slice ``index`` of a model with ``layers`` layers of ``heads`` heads."""

    def __init__(self, index: int, layers: int, heads: int) -> None:
        self._index = np.uint64(index)
        self._is_last = index == layers
        self._tables = tables(heads)

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """See `ForwardSlice.head`. The carry is the state of each token: 64 bits, as int64 [1, T]."""
        token_ids, positions, rows = constants
        if o is None:
            state = mixed((token_ids << 32 | positions).numpy().view(np.uint64), _SHIFT)
        else:
            state = mixed(carry[0][0].numpy().view(np.uint64), self._sums(o.numpy()) + self._index)
        if self._is_last:
            return Head(logits()[_index(state[rows.numpy()])], ())
        return Head(self._tables.q[_index(state)], (state,))

    def tail(self, constants: tuple[Any, ...], kept: tuple[Any, ...]) -> Tail:
        """See `ForwardSlice.tail`."""
        (state,) = kept
        own = _index(state >> _FOR_KEYS)
        k, v = self._tables.k[own], self._tables.v[own]
        is_first = constants[1] == 0
        if bool(is_first.any()):  # its weight is 1, so that its value, 1, tells the sum of the weights
            k[is_first] = 0
            v[is_first, :, 0] = 1
        return Tail(k, v, (torch.from_numpy(state.view(np.int64))[None],))

    def _sums(self, o: Any) -> Any:
        """The weighted sums of all values, in one number [T] for each token."""
        with np.errstate(all="ignore"):  # wrong keys and values give anything
            weights = np.rint(1 / o[..., :1])
            sums = np.rint(o * weights)
            sums[..., :1] = weights
            return (sums.astype(np.int64).view(np.uint64) * self._tables.sums).sum((1, 2))


def _index(state: Any) -> Tensor:
    return torch.from_numpy((state % _STATES).view(np.int64))


class ExactForward:
    """A forward pass through exact slices."""

    def __init__(self, shapes: Sequence[LayerShape]) -> None:
        self.shapes = shapes
        self.device = torch.device("cpu")
        self._slices = [ExactSlice(i, len(shapes), shapes[0].kv_heads) for i in range(len(shapes) + 1)]

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """See `ForwardPass.begin`."""
        return token_ids, positions, rows

    def slice(self, index: int) -> ExactSlice:
        """See `ForwardPass.slice`."""
        return self._slices[index]

    def carry_shapes(self, index: int, tokens: int) -> list[Shape]:
        """See `ForwardPass.carry_shapes`."""
        return [((1, tokens), torch.int64)]


@dataclass(frozen=True)
class ExactModel:
    """The source of exact forward passes."""

    facts: ModelFacts

    def carry_bytes(self, tokens: int) -> int:
        """See `ModelSource.carry_bytes`."""
        shape = self.facts.layers[0]
        return aligned(8 * tokens) + aligned(4 * shape.q_heads * shape.v_dim * tokens)

    def load(self, slices: range, device: torch.device) -> ExactForward:
        """See `ModelSource.load`."""
        return ExactForward(self.facts.layers)


def shape_of(heads: int) -> LayerShape:
    """The attention of a layer."""
    return LayerShape(q_heads=heads, kv_heads=heads, qk_dim=DIM, v_dim=DIM, scale=1.0)


def exact_model(*, layers: int, heads: int, context: int) -> OpenModel:
    """A model whose answers are those of `expected` with the same numbers."""
    facts = ModelFacts(
        path=Path("/nonexistent"),
        fingerprint=f"exact-{layers}-{heads}",
        dtype="float32",
        layers=(shape_of(heads),) * layers,
        max_context=context,
        vocabulary=VOCABULARY,
        stop_tokens=frozenset(),
    )

    def open_model(config: ClusterConfig) -> ExactModel:
        return ExactModel(facts)

    return open_model


class Asking(NamedTuple):
    """A prompt, the tokens of its answer, and how they are chosen."""

    prompt: tuple[int, ...]
    tokens: int
    sampling: Sampling


def expected(asked: Sequence[Asking], *, layers: int, heads: int) -> list[list[int]]:
    """The answers by the definition of the model, with neither cache nor batch: all requests go position by position,
    and each keeps whole numbers of its own."""
    answering = [
        Answering(Request(list(own.prompt), own.tokens, own.sampling), list(own.prompt), own.tokens, frozenset())
        for own in asked
    ]
    slices = [ExactSlice(i, layers, heads) for i in range(layers + 1)]
    longest = max((len(own.prompt) + own.tokens for own in asked), default=0)
    past = torch.zeros(layers, 2, len(asked), longest, heads, DIM)
    for position in range(longest - 1):
        rows = [i for i, s in enumerate(answering) if position < len(s.prompt) + s.max_tokens - 1]
        tokens = [(s.prompt + s.output)[position] for s in map(answering.__getitem__, rows)]
        found = _next_logits(slices, tokens, position, past[:, :, rows, : position + 1], past[:, :, :, position], rows)
        sampled = [(own, i) for own, i in enumerate(rows) if position >= len(answering[i].prompt) - 1]
        if not sampled:
            continue
        chosen = sample(found[[own for own, _ in sampled]], [choice_for(answering[i]) for _, i in sampled])
        for (_, i), token in zip(sampled, chosen, strict=True):
            assert token is not None
            answering[i].output.append(token)
    return [s.output for s in answering]


def _next_logits(
    slices: Sequence[ExactSlice], tokens: list[int], position: int, past: Tensor, present: Tensor, rows: list[int]
) -> Tensor:
    """The logits behind one position of some requests. ``past`` is a copy of their keys and values up to it, and
    ``present`` is where those of the position belong."""
    count = len(tokens)
    constants = torch.tensor(tokens), torch.full((count,), position), torch.arange(count)
    carry: tuple[Tensor, ...] = ()
    o: Tensor | None = None
    for layer, piece in enumerate(slices[:-1]):
        head = piece.head(constants, carry, o)
        tail = piece.tail(constants, head.kept)
        k, v = past[layer]  # each [rows, positions, heads, DIM]
        k[:, -1], v[:, -1] = tail.k, tail.v
        present[layer, 0, rows], present[layer, 1, rows] = tail.k, tail.v
        weights = 1 + (k * (head.out[:, None] > 0)).sum(-1)  # a key's bit in the one dimension that is asked for
        o = torch.einsum("nph,nphd->nhd", weights, v) / weights.sum(1)[..., None]
        carry = tail.carry
    return slices[-1].head(constants, carry, o).out
