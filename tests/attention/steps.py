"""Steps over caches with a past, and how hypothesis makes them up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention import Backend, KVLayout, LayerShape, Partial, Plan, Rows, Run
from tests.attention.backends import Target
from tests.attention.oracle import dequantised, exact_rows, join
from tests.attention.readback import read

FILLERS = 24
"""At most so many blocks are held by others, and as many were given back by others, before a step's sequences come."""


class Inputs(NamedTuple):
    """q: [T, Hq, Dk] of the step's rows; per sequence k: [past + count, Hkv, Dk] and v: [past + count, Hkv, Dv]."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]


@dataclass(frozen=True)
class Step:
    """One step over sequences 0, 1, ... that hold ``pasts[i]`` positions already and get ``counts[i]`` more.

    ``chunk``: positions that the past came in at once, in all layers; ``tight``: the sequences reserved no more than
    that needs, so that windowed layers let blocks go and take them again. ``stride``: how q, k and v lie in memory.
    """

    layout: KVLayout
    pasts: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int = 0
    q_dtype: str = "float32"
    kv_dtype: str = "float32"
    chunk: int = 1 << 20
    tight: bool = False
    stride: int = 0
    threads: int = 1
    device: str = field(default="cpu", repr=False)

    @property
    def rows(self) -> Rows:
        return Rows(tuple(Run(i, *run) for i, run in enumerate(zip(self.pasts, self.counts, strict=True))))

    @property
    def layers(self) -> range:
        return range(len(self.layout.layers))

    def inputs(self, layer: int) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        shape = self.layout.layers[layer]

        def normal(tokens: int, heads: int, dim: int, dtype: str) -> Tensor:
            numbers = torch.randn(tokens, heads, dim, generator=generator).to(getattr(torch, dtype))
            return laid_out(numbers.to(self.device), self.stride)

        lengths = [past + count for past, count in zip(self.pasts, self.counts, strict=True)]
        return Inputs(
            normal(sum(self.counts), shape.q_heads, shape.qk_dim, self.q_dtype),
            [normal(length, shape.kv_heads, shape.qk_dim, self.kv_dtype) for length in lengths],
            [normal(length, shape.kv_heads, shape.v_dim, self.kv_dtype) for length in lengths],
        )

    def new(self, stored: list[Tensor]) -> Tensor:
        """The rows of this step out of whole contexts: [T, ...]."""
        rows = [one[past:] for past, one in zip(self.pasts, stored, strict=True)]
        return rows[0] if len(rows) == 1 else laid_out(torch.cat(rows), self.stride)

    @contextmanager
    def prepared(self, target: Target) -> Iterator[Backend]:
        """A backend whose cache holds the past of every layer in scattered blocks, and poison everywhere else."""
        size = self.layout.block_tokens
        blocks = sum(-(-run.stop // size) for run in self.rows.runs)
        fillers = 2 * min(FILLERS, blocks)
        with target.open(self.layout, (blocks + fillers) * size, threads=self.threads) as backend:
            for filler in range(fillers):
                backend.cache.reserve(-1 - filler, 1)
            backend.plan(Rows(tuple(Run(-1 - filler, 0, 1) for filler in range(fillers))))
            for filler in random.Random(self.seed).sample(range(fillers), fillers // 2):
                backend.cache.release(-1 - filler)
            self.fill(backend)
            yield backend

    def fill(self, backend: Backend) -> None:
        """Reserve what the step needs, and store the past."""
        ahead = max(1, min(self.chunk, max(self.pasts)), *self.counts)
        for run in self.rows.runs:
            backend.cache.reserve(run.sequence, run.stop, ahead=ahead if self.tight else None)
        inputs = [self.inputs(layer) for layer in self.layers]
        for begin in range(0, max(self.pasts), self.chunk):
            runs = [
                Run(run.sequence, begin, min(self.chunk, run.start - begin))
                for run in self.rows.runs
                if run.start > begin
            ]
            for layer in self.layers:
                k, v = (
                    torch.cat([stored[run.sequence][run.start : run.stop] for run in runs])
                    for stored in inputs[layer][1:]
                )
                backend.append(layer, Rows(tuple(runs)), k, v)

    def run(self, backend: Backend, plan: Plan, layer: int) -> tuple[Partial, Partial]:
        """`past` and `finish` of one layer."""
        q, k, v = self.inputs(layer)
        past = backend.past(plan, layer, q)
        return past, backend.finish(plan, layer, q, self.new(k), self.new(v), past)

    def stored(self, backend: Backend, layer: int) -> list[tuple[Tensor, Tensor]]:
        """The values of k and v of each sequence in float64, as they are stored; what no row sees is left 0."""
        found = []
        shape = self.layout.layers[layer]
        for run in self.rows.runs:
            first = 0 if shape.window is None else max(0, run.start - shape.window + 1)
            k = torch.zeros(run.stop, shape.kv_heads, shape.qk_dim, dtype=torch.float64)
            v = torch.zeros(run.stop, shape.kv_heads, shape.v_dim, dtype=torch.float64)
            k[first:], v[first:] = dequantised(read(backend, run.sequence, layer, first, run.stop))
            found.append((k, v))
        return found

    def expected(self, layer: int, contexts: list[tuple[Tensor, Tensor]], *, past_only: bool = False) -> Partial:
        """What the oracle says about all rows of the step, from k and v of each sequence."""
        shape = self.layout.layers[layer]
        parts = []
        for run, q, (k, v) in zip(self.rows.runs, self.inputs(layer).q.split(self.counts), contexts, strict=True):
            keys = range(run.start if past_only else run.stop)
            parts.append(exact_rows(q, run.start, k, v, keys, shape, sinks=not past_only))
        return join(parts)


def laid_out(numbers: Tensor, stride: int) -> Tensor:
    """The same numbers [T, H, D], elsewhere in memory: 0 in order, 1 a part of wider rows, 2 head after head, 3 with
    NaN between the numbers, 4 from an odd address on."""
    if stride == 1:
        return torch.cat([numbers, torch.full_like(numbers, torch.nan)], dim=1)[:, : numbers.shape[1]]
    if stride == 2:
        return numbers.transpose(0, 1).contiguous().transpose(0, 1)
    if stride == 3:
        return torch.stack([numbers, torch.full_like(numbers, torch.nan)], dim=-1)[..., 0]
    if stride == 4:
        return torch.cat([numbers.new_full((1,), torch.nan), numbers.flatten()])[1:].view(numbers.shape)
    return numbers


@st.composite
def layer_shapes(draw: st.DrawFn, target: Target) -> LayerShape:
    kv_heads = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    q_heads = kv_heads * draw(st.integers(1, 16))
    qk_dim = draw(st.sampled_from(target.dims))
    return LayerShape(
        q_heads=q_heads,
        kv_heads=kv_heads,
        qk_dim=qk_dim,
        v_dim=qk_dim if target.equal_dims else draw(st.just(qk_dim) | st.sampled_from(target.dims)),
        scale=draw(st.sampled_from([1.0, 1.0, 0.3, 2.0])) * qk_dim**-0.5,
        window=draw(st.none() | st.sampled_from([1, 2, 15, 16, 17, 100]) | st.integers(1, 700)),
        chunk=draw(st.none() | st.sampled_from([1, 16, 23, 100])) if target.positions else None,
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
        sinks=draw(st.none() | st.lists(st.floats(-3, 5), min_size=q_heads, max_size=q_heads).map(tuple)),
        slopes=draw(st.none() | st.lists(st.floats(-0.1, 1), min_size=q_heads, max_size=q_heads).map(tuple))
        if target.positions
        else None,
    )


@st.composite
def steps(draw: st.DrawFn, target: Target, dtype: str, *, work: float = 1.5e7, longest: int = 5000) -> Step:
    """A step that takes about ``work`` multiplications at most, over contexts of up to ``longest`` tokens."""
    shapes = draw(st.lists(layer_shapes(target), min_size=1, max_size=3))
    if len(shapes) > 1 and draw(st.booleans()):  # two layers of one group
        shapes[1] = replace(shapes[1], window=shapes[0].window, chunk=shapes[0].chunk)
    layout = KVLayout(layers=tuple(shapes), dtype=dtype, block_tokens=draw(st.sampled_from(target.block_tokens)))
    past = st.integers(0, 40) | st.integers(0, 300) | st.integers(0, longest)
    count = st.sampled_from([1, 1, 1, 2, 5]) | st.integers(1, 20) | st.integers(1, 200)
    runs = draw(st.lists(st.tuples(past, count), min_size=1, max_size=5))
    while sum(_work(layout, *run) for run in runs) > work:
        worst = max(range(len(runs)), key=lambda i: _work(layout, *runs[i]))
        past_tokens, new_tokens = runs[worst]
        runs[worst] = (past_tokens, new_tokens // 2) if new_tokens > 1 else (past_tokens // 2, 1)
    inputs = st.sampled_from(["float32", "bfloat16", "float16"])
    return Step(
        layout,
        pasts=tuple(past for past, _ in runs),
        counts=tuple(count for _, count in runs),
        seed=draw(st.integers(0, 99)),
        q_dtype=draw(inputs),
        kv_dtype=draw(inputs),
        chunk=draw(st.sampled_from([1 << 20, 1 << 20, 500, 50])),
        tight=draw(st.booleans()),
        stride=draw(st.sampled_from([0, 0, 1, 2, 3, 4])),
        threads=draw(st.sampled_from([1, 1, 2, 3])),
        device=target.device,
    )


def _work(layout: KVLayout, past: int, count: int) -> int:
    """Multiplications of attention, and as many for making up and storing keys and values."""
    return sum(
        (past + count) * (count * shape.q_heads + 16 * shape.kv_heads) * (shape.qk_dim + shape.v_dim)
        for shape in layout.layers
    )
