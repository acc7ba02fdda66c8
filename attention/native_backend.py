"""CPU memory nodes use this backend: its native kernel reads the cache at the speed of the memory.

A block holds the KV heads of a layer one after the other, each in pages of 16 tokens, whose layout is described in
``native/kernel.h``. A block has therefore a multiple of 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamina.attention.backend import Plan, check_key_value, check_past, check_plain, check_query
from lamina.attention.cache import KVCache
from lamina.attention.layout import LayerShape
from lamina.attention.native.library import KernelLayer, KernelStep, Workers, load
from lamina.attention.partial import Partial
from lamina.attention.placement import Addresses, BlockPlacement, Integers
from lamina.attention.rows import Rows
from lamina.errors import ConfigError

PAGE_TOKENS, MAX_DIM, MAX_GROUP = 16, 512, 128
"""The kernel has these limits: PAGE, MAX_DIM and ROWS in ``native/kernel.h``."""

MAX_WINDOW = 2**31 - 1
"""A window of this length reaches every position, and so does a longer one."""

TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float8_e4m3fn": 3, "int8": 4}
"""These numbers are those of ``Type`` in ``native/kernel.h``."""

_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_library = load()  # on import, so that a missing library makes the backend unavailable


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A plan has a step for each layer group in the form that the kernel takes, and the arrays to which it points."""

    placement: BlockPlacement
    steps: list[KernelStep]
    addresses: Addresses

    @property
    def rows(self) -> Rows:
        return self.placement.rows


class NativeBackend:
    """This backend computes with ``threads`` threads of its own, the calling one among them.

    The result of a run has the same bits for any number of threads and any other runs in the step. ``LAMINA_ISA`` in
    the environment chooses the kernel.
    """

    name = "native"

    def __init__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        if cache.memory.device.type != "cpu":
            raise ConfigError(f"attention backend native: expected memory of the CPU, got {cache.memory.device}")
        self.cache = cache
        self.workers = Workers(threads, cpus)
        layout = cache.layout
        base = cache.memory.tensor.data_ptr()
        self._sinks = [None if shape.sinks is None else torch.tensor(shape.sinks) for shape in layout.layers]
        self._slopes = [None if shape.slopes is None else torch.tensor(shape.slopes) for shape in layout.layers]
        self._layers = {
            dtype: [
                _layer(
                    shape,
                    layout.dtype,
                    layout.block_tokens,
                    input_type=number,
                    memory=base + cache.layer_offset(layer),
                    sinks=None if sinks is None else sinks.data_ptr(),
                    slopes=None if slopes is None else slopes.data_ptr(),
                )
                for layer, (shape, sinks, slopes) in enumerate(
                    zip(layout.layers, self._sinks, self._slopes, strict=True)
                )
            ]
            for dtype, number in _INPUTS.items()
        }

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of a block in one layer; `ConfigError` for a shape that the kernel does not support."""
        if block_tokens % PAGE_TOKENS:
            raise ConfigError(
                f"attention backend native: expected blocks of a multiple of 16 tokens, got {block_tokens}"
            )
        for name in ("qk_dim", "v_dim"):
            if getattr(shape, name) > MAX_DIM:
                raise ConfigError(
                    f"attention backend native: expected {name} <= {MAX_DIM}, got {getattr(shape, name)}; use torch"
                )
        if shape.q_heads // shape.kv_heads > MAX_GROUP:
            raise ConfigError(
                f"attention backend native: expected at most {MAX_GROUP} query heads for each KV head, "
                f"got {shape.q_heads // shape.kv_heads}; use torch"
            )
        size: int = _library.lamina_layer_bytes(byref(_layer(shape, dtype, block_tokens)))
        return size

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        check_key_value(layer, self.cache.shape(layer), rows.tokens, k, v)
        plan = self._plan(self.cache.place(rows, attend=False))
        self.cache.require_past(layer, plan.placement)
        if k.dtype != v.dtype:
            k, v = k.float(), v.float()
        k, v = k.contiguous(), v.contiguous()
        step = plan.steps[self.cache.group_of(layer)]
        _library.lamina_append(
            self.workers.handle, byref(self._layer(layer, k)), byref(step), k.data_ptr(), v.data_ptr()
        )
        self.cache.advance(layer, plan.placement)

    def plan(self, rows: Rows, *, store: bool = True) -> NativePlan:
        return self._plan(self.cache.place(rows, store=store))

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        assert isinstance(plan, NativePlan)
        shape, tokens = self.cache.shape(layer), plan.rows.tokens
        check_query(layer, shape, tokens, q)
        self.cache.require_past(layer, plan.placement)
        q = q.contiguous()
        out = Partial(torch.empty(tokens, shape.q_heads, shape.v_dim), torch.empty(tokens, shape.q_heads))
        _library.lamina_past(
            self.workers.handle,
            byref(self._layer(layer, q)),
            byref(plan.steps[self.cache.group_of(layer)]),
            q.data_ptr(),
            out.o.data_ptr(),
            out.lse.data_ptr(),
        )
        return out

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, NativePlan)
        self.cache.require_space(plan.placement)
        shape, tokens = self.cache.shape(layer), plan.rows.tokens
        check_query(layer, shape, tokens, q)
        check_key_value(layer, shape, tokens, k, v)
        check_past(layer, shape, tokens, past)
        self.cache.require_past(layer, plan.placement)
        if k.dtype != v.dtype:
            k, v = k.float(), v.float()
        q, k, v, past = q.contiguous(), k.contiguous(), v.contiguous(), Partial(*[part.contiguous() for part in past])
        out = Partial(torch.empty(tokens, shape.q_heads, shape.v_dim), torch.empty(tokens, shape.q_heads))
        _library.lamina_finish(
            self.workers.handle,
            byref(self._layer(layer, q)),
            byref(self._layer(layer, k)),
            byref(plan.steps[self.cache.group_of(layer)]),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            past.o.data_ptr(),
            past.lse.data_ptr(),
            out.o.data_ptr(),
            out.lse.data_ptr(),
        )
        self.cache.advance(layer, plan.placement)
        return out

    def read(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        self._copy(_library.lamina_unpack, layer, blocks, plain)

    def write(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        self._copy(_library.lamina_pack, layer, blocks, plain)

    def close(self) -> None:
        self.workers.close()

    def _copy(self, copy: Callable[..., int], layer: int, blocks: Integers, plain: Tensor) -> None:
        check_plain(layer, self.cache, blocks, plain)
        own = byref(self._layers[torch.float32][layer])  # the type of inputs plays no part
        blocks = np.ascontiguousarray(blocks)
        copy(self.workers.handle, own, blocks.ctypes.data, len(blocks), plain.data_ptr(), plain.shape[1])

    def _plan(self, placement: BlockPlacement) -> NativePlan:
        addresses = np.ascontiguousarray(placement.addresses)
        arrays = (placement.starts, placement.counts, placement.row_starts, placement.frozen)
        pointers = [array.ctypes.data for array in arrays]
        runs = len(placement.starts)
        first, size = addresses.ctypes.data, addresses.itemsize * runs
        steps = [KernelStep(first + group * size, *pointers, runs) for group in range(len(addresses))]
        return NativePlan(placement, steps, addresses)

    def _layer(self, layer: int, given: Tensor) -> KernelLayer:
        return self._layers[given.dtype][layer]


def _layer(
    shape: LayerShape,
    dtype: str,
    block_tokens: int,
    *,
    input_type: int = 0,
    memory: int | None = None,
    sinks: int | None = None,
    slopes: int | None = None,
) -> KernelLayer:
    return KernelLayer(
        memory=memory,
        sinks=sinks,
        slopes=slopes,
        kv_heads=shape.kv_heads,
        group=shape.q_heads // shape.kv_heads,
        qk_dim=shape.qk_dim,
        v_dim=shape.v_dim,
        block_tokens=block_tokens,
        kv_type=TYPES[dtype],
        input_type=input_type,
        window=min(shape.window or 0, MAX_WINDOW),
        chunk=min(shape.chunk or 0, MAX_WINDOW),
        scale=shape.scale,
        softcap=shape.softcap or 0,
    )
