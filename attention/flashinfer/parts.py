"""A step has two kinds of parts: a `DecodePart` for runs of one row each, and a `PrefillPart` for longer runs.

Both attend to the past over pages, and to the new tokens apart. FlashInfer puts the last query at the last key, but the
past ends just before the first query. For one query that makes a window of W tokens one of W - 1 keys,
``window_left = W - 2``. For more queries the difference depends on how many there are, which one plan for several runs
cannot express, so they bring a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.attention.cache import KVCache
from lamina.attention.dense import attend_visible, visible_keys
from lamina.attention.flashinfer.cuda import Cuda
from lamina.attention.flashinfer.pages import PageTables, find_pages, first_visible, page_views
from lamina.attention.partial import Partial, merge
from lamina.attention.placement import Integers

WORKSPACE_BYTES = 384 << 20
"""All plans share this much scratch for contexts that are split over processors. A decode part of B rows takes up to
``Hkv * 2 B * 16 * (D + 1) * 4`` bytes where Hq <= 16 Hkv, and up to 4 times that beyond: 47 or 11 heads of 128."""

NATURAL = math.log(2)
"""FlashInfer's logarithms have the base 2."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of one kind share a plan of FlashInfer: they are of one group and equal in the arguments of the plan."""

    group: int
    q_heads: int
    kv_heads: int
    dim: int
    window: int | None
    scale: float
    softcap: float | None


class SharedState:
    """All plans of a backend share this state."""

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

    def options(self, kind: LayerKind) -> dict[str, Any]:
        """Return the arguments that every plan of FlashInfer takes."""
        return {
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def join(self, layer: int, past: Partial, new: Partial) -> Partial:
        """Merge everything to which rows attend: the past, the new tokens and the sinks of the layer."""
        sinks = self.sinks[layer]
        if sinks is None:
            return merge(past, new)
        return merge(past, new, Partial(torch.zeros_like(new.o), sinks.expand_as(new.lse)))


class DecodePart:
    """A decode part has up to ``rows`` runs of one row each, whose contexts take up to ``pages`` pages in each group.

    All tensors of a step stay where they are, so that its kernels are captured once and replayed. Rows that a step does
    not need read page 0, and their output is dropped.
    """

    def __init__(self, shared: SharedState, rows: int, pages: int) -> None:
        self.rows = rows
        self.pages = pages
        self._shared = shared
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}
        self._planned: torch.cuda.Event | None = None
        device = shared.device
        self._empty = [torch.ones(rows, 1, dtype=torch.bool, device=device) for _ in shared.cache.groups]
        """These tensors, bool [rows, 1], say for each group which rows have no past."""
        self._visible = torch.ones(rows, 1, 1, dtype=torch.bool, device=device)
        self._wrappers = {
            kind: shared.library.BatchDecodeWithPagedKVCacheWrapper(
                shared.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,  # the same kernel for every ratio of heads, and for longer runs
                paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=device),
                paged_kv_indices_buffer=torch.zeros(pages, dtype=torch.int32, device=device),
                paged_kv_last_page_len_buffer=torch.zeros(rows, dtype=torch.int32, device=device),
                backend="fa2",
            )
            for kind in dict.fromkeys(shared.kinds)
        }
        self._tensors = {kind: GraphTensors(rows, kind, shared.dtype, device) for kind in self._wrappers}

    def plan(self, contexts: Sequence[PageTables], empty: Sequence[NDArray[np.bool_]]) -> None:
        """Plan a step from the pages that each row reads, and the rows that read nothing, both for each group."""
        shared = self._shared
        if self._planned is not None:
            self._planned.synchronize()  # the last plan may still be copied from the buffers that are written now
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
                # With a window of 1 no row has a past, so -1, which means no window, does no harm.
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
        """Attend to the new tokens: each row has one new key, its own, because its run has no other row."""
        tensors = self._tensors[self._shared.kinds[layer]]
        q, k, v = (one.unsqueeze(1) for one in (tensors.exact_q, tensors.k, tensors.v))
        o, lse = attend_visible(q, k, v, self._visible, self._shared.cache.shape(layer))
        o, lse = self._shared.join(layer, tensors.past, Partial(o.squeeze(1), lse.squeeze(1)))
        tensors.whole.o.copy_(o)
        tensors.whole.lse.copy_(lse)


class GraphTensors:
    """The graphs of one kind of layers read and write these tensors, which layers share, one after the other."""

    def __init__(self, rows: int, kind: LayerKind, dtype: torch.dtype, device: torch.device) -> None:
        self.q = torch.zeros(rows, kind.q_heads, kind.dim, dtype=dtype, device=device)
        self.exact_q = torch.zeros(rows, kind.q_heads, kind.dim, device=device)
        self.k = torch.zeros(rows, kind.kv_heads, kind.dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.past = Partial.empty(rows, kind.q_heads, kind.dim, device=device)
        self.whole = Partial.empty(rows, kind.q_heads, kind.dim, device=device)


class PrefillPart:
    """A prefill part has runs of any length and launches its kernels one by one."""

    def __init__(self, shared: SharedState) -> None:
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
        """These rows of each group see some of the past; None means that no row does."""

    def plan(self, tables: Sequence[Sequence[Integers]], starts: Integers, counts: Integers) -> None:
        """Plan runs of ``counts`` positions from ``starts`` on; ``tables`` has their block tables for each group."""
        shared = self._shared
        if self._planned is not None:
            self._planned.synchronize()  # as in DecodePart
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
            mask = torch.cat([visible_keys(query, key, window, None).flatten() for query, key in spans])
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


def _kind(cache: KVCache, layer: int) -> LayerKind:
    shape = cache.shape(layer)
    return LayerKind(
        cache.group_of(layer), shape.q_heads, shape.kv_heads, shape.v_dim, shape.window, shape.scale, shape.softcap
    )


def _indptr(counts: Integers) -> NDArray[np.int32]:
    """Return where each of consecutive runs with these counts begins, and where the last one ends."""
    indptr = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr
