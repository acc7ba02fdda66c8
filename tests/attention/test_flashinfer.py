"""FlashInfer's kernels need a CUDA device. Where there is none, an emulation that follows its documentation stands in,
so that all that is around them is tested: page tables, windows, masks, buffers, padding, merging."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention import KVLayout, LayerShape, Partial, Rows, Run, create_backend
from lamina.attention.backend import Backend
from lamina.attention.flashinfer import backend as flashinfer_backend
from lamina.attention.flashinfer import parts
from lamina.attention.flashinfer.pages import find_pages, first_visible, page_views
from lamina.attention.pool import ExtentPool, Memory
from lamina.attention.torch_backend import TorchBackend
from lamina.errors import ConfigError, UsageError
from tests.attention.oracle import TOLERANCE, assert_close
from tests.attention.readback import read

PLAIN = LayerShape(q_heads=6, kv_heads=2, qk_dim=64, v_dim=64, scale=0.125)
SLIDING = replace(PLAIN, window=7)
CAPPED = replace(PLAIN, q_heads=4, softcap=5.0, sinks=(0.5, -1.0, 2.0, 0.0))

# -- the emulation

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = []
"""Every call of the emulation: class, method, arguments."""


def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: object, *args: Any, **kwargs: Any) -> Any:
        CALLS.append((type(self).__name__, method.__name__, args, kwargs))
        return method(self, *args, **kwargs)

    return record


@dataclass
class Planned:
    """What a plan said, for the run."""

    heads: tuple[int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    options: dict[str, Any]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        q_heads, kv_heads, dim = self.heads
        assert (q.dtype, k.dtype, v.dtype) == (self.dtypes[0], self.dtypes[1], self.dtypes[1])
        assert q.shape[1:] == (q_heads, dim)
        assert k.shape[-2:] == v.shape[-2:] == (kv_heads, dim)
        for one in (q, k, v):
            assert one.stride(-1) == 1
            assert one.data_ptr() % 16 == 0


def attend(planned: Planned, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One request. q: [Q, Hq, D]; k, v: [K, Hkv, D]; mask: bool [Q, K]. The logarithm has the base 2."""
    options, (queries, keys) = planned.options, (len(q), len(k))
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if options["window_left"] >= 0:
        visible &= key + queries + options["window_left"] >= keys + query
    if options["causal"]:
        visible &= key <= keys - queries + query
    if mask is not None:
        visible &= mask
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * options["sm_scale"]
    if options["logits_soft_cap"]:
        scores = options["logits_soft_cap"] * torch.tanh(scores / options["logits_soft_cap"])
    scores = scores.masked_fill(~visible, -torch.inf)
    # Values that are not visible are multiplied with 0, as in the kernels: NaN would show.
    o = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0), v.float().repeat_interleave(group, 1))
    return o.to(q.dtype), scores.logsumexp(-1).T / math.log(2)


def gather(pages: tuple[Tensor, Tensor], indices: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """k and v of one request: all entries of its pages, but of the last page only ``last``."""
    assert pages[0].stride() == pages[1].stride()
    page_size = pages[0].shape[1]
    k, v = (one[indices.long()].flatten(0, 1)[: (len(indices) - 1) * page_size + last] for one in pages)
    return k, v


def check_pages(indptr: Tensor, indices: Tensor, last: Tensor, page_size: int) -> None:
    assert indptr.dtype == indices.dtype == last.dtype == torch.int32
    assert indptr[0] == 0
    assert indptr[-1] == len(indices)
    assert (indptr.diff() >= 1).all()
    assert ((last >= 1) & (last <= page_size)).all()


class BatchDecodeWithPagedKVCacheWrapper:
    @recorded
    def __init__(
        self,
        workspace: Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
        backend: str,
    ) -> None:
        assert kv_layout == "NHD"
        self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer

    @recorded
    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        check_pages(indptr, indices, last_page_len, page_size)
        for buffer, new in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert len(new) == len(buffer) or (buffer is self.buffers[1] and len(new) <= len(buffer))
            buffer[: len(new)] = new
        options = {
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "window_left": window_left,
            "causal": False,
        }
        self.planned = Planned((num_qo_heads, num_kv_heads, head_dim), (q_data_type, kv_data_type), options)

    @recorded
    def run(self, q: Tensor, pages: tuple[Tensor, Tensor], *, return_lse: bool) -> tuple[Tensor, Tensor]:
        self.planned.check(q, *pages)
        indptr, indices, last = self.buffers
        assert len(q) == len(last)
        parts = [
            attend(self.planned, q[i : i + 1], *gather(pages, indices[indptr[i] : indptr[i + 1]], int(last[i])))
            for i in range(len(q))
        ]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


class BatchPrefillWithPagedKVCacheWrapper:
    @recorded
    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert kv_layout == "NHD"

    @recorded
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        custom_mask: Tensor | None,
        logits_soft_cap: float | None,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        check_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert qo_indptr.dtype == torch.int32
        assert custom_mask is None or custom_mask.dtype == torch.bool
        self.tables = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.mask = custom_mask
        options = {"logits_soft_cap": logits_soft_cap, "sm_scale": sm_scale, "window_left": -1, "causal": causal}
        self.planned = Planned((num_qo_heads, num_kv_heads, head_dim_qk), (q_data_type, kv_data_type), options)

    @recorded
    def run(self, q: Tensor, pages: tuple[Tensor, Tensor], *, return_lse: bool) -> tuple[Tensor, Tensor]:
        self.planned.check(q, *pages)
        rows, indptr, indices, last = self.tables
        assert len(q) == rows[-1]
        parts, used = [], 0
        for i in range(len(last)):
            own = q[rows[i] : rows[i + 1]]
            k, v = gather(pages, indices[indptr[i] : indptr[i + 1]], int(last[i]))
            mask = None
            if self.mask is not None:
                mask = self.mask[used : used + len(own) * len(k)].view(len(own), len(k))
                used += mask.numel()
            parts.append(attend(self.planned, own, k, v, mask))
        assert self.mask is None or used == len(self.mask)
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


class BatchPrefillWithRaggedKVCacheWrapper:
    @recorded
    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert kv_layout == "NHD"

    @recorded
    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        *,
        causal: bool,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.tables = qo_indptr.tolist(), kv_indptr.tolist()
        options = {
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "window_left": window_left,
            "causal": causal,
        }
        self.planned = Planned((num_qo_heads, num_kv_heads, head_dim_qk), (q_data_type, kv_data_type), options)

    @recorded
    def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> tuple[Tensor, Tensor]:
        self.planned.check(q, k, v)
        rows, keys = self.tables
        assert len(q) == rows[-1]
        assert len(k) == len(v) == keys[-1]
        parts = [
            attend(self.planned, *(x[at[i] : at[i + 1]] for x, at in ((q, rows), (k, keys), (v, keys))))
            for i in range(len(rows) - 1)
        ]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


class Host:
    """`Cuda`, without a device. A capture launches once more than is wanted, as the real one."""

    def __init__(self, device: torch.device) -> None:
        pass

    def upload(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy())

    def mark(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: None)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        return launch


EMULATION = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper=BatchPrefillWithRaggedKVCacheWrapper,
)

CUDA = torch.cuda.is_available()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.skipif(not CUDA, reason="FlashInfer's kernels need a CUDA device"),
                pytest.mark.timeout(3600),  # they are compiled when first used
                pytest.mark.filterwarnings("default"),  # FlashInfer's own are not ours to end
            ],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the backend runs: on a CUDA device with FlashInfer itself, on the CPU over the emulation."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            patch.setitem(sys.modules, "flashinfer", EMULATION)
            patch.setattr(flashinfer_backend, "Cuda", Host)
            patch.setattr(parts, "WORKSPACE_BYTES", 1 << 10)
            patch.setattr(flashinfer_backend, "PAGES_PER_ROW", 1)
            patch.setattr(flashinfer_backend, "DECODE_ROWS", 3)
        yield request.param


# -- steps, attended by FlashInfer and by the reference


class Pair:
    """The backend and the reference, each over a cache of its own, with the same content in different blocks."""

    def __init__(self, layout: KVLayout, tokens: list[int], device: str) -> None:
        self.layout = layout
        self.device = device
        self.sequences = range(len(tokens))
        self.backends: tuple[Backend, Backend] = (
            create_backend("flashinfer", layout, poisoned(4 << 20, device)),
            create_backend("torch", layout, Memory(4 << 20)),
        )
        for backend in self.backends:
            for sequence, count in enumerate(tokens):
                backend.cache.reserve(sequence, count)
        # So that blocks are not in order, and others lie between them.
        ours = self.backends[0].cache
        for sequence in self.sequences:
            ours.reserve(-1 - sequence, 3 * layout.block_tokens)
            for other in (sequence, -1 - sequence):
                ours.place(Rows((Run(other, 0, 1),)))

    def values(self, seed: int, layer: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        shape, dtype = self.layout.layers[layer], getattr(torch, self.layout.dtype)
        heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
        q, k, v = (torch.randn(rows, count, shape.v_dim, generator=generator).to(dtype) for count in heads)
        return q, k, v

    def append(self, rows: Rows, seed: int) -> None:
        for layer in range(len(self.layout.layers)):
            _, k, v = self.values(seed, layer, rows.tokens)
            for backend in self.backends:
                on = backend.cache.memory.device
                backend.append(layer, rows, k.to(on), v.to(on))

    def plan(self, rows: Rows) -> tuple[Any, Any]:
        ours, reference = self.backends
        return ours.plan(rows), reference.plan(rows)

    def attend(self, plans: tuple[Any, Any], layer: int, seed: int) -> list[list[Partial]]:
        """Past and whole, of both."""
        out = []
        for backend, plan in zip(self.backends, plans, strict=True):
            on = backend.cache.memory.device
            q, k, v = (one.to(on) for one in self.values(seed, layer, plan.rows.tokens))
            past = backend.past(plan, layer, q)
            both = past, backend.finish(plan, layer, q, k, v, past)
            out.append([Partial(part.o.cpu(), part.lse.cpu()) for part in both])
        return out

    def check(self, plans: tuple[Any, Any], layer: int, seed: int) -> None:
        ours, reference = self.attend(plans, layer, seed)
        softcap = self.layout.layers[layer].softcap or 0
        # FlashInfer's tanh is approximate: see the docstring of the backend.
        tolerance = TOLERANCE[self.layout.dtype] + (softcap / 1024 if self.device == "cuda" else 0)
        for actual, expected in zip(ours, reference, strict=True):
            assert_close(actual, Partial(expected.o.double(), expected.lse.double()), tolerance)

    def step(self, rows: Rows, seed: int) -> None:
        plans = self.plan(rows)
        for layer in range(len(self.layout.layers)):
            self.check(plans, layer, seed)


def poisoned(nbytes: int, device: str) -> Memory:
    """Memory that shows a read of what was never written: all ones is NaN in 16 bits."""
    memory = Memory(nbytes, device=device)
    memory.tensor.fill_(255)
    return memory


@st.composite
def layer_shapes(draw: st.DrawFn, *, dims: list[int]) -> LayerShape:
    kv_heads = draw(st.integers(1, 3))
    q_heads = kv_heads * draw(st.sampled_from([1, 2, 3, 5, 8]))
    dim = draw(st.sampled_from(dims))
    return LayerShape(
        q_heads=q_heads,
        kv_heads=kv_heads,
        qk_dim=dim,
        v_dim=dim,
        scale=dim**-0.5,
        window=draw(st.none() | st.integers(1, 5) | st.integers(1, 60)),
        softcap=draw(st.none() | st.just(5.0)),
        sinks=draw(st.none() | st.just(tuple(0.5 * head - 1 for head in range(q_heads)))),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_step_is_what_the_reference_gives(device: str, data: st.DataObject) -> None:
    """Runs of one row and longer ones, with and without a past, over scattered blocks; past and whole."""
    # Each size of heads and each type takes minutes to compile on a device.
    dims, dtypes = ([64, 128], ["bfloat16", "float16"]) if device == "cpu" else ([128], ["bfloat16"])
    layout = KVLayout(
        layers=tuple(data.draw(st.lists(layer_shapes(dims=dims), min_size=1, max_size=2))),
        dtype=data.draw(st.sampled_from(dtypes)),
        block_tokens=data.draw(st.sampled_from([1, 3, 16])),
    )
    runs = data.draw(
        st.lists(st.tuples(st.integers(0, 50), st.just(1) | st.integers(1, 40)), min_size=1, max_size=4), label="runs"
    )
    pair = Pair(layout, [start + count for start, count in runs], device)
    for sequence, (start, _) in enumerate(runs):
        if start:
            pair.append(Rows((Run(sequence, 0, start),)), seed=100 + sequence)
    rows = Rows(tuple(Run(sequence, *run) for sequence, run in enumerate(runs)))

    pair.step(rows, seed=1)
    pair.step(rows, seed=2)  # a replay overwrites


LAYOUT = KVLayout(layers=(PLAIN, SLIDING, CAPPED, SLIDING), dtype="bfloat16")


def test_prefill_and_decode_step_after_step(device: str) -> None:
    """Buffers and graphs are used again from step to step, while rows come and go and contexts outgrow them."""
    pair = Pair(LAYOUT, [200] * 5, device)
    starts = [0] * 5
    generator = np.random.default_rng(0)
    for step in range(40):
        there = generator.permutation(5)[: generator.integers(1, 6)]
        counts = [1 if step > 4 and generator.random() < 0.9 else 4 for _ in there]
        runs = [Run(int(i), starts[i], count) for i, count in zip(there, counts, strict=True)]
        pair.step(Rows(tuple(runs)), seed=step)
        for run in runs:
            starts[run.sequence] = run.stop


def test_plans_that_live_together_do_not_disturb_each_other(device: str) -> None:
    """Several batches are in flight: each is planned before the others have gone through the layers."""
    pair = Pair(LAYOUT, [20, 30, 40, 50], device)
    for sequence in range(4):
        pair.append(Rows((Run(sequence, 0, 10 * (sequence + 1)),)), seed=sequence)
    batches = [(0, 1), (2, 3)]
    pair.plan(Rows((Run(0, 10, 1), Run(1, 20, 1))))  # leaves its buffers to one of them
    plans = [pair.plan(Rows(tuple(Run(i, 10 * (i + 1), 1) for i in batch))) for batch in batches]

    for layer in range(len(LAYOUT.layers)):
        for seed, both in enumerate(plans):
            pair.check(both, layer, seed)


def test_results_outlast_the_next_layer(device: str) -> None:
    """What a layer gave is the caller's: later layers and steps leave it alone."""
    pair = Pair(LAYOUT, [20], device)
    pair.append(Rows((Run(0, 0, 10),)), seed=2)
    plans = pair.plan(Rows((Run(0, 10, 1),)))
    backend = pair.backends[0]
    q, k, v = (one.to(device) for one in pair.values(0, 1, 1))
    past = backend.past(plans[0], 1, q)
    whole = backend.finish(plans[0], 1, q, k, v, past)
    before = [part.clone() for part in (*past, *whole)]
    q, k, v = (one.to(device) for one in pair.values(1, 3, 1))

    backend.finish(plans[0], 3, q, k, v, backend.past(plans[0], 3, q))

    assert all(torch.equal(now, then) for now, then in zip((*past, *whole), before, strict=True))


def test_the_past_is_what_the_caller_hands_over(device: str) -> None:
    """It may have come from other shards as well: nothing is remembered from one call to the other."""
    pair = Pair(LAYOUT, [20, 20], device)
    pair.append(Rows((Run(0, 0, 10), Run(1, 0, 10))), seed=2)
    for counts in ((1, 1), (1, 5)):
        rows = Rows(tuple(Run(sequence, 10, count) for sequence, count in enumerate(counts)))
        wholes = []
        for backend, plan in zip(pair.backends, pair.plan(rows), strict=True):
            on = backend.cache.memory.device
            q, k, v = (one.to(on) for one in pair.values(0, 0, rows.tokens))
            backend.past(plan, 0, q)
            nothing = Partial.empty(rows.tokens, PLAIN.q_heads, PLAIN.v_dim, device=on)
            whole = backend.finish(plan, 0, q, k, v, nothing)
            wholes.append(Partial(whole.o.cpu(), whole.lse.cpu()))
        assert_close(wholes[0], Partial(wholes[1].o.double(), wholes[1].lse.double()), TOLERANCE["bfloat16"])


def test_a_dropped_plan_leaves_its_buffers_to_the_next(device: str) -> None:
    """Steady decoding makes nothing new, until its contexts have outgrown what was made."""
    if device == "cuda":
        pytest.skip("only the emulation counts its wrappers")
    pair = Pair(LAYOUT, [64], device)
    CALLS.clear()
    for position in range(40):  # three blocks, where there is room for two at first
        plans = pair.plan(Rows((Run(0, position, 1),)))
        for layer in range(len(LAYOUT.layers)):
            pair.check(plans, layer, seed=position)
        del plans

    made = [name for name, method, _, _ in CALLS if method == "__init__"]
    kinds, times = 3, 2
    assert made == ["BatchDecodeWithPagedKVCacheWrapper"] * kinds * times


def test_published_blocks_keep_what_they_hold(device: str) -> None:
    """A replay over a published block stores nothing, and attends to what is there."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype="bfloat16", block_tokens=4)
    pair = Pair(layout, [10], device)
    rows = Rows((Run(0, 2, 5),))
    pair.append(Rows((Run(0, 0, 7),)), seed=0)
    for backend in pair.backends:
        backend.cache.publish(0, [bytes(16)])
    before = read(pair.backends[0], 0, 0, 0, 4)

    pair.step(rows, seed=1)

    after = read(pair.backends[0], 0, 0, 0, 4)
    assert torch.equal(before.k, after.k)
    assert torch.equal(before.v, after.v)


def test_blocks_are_laid_out_as_those_of_the_reference(device: str) -> None:
    """Appended or stored by a step, the same bits are found by the layout of the reference, and attended to."""
    pair = Pair(LAYOUT, [40], device)
    pair.append(Rows((Run(0, 0, 33),)), seed=0)

    for rows in (Rows((Run(0, 33, 1),)), Rows((Run(0, 34, 6),))):
        pair.step(rows, seed=1)

    for layer, shape in enumerate(LAYOUT.layers):
        start = 0 if shape.window is None else 34
        ours, reference = (read(backend, 0, layer, start, 40) for backend in pair.backends)
        assert torch.equal(ours.k, reference.k)
        assert torch.equal(ours.v, reference.v)


def test_a_released_sequence_ends_its_plans(device: str) -> None:
    pair = Pair(LAYOUT, [20], device)
    plan, _ = pair.plan(Rows((Run(0, 0, 1),)))
    q, k, v = (one.to(device) for one in pair.values(0, 0, 1))
    backend = pair.backends[0]
    past = backend.past(plan, 0, q)
    backend.cache.release(0)

    with pytest.raises(UsageError, match="released"):
        backend.past(plan, 0, q)
    with pytest.raises(UsageError, match="released"):
        backend.finish(plan, 0, q, k, v, past)


def test_a_plan_does_not_outlive_what_its_windows_reach(device: str) -> None:
    """Where a later step has let blocks go that the window of an earlier one reaches."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype="bfloat16", block_tokens=4)
    pair = Pair(layout, [64], device)
    pair.append(Rows((Run(0, 0, 20),)), seed=0)
    early, _ = pair.plan(Rows((Run(0, 20, 1),)))
    q, k, v = (one.to(device) for one in pair.values(0, 1, 1))
    backend = pair.backends[0]
    past = backend.past(early, 1, q)
    pair.append(Rows((Run(0, 20, 40),)), seed=1)
    pair.plan(Rows((Run(0, 60, 1),)))

    with pytest.raises(UsageError, match="were freed after the step at 20 had been planned"):
        backend.past(early, 1, q)
    with pytest.raises(UsageError, match="were freed after the step at 20 had been planned"):
        backend.finish(early, 1, q, k, v, past)
    backend.past(early, 0, q)


@pytest.mark.parametrize("wrong", range(5))
def test_wrong_tensors_are_refused_before_anything_is_stored(device: str, wrong: int) -> None:
    """One head too few in q, k, v, o or lse, and one of them on another device."""
    pair = Pair(LAYOUT, [20], device)
    plan, _ = pair.plan(Rows((Run(0, 0, 2),)))
    backend = pair.backends[0]
    q, k, v = (one.to(device) for one in pair.values(0, 0, 2))
    right = (q, k, v, *backend.past(plan, 0, q))
    for tensor in (right[wrong][:, :-1], right[wrong].to("meta")):
        q, k, v, o, lse = (tensor if i == wrong else one for i, one in enumerate(right))
        with pytest.raises(UsageError, match=f"layer 0: expected {('q', 'k', 'v', 'o', 'lse')[wrong]} o"):
            backend.finish(plan, 0, q, k, v, Partial(o, lse))
        if wrong == 0:
            with pytest.raises(UsageError, match="layer 0: expected q o"):
                backend.past(plan, 0, q)
        assert backend.cache.filled(0, 0) == 0


# -- page tables


@settings(max_examples=100, deadline=None)
@given(
    block_tokens=st.integers(1, 20),
    contexts=st.lists(st.tuples(st.integers(0, 100), st.none() | st.integers(1, 40)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_pages_are_the_positions_that_the_reference_reads(
    block_tokens: int, contexts: list[tuple[int, int | None]], seed: int
) -> None:
    """Gathered as FlashInfer documents its page tables, they hold what was stored, from a window's first page on."""
    layout = KVLayout(layers=(PLAIN, replace(PLAIN, kv_heads=1)), dtype="bfloat16", block_tokens=block_tokens)
    backend = create_backend("torch", layout, ExtentPool(poisoned(8 << 20, "cpu"), extent_bytes=64 * 2048))
    cache, generator = backend.cache, torch.Generator().manual_seed(seed)
    assert isinstance(backend, TorchBackend)
    for sequence in range(len(contexts)):
        cache.reserve(sequence, 100)
    for start in range(0, 100, 10):  # a little of each in turn, so that their blocks are mixed
        for sequence in range(len(contexts)):
            for layer, shape in enumerate(layout.layers):
                k, v = torch.randn(2, 10, shape.kv_heads, 64, generator=generator)
                backend.append(layer, Rows((Run(sequence, start, 10),)), k, v)
    placement = cache.place(Rows(tuple(Run(sequence, 99, 1) for sequence in range(len(contexts)))))
    stops = np.array([stop for stop, _ in contexts])
    firsts = np.concatenate([first_visible(np.array([stop]), window) for stop, window in contexts])

    for layer in range(2):
        tables = placement.tables(cache.group_of(layer))
        pages = find_pages(tables, firsts, stops, block_tokens=block_tokens)
        check_pages(*map(torch.from_numpy, pages), block_tokens)
        views = page_views(cache, layer)
        for i, (first, stop) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True)):
            indices = torch.from_numpy(pages.indices[pages.indptr[i] : pages.indptr[i + 1]])
            if first >= stop:
                assert (indices.tolist(), pages.last_page_len[i]) == ([0], 1)
                continue
            k, v = gather(views, indices, int(pages.last_page_len[i]))
            stored = read(backend, i, layer, first // block_tokens * block_tokens, stop)
            assert torch.equal(k, stored.k)
            assert torch.equal(v, stored.v)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(1, 100), window=st.integers(2, 60), block_tokens=st.integers(1, 20))
def test_the_window_of_a_past_is_exact_for_one_query(position: int, window: int, block_tokens: int) -> None:
    """``window_left = W - 2``, counted from the last key of the past, leaves the W - 1 positions before the query."""
    first = int(first_visible(np.array([position]), window)[0])
    begin = first // block_tokens * block_tokens
    keys, window_left = position - begin, window - 2

    visible = [begin + key for key in range(keys) if key + 1 + window_left >= keys]

    assert visible == list(range(max(0, position - window + 1), position))


# -- FlashInfer itself, as far as it goes without a device


def test_every_call_fits_the_installed_package() -> None:
    """All arguments that the backend gives are in the signatures of the package that is installed."""
    library = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", EMULATION)
        patch.setattr(flashinfer_backend, "Cuda", Host)
        patch.setattr(parts, "WORKSPACE_BYTES", 1 << 10)
        CALLS.clear()
        pair = Pair(LAYOUT, [40, 40], "cpu")
        pair.step(Rows((Run(0, 0, 12), Run(1, 0, 1))), seed=0)
        pair.step(Rows((Run(0, 12, 12), Run(1, 1, 1))), seed=1)
    assert {name for name, *_ in CALLS} == set(vars(EMULATION))

    for name, method, args, kwargs in CALLS:
        owner = getattr(library, name)
        # The plan of decode takes its options as **kwargs and hands them on.
        inner = getattr(owner, "_plan_impl", None) if method == "plan" else None
        inspect.signature(inner or getattr(owner, method)).bind(object(), *args, **kwargs)


# -- what is refused


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (PLAIN, "float32", r"type float32; it needs bfloat16 or float16; use the backend torch"),
        (PLAIN, "int8", r"type int8 with a scale for each token and head; it needs"),
        (PLAIN, "float8_e4m3fn", r"type float8_e4m3fn with a scale for each token and head; it needs"),
        (replace(PLAIN, qk_dim=192, v_dim=128), "bfloat16", r"layer 0: qk_dim 192 with v_dim 128; it needs equal ones"),
        (replace(PLAIN, qk_dim=80, v_dim=80), "bfloat16", r"layer 0: head size 80; it needs one of 64, 128, 256"),
        (replace(PLAIN, scale=-1.0), "bfloat16", r"layer 0: scale -1.0; it needs a number > 0"),
    ],
)
def test_what_flashinfer_cannot_do_is_refused_by_name(shape: LayerShape, dtype: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backend("flashinfer", KVLayout(layers=(shape,), dtype=dtype), Memory(1 << 20))


def test_memory_of_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected memory on a CUDA device, got cpu; use the backend native or torch"):
        create_backend("flashinfer", LAYOUT, Memory(1 << 20))


def test_a_missing_package_is_named() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", None)
        patch.setattr(flashinfer_backend, "Cuda", Host)
        with pytest.raises(ConfigError, match=r"use the backend torch, or .* pip install '\.\[flashinfer\]'"):
            create_backend("flashinfer", LAYOUT, Memory(1 << 20))
