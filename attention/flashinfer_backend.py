"""The backend for CUDA devices: FlashInfer's FA2 kernels read the blocks of the cache where they lie.

A block of the cache is one of FlashInfer's pages. Pages are counted in cache lines, over a view of the whole memory
that overlaps itself: page ``i`` of a layer begins ``i * UNIT`` bytes behind page 0.

The runs of one row in a step are a `_Decode`, the longer ones a `_Prefill`; both attend to the past over pages and to
the new tokens apart. FlashInfer puts the last query at the last key, but the past ends just before the first query.
For one query that makes a window of W tokens one of W - 1 keys, ``window_left = W - 2``. For more queries the
difference depends on how many there are, which one plan for several runs cannot say: they bring their mask.

q is rounded to the type stored, and o is rounded to it before partial results are merged. FlashInfer takes an
approximate tanh for soft-caps: scores are then off by up to ``softcap / 2048``. Its kernels are compiled when first
used, which takes the CUDA compiler and some minutes, once per machine.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.attention.backend import Plan, Stored, check_key_value, check_past, check_query
from lamina.attention.cache import Integers, KVCache, Placement
from lamina.attention.dense import attend_visible, visible_keys
from lamina.attention.layout import SCALED, KVLayout
from lamina.attention.partial import Partial, merge
from lamina.attention.pool import ALIGNMENT
from lamina.attention.rows import Rows
from lamina.attention.torch_backend import TorchBackend, layer_bytes
from lamina.errors import ConfigError, UsageError

__all__ = ["FlashInferBackend", "layer_bytes"]

TYPES = ("bfloat16", "float16")

HEAD_DIMS = (64, 128, 256)
"""FlashInfer does not check them: others are computed wrongly, or read what they must not."""

DECODE_ROWS = 512
"""Rows of one decode part; a step with more has several."""

WORKSPACE_BYTES = 384 << 20
"""Scratch for contexts that are split over processors, shared by all plans. A part of B rows takes up to
``Hkv * 2 B * 16 * (D + 1) * 4`` bytes where Hq <= 16 Hkv, and up to 4 times that beyond: 47 or 11 heads of 128."""

PAGES_PER_ROW = 1024
"""Room for page numbers that a decode step has at least; more when contexts outgrow it."""

UNIT = ALIGNMENT
"""Every block begins at a multiple of it."""

MAX_PAGES = 2**31
"""FlashInfer's page numbers are int32: they reach 128 GiB."""

NATURAL = math.log(2)
"""FlashInfer's logarithms have the base 2."""


class Pages(NamedTuple):
    """The pages of B contexts, as FlashInfer wants them: int32 on the host.

    Those of context ``i`` are ``indices[indptr[i] : indptr[i + 1]]``, all of them full but the last.
    """

    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    last_page_len: NDArray[np.int32]


def find_pages(
    tables: Sequence[Integers],
    starts: Integers,
    stops: Integers,
    *,
    block_tokens: int,
) -> Pages:
    """The pages that hold the positions starts[i]..stops[i]-1 of a sequence with the block table tables[i].

    They begin with the page that holds starts[i]. Instead of no positions it is the first entry of page 0, which is
    always there to be read: whatever that gives is not to be used.
    """
    empty = starts >= stops
    first, last = starts // block_tokens, -(-stops // block_tokens)
    blocks = [
        _PAGE_0 if nothing else table[begin:end]
        for table, begin, end, nothing in zip(tables, first.tolist(), last.tolist(), empty.tolist(), strict=True)
    ]
    indptr = np.zeros(len(blocks) + 1, dtype=np.int32)
    np.cumsum(np.where(empty, 1, last - first), out=indptr[1:])
    return Pages(
        indptr,
        (np.concatenate(blocks) // UNIT).astype(np.int32),
        np.where(empty, 1, (stops - 1) % block_tokens + 1).astype(np.int32),
    )


_PAGE_0 = np.zeros(1, dtype=np.int64)


def page_views(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """k and v of a layer, of every page that all memory could hold: [pages, block_tokens, Hkv, D]."""
    shape, tokens, nbytes = cache.shape(layer), cache.layout.block_tokens, cache.memory.nbytes
    dtype: torch.dtype = getattr(torch, cache.layout.dtype)
    begin, size = cache.layer_offset(layer), layer_bytes(shape, cache.layout.dtype, tokens)
    pages = (nbytes - begin - size) // UNIT + 1
    if pages > MAX_PAGES:
        raise ConfigError(
            f"attention backend flashinfer: expected memory of at most {MAX_PAGES * UNIT} bytes, got {nbytes}; "
            f"run two memory nodes on this device"
        )
    numbers = cache.memory.tensor[: nbytes // UNIT * UNIT].view(dtype)
    strides = (UNIT // dtype.itemsize, shape.kv_heads * shape.v_dim, shape.v_dim, 1)
    k, v = (
        numbers.as_strided((pages, tokens, shape.kv_heads, shape.v_dim), strides, start // dtype.itemsize)
        for start in (begin, begin + size // 2)
    )
    return k, v


def first_visible(positions: Integers, window: int | None) -> Integers:
    """The first position that a query at each of ``positions`` sees."""
    return np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that one plan of FlashInfer serves: of one group, and alike in what FlashInfer is told at the plan."""

    group: int
    q_heads: int
    kv_heads: int
    dim: int
    window: int | None
    scale: float
    softcap: float | None


class Cuda:
    """What cannot be had without a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"attention backend flashinfer: expected memory on a CUDA device, got {device}; "
                f"use the backend native or torch there"
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ConfigError(
                f"attention backend flashinfer: expected a device of compute capability 8.0 or later, got "
                f"{'.'.join(map(str, capability))}; use the backend torch there"
            )
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event after all that was launched so far."""
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record()
        return event

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """``launch`` as a graph: the same kernels over the same memory, at the cost of one launch.

        Graphs share the memory of their temporary tensors. What is to last, ``launch`` puts into tensors of its owner.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                launch()  # compiles and loads what it needs, which a capture cannot record
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                launch()
        return graph.replay


class _Shared:
    """What all plans of a backend have in common."""

    def __init__(self, cache: KVCache, cuda: Cuda, library: Any) -> None:
        self.cache = cache
        self.library = library
        self.device = cache.memory.device
        self.upload, self.mark, self.capture = cuda.upload, cuda.mark, cuda.capture
        self.block_tokens = cache.layout.block_tokens
        self.dtype: torch.dtype = getattr(torch, cache.layout.dtype)
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        layers = range(len(cache.layout.layers))
        self.kinds = [_kind(cache, layer) for layer in layers]
        self.pages = [page_views(cache, layer) for layer in layers]
        self.sinks = [
            None if shape.sinks is None else torch.tensor(shape.sinks, dtype=torch.float32, device=self.device)
            for shape in cache.layout.layers
        ]

    def options(self, kind: Kind) -> dict[str, Any]:
        """What FlashInfer is told at every plan."""
        return {
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def join(self, layer: int, past: Partial, new: Partial) -> Partial:
        """All that rows attend to: the past, the new tokens and the sinks of the layer."""
        sinks = self.sinks[layer]
        if sinks is None:
            return merge(past, new)
        return merge(past, new, Partial(torch.zeros_like(new.o), sinks.expand_as(new.lse)))


class _Decode:
    """Steps of up to ``rows`` runs of one row each, whose contexts take up to ``pages`` pages in each group.

    Everything that a step touches stays where it is, so that its kernels are captured once and replayed. Rows that a
    step does not need read page 0, and their output is dropped.
    """

    def __init__(self, shared: _Shared, rows: int, pages: int) -> None:
        self.rows = rows
        self.pages = pages
        self._shared = shared
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}
        self._planned: torch.cuda.Event | None = None
        device = shared.device
        self._empty = [torch.ones(rows, 1, dtype=torch.bool, device=device) for _ in shared.cache.groups]
        """By group: bool [rows, 1], which rows have no past."""
        self._visible = torch.ones(rows, 1, 1, dtype=torch.bool, device=device)
        self._wrappers = {
            kind: shared.library.BatchDecodeWithPagedKVCacheWrapper(
                shared.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,  # one kernel for every ratio of heads, and for longer runs
                paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=device),
                paged_kv_indices_buffer=torch.zeros(pages, dtype=torch.int32, device=device),
                paged_kv_last_page_len_buffer=torch.zeros(rows, dtype=torch.int32, device=device),
                backend="fa2",
            )
            for kind in dict.fromkeys(shared.kinds)
        }
        self._tensors = {kind: _Tensors(rows, kind, shared.dtype, device) for kind in self._wrappers}

    def plan(self, contexts: Sequence[Pages], empty: Sequence[NDArray[np.bool_]]) -> None:
        """By group: the pages that each row reads, and which rows are to read nothing."""
        shared = self._shared
        if self._planned is not None:
            self._planned.synchronize()  # the last plan may still be on its way from where this one is written
        indices = [shared.upload(pages.indices) for pages in contexts]
        for now, then in zip(self._empty, empty, strict=True):
            now.copy_(shared.upload(then[:, None]))
        for kind, wrapper in self._wrappers.items():
            wrapper.plan(
                torch.from_numpy(contexts[kind.group].indptr),
                indices[kind.group],
                torch.from_numpy(contexts[kind.group].last_page_len),
                kind.q_heads,
                kind.kv_heads,
                kind.dim,
                shared.block_tokens,
                # With a window of 1 no row has a past; -1, which means no window, then does no harm.
                window_left=-1 if kind.window is None else kind.window - 2,
                **shared.options(kind),
            )
        self._planned = shared.mark()

    def past(self, layer: int, q: Tensor) -> Partial:
        tensors, rows = self._tensors[self._shared.kinds[layer]], len(q)
        tensors.q[:rows] = q
        self._launch("past", layer, self._past)
        return Partial(tensors.past.o[:rows].clone(), tensors.past.lse[:rows].clone())

    def finish(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        tensors, rows = self._tensors[self._shared.kinds[layer]], len(q)
        tensors.exact_q[:rows], tensors.k[:rows], tensors.v[:rows] = q, k, v
        tensors.past.o[:rows], tensors.past.lse[:rows] = past
        self._launch("finish", layer, self._finish)
        return Partial(tensors.whole.o[:rows].clone(), tensors.whole.lse[:rows].clone())

    def _launch(self, name: str, layer: int, launch: Callable[[int], None]) -> None:
        if (name, layer) not in self._graphs:
            self._graphs[name, layer] = self._shared.capture(lambda: launch(layer))
        self._graphs[name, layer]()

    def _past(self, layer: int) -> None:
        kind = self._shared.kinds[layer]
        tensors, empty = self._tensors[kind], self._empty[kind.group]
        o, lse = self._wrappers[kind].run(tensors.q, self._shared.pages[layer], return_lse=True)
        tensors.past.o.copy_(o.masked_fill(empty.unsqueeze(-1), 0))
        tensors.past.lse.copy_((lse * NATURAL).masked_fill(empty, -torch.inf))

    def _finish(self, layer: int) -> None:
        """A new token is the only one of its run: each row has one new key, its own."""
        tensors = self._tensors[self._shared.kinds[layer]]
        q, k, v = (one.unsqueeze(1) for one in (tensors.exact_q, tensors.k, tensors.v))
        o, lse = attend_visible(q, k, v, self._visible, self._shared.cache.shape(layer))
        o, lse = self._shared.join(layer, tensors.past, Partial(o.squeeze(1), lse.squeeze(1)))
        tensors.whole.o.copy_(o)
        tensors.whole.lse.copy_(lse)


class _Tensors:
    """What the graphs of a kind of layers read and write. Layers come one after the other and share it."""

    def __init__(self, rows: int, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
        self.q = torch.zeros(rows, kind.q_heads, kind.dim, dtype=dtype, device=device)
        self.exact_q = torch.zeros(rows, kind.q_heads, kind.dim, device=device)
        self.k = torch.zeros(rows, kind.kv_heads, kind.dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.past = Partial.empty(rows, kind.q_heads, kind.dim, device=device)
        self.whole = Partial.empty(rows, kind.q_heads, kind.dim, device=device)


class _Prefill:
    """Steps of runs of any length, launched kernel by kernel."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._planned: torch.cuda.Event | None = None
        kinds, library = dict.fromkeys(shared.kinds), shared.library
        self._paged = {
            kind: library.BatchPrefillWithPagedKVCacheWrapper(shared.workspace, "NHD", backend="fa2") for kind in kinds
        }
        self._ragged = {
            kind: library.BatchPrefillWithRaggedKVCacheWrapper(shared.workspace, "NHD", backend="fa2") for kind in kinds
        }
        self._rows: list[Tensor | None] = []
        """By group: the rows that see something of the past; None if none does."""

    def plan(self, tables: Sequence[Sequence[Integers]], starts: Integers, counts: Integers) -> None:
        """``tables``: by group the block table of each run, which has ``counts`` positions from ``starts`` on."""
        shared = self._shared
        if self._planned is not None:
            self._planned.synchronize()  # as in _Decode
        self._rows = [
            self._plan_past(group, tables[group], starts, counts) for group in range(len(shared.cache.groups))
        ]
        indptr = torch.from_numpy(_indptr(counts))
        for kind, wrapper in self._ragged.items():
            wrapper.plan(
                indptr,
                indptr,
                kind.q_heads,
                kind.kv_heads,
                kind.dim,
                causal=True,
                window_left=-1 if kind.window is None else kind.window - 1,
                **shared.options(kind),
            )
        self._planned = shared.mark()

    def _plan_past(self, group: int, tables: Sequence[Integers], starts: Integers, counts: Integers) -> Tensor | None:
        shared, window = self._shared, self._shared.cache.groups[group].window
        queries = np.where(starts > 0, counts if window is None else np.minimum(counts, window - 1), 0)
        runs = np.flatnonzero(queries)
        if not len(runs):
            return None
        rows = np.concatenate([np.arange(queries[run]) + counts[:run].sum() for run in runs])
        starts, queries = starts[runs], queries[runs]
        firsts = first_visible(starts, window)
        pages = find_pages([tables[run] for run in runs.tolist()], firsts, starts, block_tokens=shared.block_tokens)
        mask = None
        if window is not None:
            begins = firsts // shared.block_tokens * shared.block_tokens
            spans = [
                (
                    torch.arange(start, start + count, device=shared.device),
                    torch.arange(begin, start, device=shared.device),
                )
                for start, count, begin in zip(starts.tolist(), queries.tolist(), begins.tolist(), strict=True)
            ]
            mask = torch.cat([visible_keys(query, key, window).flatten() for query, key in spans])
        indices = shared.upload(pages.indices)
        for kind, wrapper in self._paged.items():
            if kind.group == group:
                wrapper.plan(
                    torch.from_numpy(_indptr(queries)),
                    torch.from_numpy(pages.indptr),
                    indices,
                    torch.from_numpy(pages.last_page_len),
                    kind.q_heads,
                    kind.kv_heads,
                    kind.dim,
                    shared.block_tokens,
                    causal=False,
                    custom_mask=mask,
                    **shared.options(kind),
                )
        return shared.upload(rows)

    def past(self, layer: int, q: Tensor) -> Partial:
        shared, kind = self._shared, self._shared.kinds[layer]
        out = Partial.empty(len(q), kind.q_heads, kind.dim, device=q.device)
        rows = self._rows[kind.group]
        if rows is not None:
            o, lse = self._paged[kind].run(q[rows].to(shared.dtype), shared.pages[layer], return_lse=True)
            out.o[rows], out.lse[rows] = o.float(), lse * NATURAL
        return out

    def finish(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        shared = self._shared
        o, lse = self._ragged[shared.kinds[layer]].run(q.to(shared.dtype), k, v, return_lse=True)
        return shared.join(layer, past, Partial(o.float(), lse * NATURAL))


@dataclass(frozen=True, slots=True)
class Target:
    """Where the rows of a step belong in a layer group: int64 [T], page and entry. ``rows``, int64, are those to be
    stored, the others lie in published blocks; None is all."""

    pages: Tensor
    entries: Tensor
    rows: Tensor | None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class FlashInferPlan:
    """``parts``: which rows who attends; ``targets``: by group. It owns its parts until it is dropped."""

    placement: Placement
    parts: tuple[tuple[_Decode | _Prefill, Tensor | slice], ...]
    targets: tuple[Target, ...]

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class FlashInferBackend:
    """Computes on the stream that is current where it is used; ``threads`` and ``cpus`` have no part in that.

    Plans that live at the same time each have their own buffers in FlashInfer, 8 MiB for each kind of layers, which
    are used again when the plan is dropped.
    """

    name = "flashinfer"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        """`ConfigError` names what FlashInfer cannot do: a type, a shape, a device, or that it is not installed."""
        require_supported(cache.layout)
        cuda = Cuda(cache.memory.device)
        self.cache = cache
        self._shared = _Shared(cache, cuda, _library())
        self._where = str(cache.memory.tensor.device)
        self._torch = TorchBackend(cache)
        """The same blocks in the same layout: all that is not attention."""
        self._idle_decodes: defaultdict[int, list[_Decode]] = defaultdict(list)
        """By number of rows."""
        self._idle_prefills: list[_Prefill] = []

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        self._torch.append(layer, rows, k, v)

    def export(self, sequence: int, layer: int, start: int, stop: int) -> Stored:
        return self._torch.export(sequence, layer, start, stop)

    def restore(self, sequence: int, layer: int, start: int, stored: Stored) -> None:
        self._torch.restore(sequence, layer, start, stored)

    def close(self) -> None:
        self._idle_decodes.clear()
        self._idle_prefills.clear()
        self._shared.pages.clear()
        self._torch.close()

    def plan(self, rows: Rows, *, store: bool = True) -> FlashInferPlan:
        if not store:
            raise UsageError("attention backend flashinfer: every row is stored here; use torch")
        placement = self.cache.place(rows)
        short, long = np.flatnonzero(placement.counts == 1), np.flatnonzero(placement.counts > 1)
        parts: list[tuple[_Decode | _Prefill, Tensor | slice]] = []
        for begin in range(0, len(short), DECODE_ROWS):
            runs = short[begin : begin + DECODE_ROWS]
            parts.append((self._decode(placement, runs), self._rows(placement, runs)))
        if len(long):
            parts.append((self._prefill(placement, long), self._rows(placement, long)))
        targets = [self._target(placement, group) for group in range(len(self.cache.groups))]
        plan = FlashInferPlan(placement, tuple(parts), tuple(targets))
        for part, _ in parts:
            idle: list[Any] = self._idle_decodes[part.rows] if isinstance(part, _Decode) else self._idle_prefills
            weakref.finalize(plan, idle.append, part)
        return plan

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        assert isinstance(plan, FlashInferPlan)
        check_query(layer, self.cache.shape(layer), plan.rows.tokens, q, self._where)
        self.cache.require_past(layer, plan.placement)
        return self._joined(plan, layer, lambda part, rows: part.past(layer, q[rows]))

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, FlashInferPlan)
        shape, tokens = self.cache.shape(layer), plan.rows.tokens
        check_query(layer, shape, tokens, q, self._where)
        check_key_value(layer, shape, tokens, k, v, self._where)
        check_past(layer, shape, tokens, past, self._where)
        self.cache.require_past(layer, plan.placement)
        k, v = self._store(layer, plan.targets[self.cache.group_of(layer)], k, v)
        self.cache.advance(layer, plan.placement)
        return self._joined(
            plan,
            layer,
            lambda part, rows: part.finish(layer, q[rows], k[rows], v[rows], Partial(past.o[rows], past.lse[rows])),
        )

    def _joined(
        self, plan: FlashInferPlan, layer: int, attend: Callable[[_Decode | _Prefill, Tensor | slice], Partial]
    ) -> Partial:
        """What the parts of a plan give for their rows."""
        if len(plan.parts) == 1:
            return attend(*plan.parts[0])
        shape = self.cache.shape(layer)
        out = Partial.empty(plan.rows.tokens, shape.q_heads, shape.v_dim, device=self._shared.device)
        for part, rows in plan.parts:
            out.o[rows], out.lse[rows] = attend(part, rows)
        return out

    def _store(self, layer: int, target: Target, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns k and v as they are stored now, which in published blocks is as before."""
        k, v = k.to(self._shared.dtype), v.to(self._shared.dtype)
        k_pages, v_pages = self._shared.pages[layer]
        where, rows = (target.pages, target.entries), target.rows
        if rows is None:
            k_pages[where], v_pages[where] = k, v
            return k, v
        own = (target.pages[rows], target.entries[rows])
        k_pages[own], v_pages[own] = k[rows], v[rows]
        return k_pages[where], v_pages[where]

    def _decode(self, placement: Placement, runs: Integers) -> _Decode:
        """A planned part for runs of one row each, among the idle ones if there is one that is large enough."""
        shared = self._shared
        rows = 1 << (len(runs) - 1).bit_length()
        unused = rows - len(runs)
        stops = np.append(placement.starts[runs], np.zeros(unused, dtype=np.int64))
        contexts, empty = [], []
        for number, group in enumerate(self.cache.groups):
            tables = placement.tables(number)
            firsts = first_visible(stops, group.window)
            padded = [tables[run] for run in runs.tolist()] + [_PAGE_0] * unused
            contexts.append(find_pages(padded, firsts, stops, block_tokens=shared.block_tokens))
            empty.append(firsts >= stops)
        needed = max(len(pages.indices) for pages in contexts)
        idle = self._idle_decodes[rows]
        part = next((part for part in idle if part.pages >= needed), None)
        if part is None:
            part = _Decode(shared, rows, max(2 * needed, PAGES_PER_ROW * rows))
        else:
            idle.remove(part)
        part.plan(contexts, empty)
        return part

    def _prefill(self, placement: Placement, runs: Integers) -> _Prefill:
        """A planned part for runs of any length."""
        tables = [placement.tables(group) for group in range(len(self.cache.groups))]
        part = self._idle_prefills.pop() if self._idle_prefills else _Prefill(self._shared)
        part.plan(
            [[own[run] for run in runs.tolist()] for own in tables], placement.starts[runs], placement.counts[runs]
        )
        return part

    def _rows(self, placement: Placement, runs: Integers) -> Tensor | slice:
        """The rows of some of the runs."""
        counts = placement.counts
        if len(runs) == len(counts):
            return slice(None)
        own = np.zeros(len(counts), dtype=np.bool_)
        own[runs] = True
        return self._shared.upload(np.flatnonzero(np.repeat(own, counts)))

    def _target(self, placement: Placement, group: int) -> Target:
        size = self._shared.block_tokens
        starts, counts = placement.starts, placement.counts
        firsts, lasts = starts // size, -(-(starts + counts) // size)
        blocks = [
            table[first:last]
            for table, first, last in zip(placement.tables(group), firsts.tolist(), lasts.tolist(), strict=True)
        ]
        positions = np.arange(counts.sum()) + np.repeat(starts - placement.row_starts, counts)
        # Among the blocks of all runs, those of a run come one after the other, its first block first.
        begins = np.cumsum(lasts - firsts) - lasts
        offsets = np.concatenate(blocks)[np.repeat(begins, counts) + positions // size]
        stored = positions >= np.repeat(placement.frozen, counts)
        return Target(
            self._shared.upload(offsets // UNIT),
            self._shared.upload(positions % size),
            None if stored.all() else self._shared.upload(np.flatnonzero(stored)),
        )


def require_supported(layout: KVLayout) -> None:
    """`ConfigError` naming the first thing in ``layout`` that FlashInfer cannot do."""
    if layout.dtype not in TYPES:
        scales = " with a scale for each token and head" if layout.dtype in SCALED else ""
        raise _unsupported(f"keys and values of type {layout.dtype}{scales}", " or ".join(TYPES))
    for layer, shape in enumerate(layout.layers):
        if shape.qk_dim != shape.v_dim:
            raise _unsupported(f"layer {layer}: qk_dim {shape.qk_dim} with v_dim {shape.v_dim}", "equal ones")
        if shape.qk_dim not in HEAD_DIMS:
            raise _unsupported(f"layer {layer}: head size {shape.qk_dim}", f"one of {', '.join(map(str, HEAD_DIMS))}")
        if shape.scale <= 0:
            raise _unsupported(f"layer {layer}: scale {shape.scale}", "a number > 0")


def _unsupported(found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"attention backend flashinfer cannot do {found}; it needs {expected}; use the backend torch for this model"
    )


def _library() -> Any:
    try:
        return import_module("flashinfer")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"attention backend flashinfer is not available here ({error}); install lamina[flashinfer], or use the "
            f"backend torch"
        ) from error


def _kind(cache: KVCache, layer: int) -> Kind:
    shape = cache.shape(layer)
    return Kind(
        cache.group_of(layer), shape.q_heads, shape.kv_heads, shape.v_dim, shape.window, shape.scale, shape.softcap
    )


def _indptr(counts: Integers) -> NDArray[np.int32]:
    """Where each of consecutive runs of so many begins, and where the last ends."""
    indptr = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr
