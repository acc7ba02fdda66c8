"""What every backend promises. A new backend joins by its name in BACKENDS."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention import Backend, KVCache, KVLayout, LayerShape, Partial, Rows, Run, attend, create_backend
from lamina.errors import CapacityError, ConfigError, UsageError
from tests.attention.oracle import TOLERANCE, assert_close, exact_rows

BACKENDS = ["torch"]
every_backend = pytest.mark.parametrize("name", BACKENDS)


def poison(cache: KVCache) -> None:
    """Make whoever reads a slot that was never written show it."""
    for store in (*cache.keys, *cache.values):
        store.fill_(torch.nan)


@dataclass(frozen=True)
class Step:
    """One step over sequences 0, 1, ... that hold ``pasts[i]`` positions already and get ``counts[i]`` more."""

    layout: KVLayout
    pasts: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int = 0

    @property
    def rows(self) -> Rows:
        return Rows(tuple(Run(i, *run) for i, run in enumerate(zip(self.pasts, self.counts, strict=True))))

    def tensors(self, layer: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """q: [T, Hq, Dk], and per sequence k: [past + count, Hkv, Dk] and v: [past + count, Hkv, Dv]."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        shape, dtype = self.layout.layers[layer], getattr(torch, self.layout.dtype)
        lengths = [past + count for past, count in zip(self.pasts, self.counts, strict=True)]
        q = torch.randn(sum(self.counts), shape.q_heads, shape.qk_dim, generator=generator)
        k = [torch.randn(length, shape.kv_heads, shape.qk_dim, generator=generator) for length in lengths]
        v = [torch.randn(length, shape.kv_heads, shape.v_dim, generator=generator) for length in lengths]
        return q.to(dtype), [one.to(dtype) for one in k], [one.to(dtype) for one in v]

    def new(self, stored: list[Tensor]) -> Tensor:
        """The rows of this step out of whole contexts: [T, ...]."""
        return torch.cat([one[past:] for past, one in zip(self.pasts, stored, strict=True)])

    def prepare(self, name: str) -> tuple[KVCache, Backend]:
        """A cache that holds the past of every layer in scattered blocks, and poison everywhere else."""
        size = self.layout.block_tokens
        blocks = sum(-(-(past + count) // size) + 1 for past, count in zip(self.pasts, self.counts, strict=True))
        cache = KVCache(self.layout, blocks * self.layout.bytes_per_block)
        poison(cache)
        for filler in range(blocks):
            cache.reserve(-1 - filler, 1)
        for filler in [*range(0, blocks, 2), *range(1, blocks, 2)]:
            cache.release(-1 - filler)
        for run in self.rows.runs:
            cache.reserve(run.sequence, run.stop)
        for layer in range(len(self.layout.layers)):
            _, k, v = self.tensors(layer)
            for run in self.rows.runs:
                if run.start:
                    past = Rows((Run(run.sequence, 0, run.start),))
                    cache.append(layer, past, k[run.sequence][: run.start], v[run.sequence][: run.start])
        return cache, create_backend(name, cache)

    def expected(self, layer: int, *, past_only: bool) -> Partial:
        """What the oracle says about all rows of the step."""
        shape = self.layout.layers[layer]
        q, k, v = self.tensors(layer)
        parts = []
        for run, rows in zip(self.rows.runs, q.split(self.counts), strict=True):
            keys = range(run.start if past_only else run.stop)
            parts.append(exact_rows(rows, run.start, k[run.sequence], v[run.sequence], keys, shape))
        return Partial(torch.cat([part.o for part in parts]), torch.cat([part.lse for part in parts]))


dims = st.sampled_from([8, 16, 24, 64, 80, 128])


@st.composite
def layer_shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 4))
    qk_dim = draw(dims)
    return LayerShape(
        q_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16])),
        kv_heads=kv_heads,
        qk_dim=qk_dim,
        v_dim=draw(dims),
        scale=qk_dim**-0.5,
        window=draw(st.none() | st.sampled_from([1, 2, 15, 16, 17, 100]) | st.integers(1, 700)),
        softcap=draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    layout = KVLayout(
        layers=tuple(draw(st.lists(layer_shapes(), min_size=1, max_size=2))),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        block_tokens=draw(st.sampled_from([1, 2, 3, 16, 32])),
    )
    count = st.sampled_from([1, 1, 1, 2, 5]) | st.integers(1, 70)
    runs = draw(st.lists(st.tuples(st.integers(0, 40) | st.integers(0, 600), count), min_size=1, max_size=4))
    pasts, counts = zip(*runs, strict=True)
    return Step(layout, pasts, counts, seed=draw(st.integers(0, 99)))


@every_backend
@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_a_step_is_the_exact_attention(name: str, step: Step) -> None:
    """`past` covers what was there, `finish` everything; unwritten slots do not show; a replay changes nothing."""
    cache, backend = step.prepare(name)
    plan = backend.plan(step.rows)
    assert plan.rows == step.rows

    for layer in range(len(step.layout.layers)):
        q, k, v = step.tensors(layer)
        past = backend.past(plan, layer, q)
        whole = backend.finish(plan, layer, q, step.new(k), step.new(v), past)

        assert_close(past, step.expected(layer, past_only=True), TOLERANCE[step.layout.dtype])
        assert_close(whole, step.expected(layer, past_only=False), TOLERANCE[step.layout.dtype])
        assert all(cache.filled(run.sequence, layer) == run.stop for run in step.rows.runs)

        replayed = backend.finish(plan, layer, q, step.new(k), step.new(v), backend.past(plan, layer, q))
        assert torch.equal(replayed.o, whole.o)
        assert torch.equal(replayed.lse, whole.lse)


PLAIN = LayerShape(q_heads=6, kv_heads=2, qk_dim=16, v_dim=24, scale=0.25)
SLIDING = LayerShape(q_heads=6, kv_heads=2, qk_dim=16, v_dim=24, scale=0.25, window=7)


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_in_chunks_and_decode_are_one_attention(name: str, dtype: str) -> None:
    """A sequence that grows by 1, 30, 1, 1, 5 and 1 tokens gets what one attention over all its tokens gives."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype=dtype)
    tokens = 39
    whole = Step(layout, (0,), (tokens,))
    cache = KVCache(layout, 3 * layout.bytes_per_block)
    poison(cache)
    cache.reserve(0, tokens)
    backend = create_backend(name, cache)

    parts: list[list[Partial]] = [[], []]
    start = 0
    for count in (1, 30, 1, 1, 5, 1):
        plan = backend.plan(Rows((Run(0, start, count),)))
        for layer in range(2):
            q, (k,), (v,) = whole.tensors(layer)
            q, k, v = (one[start : start + count] for one in (q, k, v))
            parts[layer].append(backend.finish(plan, layer, q, k, v, backend.past(plan, layer, q)))
        start += count

    for layer, shape in enumerate(layout.layers):
        q, (k,), (v,) = whole.tensors(layer)
        joined = Partial(torch.cat([part.o for part in parts[layer]]), torch.cat([part.lse for part in parts[layer]]))
        once = attend(q, k, v, shape=shape, q_start=0)
        assert_close(joined, Partial(once.o.double(), once.lse.double()), TOLERANCE[dtype])


@every_backend
def test_batch_mates_do_not_change_a_sequence(name: str) -> None:
    """A sequence whose values are NaN spoils nobody else's output, though it shares the batch."""
    layout = KVLayout(layers=(PLAIN,), dtype="float32")
    step = Step(layout, (5, 40, 40), (1, 1, 1))
    cache, backend = step.prepare(name)
    q, k, v = step.tensors(0)
    v[1].fill_(torch.nan)
    cache.append(0, Rows((Run(1, 0, 40),)), k[1][:40], v[1][:40])

    plan = backend.plan(step.rows)
    whole = backend.finish(plan, 0, q, step.new(k), step.new(v), backend.past(plan, 0, q))

    healthy = [0, 2]
    expected = step.expected(0, past_only=False)
    assert_close(
        Partial(whole.o[healthy], whole.lse[healthy]), Partial(expected.o[healthy], expected.lse[healthy]), 1e-5
    )
    assert whole.o[1].isnan().all()


@every_backend
def test_a_step_with_many_sequences_and_long_contexts(name: str) -> None:
    """Batches are cut where they would become too large, and every row still finds its own output."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype="float32")
    pasts = tuple((701 * i) % 1500 for i in range(12))
    step = Step(layout, pasts, tuple(130 if i == 4 else 1 for i in range(12)))
    _, backend = step.prepare(name)

    plan = backend.plan(step.rows)
    for layer in range(2):
        q, k, v = step.tensors(layer)
        whole = backend.finish(plan, layer, q, step.new(k), step.new(v), backend.past(plan, layer, q))
        assert_close(whole, step.expected(layer, past_only=False), 1e-5)


@every_backend
def test_the_past_has_to_be_there(name: str) -> None:
    """Attending to positions that no append has brought is an error in the layer that lacks them."""
    layout = KVLayout(layers=(PLAIN, PLAIN), dtype="float32")
    cache = KVCache(layout, layout.bytes_per_block)
    cache.reserve(0, 3)
    cache.append(0, Rows((Run(0, 0, 2),)), torch.zeros(2, 2, 16), torch.zeros(2, 2, 24))
    backend = create_backend(name, cache)
    plan = backend.plan(Rows((Run(0, 2, 1),)))
    q = torch.zeros(1, 6, 16)

    backend.past(plan, 0, q)
    with pytest.raises(UsageError, match=r"sequence 0, layer 1: position 2 comes after 0 stored"):
        backend.past(plan, 1, q)


@every_backend
def test_a_plan_does_not_outlive_its_sequences(name: str) -> None:
    """When a sequence has been released, its blocks may be another's: the plan is refused."""
    layout = KVLayout(layers=(PLAIN,), dtype="float32")
    step = Step(layout, (3,), (1,))
    cache, backend = step.prepare(name)
    plan = backend.plan(step.rows)
    q, k, v = step.tensors(0)
    past = backend.past(plan, 0, q)
    cache.release(0)
    cache.reserve(0, 4)

    with pytest.raises(UsageError, match="released"):
        backend.past(plan, 0, q)
    with pytest.raises(UsageError, match="released"):
        backend.finish(plan, 0, q, step.new(k), step.new(v), past)
    assert cache.filled(0, 0) == 0


@every_backend
def test_a_plan_stays_within_reservations(name: str) -> None:
    layout = KVLayout(layers=(PLAIN,), dtype="float32")
    cache = KVCache(layout, layout.bytes_per_block)
    cache.reserve(0, 3)

    with pytest.raises(CapacityError, match=r"sequence 0 .* 3 tokens, position 3 needs 4"):
        create_backend(name, cache).plan(Rows((Run(0, 0, 4),)))


def test_an_unknown_backend_lists_the_known_ones() -> None:
    layout = KVLayout(layers=(PLAIN,), dtype="float32")

    with pytest.raises(ConfigError, match=r"one of torch, got 'tensorflow'"):
        create_backend("tensorflow", KVCache(layout, layout.bytes_per_block))
