"""CUDA devices use this backend: FlashInfer's FA2 kernels read the blocks of the cache where they are.

q is rounded to the type stored, and o is rounded to it before partial results are merged. FlashInfer's tanh for soft
caps is approximate: scores are off by up to ``softcap / 2048``. Its kernels are compiled when they are first used,
which takes the CUDA compiler and some minutes, once per machine.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from lamina.attention.backend import Plan, check_key_value, check_past, check_query
from lamina.attention.cache import KVCache
from lamina.attention.flashinfer.cuda import Cuda
from lamina.attention.flashinfer.pages import PAGE_0, UNIT, find_pages, first_visible
from lamina.attention.flashinfer.parts import DecodePart, PrefillPart, SharedState
from lamina.attention.layout import SCALED, KVLayout, LayerShape
from lamina.attention.partial import Partial
from lamina.attention.placement import BlockPlacement, Integers
from lamina.attention.rows import Rows
from lamina.attention.torch_backend import TorchBackend
from lamina.errors import ConfigError, UsageError, install_extra

TYPES = ("bfloat16", "float16")

HEAD_DIMS = (64, 128, 256)
"""FlashInfer does not check head sizes: it computes others wrongly, or reads beyond them."""

DECODE_ROWS = 512
"""A decode part has at most this many rows; a step with more has several parts."""

PAGES_PER_ROW = 1024
"""A decode part has room for at least this many page numbers per row, and for more when contexts outgrow it."""


@dataclass(frozen=True, slots=True)
class PageTarget:
    """The rows of a step belong to these pages and entries of a layer group, both int64 [T].

    ``rows``, int64, are stored; the others are in published blocks. None means all.
    """

    pages: Tensor
    entries: Tensor
    rows: Tensor | None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class FlashInferPlan:
    """A plan has the parts of a step, each with its rows, and a target for each group. It owns its parts alone."""

    placement: BlockPlacement
    parts: tuple[tuple[DecodePart | PrefillPart, Tensor | slice], ...]
    targets: tuple[PageTarget, ...]

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class FlashInferBackend:
    """This backend computes on the CUDA stream that is current for the caller, and ignores ``threads`` and ``cpus``.

    Each plan that lives has its own buffers in FlashInfer, 8 MiB for each kind of layers. Another plan uses them again
    when the plan is dropped.
    """

    name = "flashinfer"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        """Raise `ConfigError` if FlashInfer does not support a type, a shape or the device, or is not installed."""
        require_supported(cache.layout)
        cuda = Cuda(cache.memory.device)
        self.cache = cache
        self._shared = SharedState(cache, cuda, _library())
        self._where = str(cache.memory.tensor.device)
        self._torch = TorchBackend(cache)
        """The reference stores in the same blocks, in the same layout."""
        self._idle_decodes: defaultdict[int, list[DecodePart]] = defaultdict(list)
        """The keys are numbers of rows."""
        self._idle_prefills: list[PrefillPart] = []

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of a block in one layer, which are those of the reference."""
        return TorchBackend.layer_bytes(shape, dtype, block_tokens)

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        self._torch.append(layer, rows, k, v)

    def read(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        self._torch.read(layer, blocks, plain)

    def write(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        self._torch.write(layer, blocks, plain)

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
        parts: list[tuple[DecodePart | PrefillPart, Tensor | slice]] = []
        for begin in range(0, len(short), DECODE_ROWS):
            runs = short[begin : begin + DECODE_ROWS]
            parts.append((self._decode(placement, runs), self._rows(placement, runs)))
        if len(long):
            parts.append((self._prefill(placement, long), self._rows(placement, long)))
        targets = [self._target(placement, group) for group in range(len(self.cache.groups))]
        plan = FlashInferPlan(placement, tuple(parts), tuple(targets))
        for part, _ in parts:
            idle: list[Any] = self._idle_decodes[part.rows] if isinstance(part, DecodePart) else self._idle_prefills
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
        self, plan: FlashInferPlan, layer: int, attend: Callable[[DecodePart | PrefillPart, Tensor | slice], Partial]
    ) -> Partial:
        """Join what the parts of a plan return for their rows."""
        if len(plan.parts) == 1:
            return attend(*plan.parts[0])
        shape = self.cache.shape(layer)
        out = Partial.empty(plan.rows.tokens, shape.q_heads, shape.v_dim, device=self._shared.device)
        for part, rows in plan.parts:
            out.o[rows], out.lse[rows] = attend(part, rows)
        return out

    def _store(self, layer: int, target: PageTarget, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, and return them as they are stored now: published blocks keep their content."""
        k, v = k.to(self._shared.dtype), v.to(self._shared.dtype)
        k_pages, v_pages = self._shared.pages[layer]
        where, rows = (target.pages, target.entries), target.rows
        if rows is None:
            k_pages[where], v_pages[where] = k, v
            return k, v
        own = (target.pages[rows], target.entries[rows])
        k_pages[own], v_pages[own] = k[rows], v[rows]
        return k_pages[where], v_pages[where]

    def _decode(self, placement: BlockPlacement, runs: Integers) -> DecodePart:
        """Plan a part for runs of one row each: an idle one if one is large enough, or else a new one."""
        shared = self._shared
        rows = 1 << (len(runs) - 1).bit_length()
        unused = rows - len(runs)
        stops = np.append(placement.starts[runs], np.zeros(unused, dtype=np.int64))
        contexts, empty = [], []
        for number, group in enumerate(self.cache.groups):
            tables = placement.tables(number)
            firsts = first_visible(stops, group.window)
            padded = [tables[run] for run in runs.tolist()] + [PAGE_0] * unused
            contexts.append(find_pages(padded, firsts, stops, block_tokens=shared.block_tokens))
            empty.append(firsts >= stops)
        needed = max(len(pages.indices) for pages in contexts)
        idle = self._idle_decodes[rows]
        part = next((part for part in idle if part.pages >= needed), None)
        if part is None:
            part = DecodePart(shared, rows, max(2 * needed, PAGES_PER_ROW * rows))
        else:
            idle.remove(part)
        part.plan(contexts, empty)
        return part

    def _prefill(self, placement: BlockPlacement, runs: Integers) -> PrefillPart:
        """Plan a part for runs of any length."""
        tables = [placement.tables(group) for group in range(len(self.cache.groups))]
        part = self._idle_prefills.pop() if self._idle_prefills else PrefillPart(self._shared)
        part.plan(
            [[own[run] for run in runs.tolist()] for own in tables], placement.starts[runs], placement.counts[runs]
        )
        return part

    def _rows(self, placement: BlockPlacement, runs: Integers) -> Tensor | slice:
        """Return the rows of some of the runs."""
        counts = placement.counts
        if len(runs) == len(counts):
            return slice(None)
        own = np.zeros(len(counts), dtype=np.bool_)
        own[runs] = True
        return self._shared.upload(np.flatnonzero(np.repeat(own, counts)))

    def _target(self, placement: BlockPlacement, group: int) -> PageTarget:
        size = self._shared.block_tokens
        starts, counts = placement.starts, placement.counts
        firsts, lasts = starts // size, -(-(starts + counts) // size)
        blocks = [
            table[first:last]
            for table, first, last in zip(placement.tables(group), firsts.tolist(), lasts.tolist(), strict=True)
        ]
        positions = np.arange(counts.sum()) + np.repeat(starts - placement.row_starts, counts)
        # The blocks of all runs follow one another, and those of a run are in order.
        begins = np.cumsum(lasts - firsts) - lasts
        offsets = np.concatenate(blocks)[np.repeat(begins, counts) + positions // size]
        stored = positions >= np.repeat(placement.frozen, counts)
        return PageTarget(
            self._shared.upload(offsets // UNIT),
            self._shared.upload(positions % size),
            None if stored.all() else self._shared.upload(np.flatnonzero(stored)),
        )


def require_supported(layout: KVLayout) -> None:
    """Raise `ConfigError` for the first thing in ``layout`` that FlashInfer does not support."""
    if layout.dtype not in TYPES:
        scales = " with a scale for each token and head" if layout.dtype in SCALED else ""
        raise _unsupported(f"keys and values of type {layout.dtype}{scales}", " or ".join(TYPES))
    for layer, shape in enumerate(layout.layers):
        if shape.qk_dim != shape.v_dim:
            raise _unsupported(f"layer {layer}: qk_dim {shape.qk_dim} with v_dim {shape.v_dim}", "equal ones")
        if shape.qk_dim not in HEAD_DIMS:
            raise _unsupported(f"layer {layer}: head size {shape.qk_dim}", f"one of {', '.join(map(str, HEAD_DIMS))}")
        if shape.chunk is not None or shape.slopes is not None:
            raise _unsupported(f"layer {layer}: attention in chunks or with slopes", "layers without them")
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
            f"attention backend flashinfer is not available here ({error}); use the backend torch, or "
            f"{install_extra('flashinfer')}"
        ) from error
