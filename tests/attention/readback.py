"""Keys and values are read out of a cache's memory here, by its block tables and the documented layout of its blocks.

No code of a backend takes part: what it stored is seen as any other program would see it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.attention import Backend, Rows, Run
from lamina.attention.layout import ALIGNMENT, ITEM_BYTES, SCALE_BYTES, SCALED, LayerShape
from lamina.attention.placement import Integers

PAGE, LINE = 16, 32
"""The tokens of a page and the numbers of a line, as in native/kernel.h."""

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Stored(NamedTuple):
    """k: [n, Hkv, Dk] and v: [n, Hkv, Dv] of the type stored; their scales, if it has any, are float32 [n, Hkv]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def read(backend: Backend, sequence: int, layer: int, start: int, stop: int) -> Stored:
    """Read the positions start..stop-1 of a sequence, which all have to be there. The result is on the CPU."""
    cache = backend.cache
    assert 0 <= start < stop <= cache.filled(sequence, layer), "these positions were never stored"
    at_rest = cache.place(Rows((Run(sequence, 0, 1),)), attend=False, store=False)
    positions = np.arange(start, stop)
    blocks = at_rest.tables(cache.group_of(layer))[0][positions // cache.layout.block_tokens]
    assert (blocks >= 0).all(), "the blocks of these positions were freed"
    find = _native if backend.name == "native" else _reference
    entries, dtype = positions % cache.layout.block_tokens, cache.layout.dtype
    offsets = find(cache.shape(layer), dtype, cache.layout.block_tokens, entries)
    base, memory = blocks + cache.layer_offset(layer), cache.memory.tensor.cpu()
    types = [getattr(torch, dtype)] * 2 + [torch.float32] * 2
    return Stored(*(_gather(memory, base, own, of) for own, of in zip(offsets, types, strict=False)))


def _gather(memory: Tensor, base: Integers, offsets: Integers, dtype: torch.dtype) -> Tensor:
    """Gather the numbers at ``offsets`` bytes, [n, ...], behind those of ``base``, [n]."""
    item = dtype.itemsize
    at = base.reshape(-1, *[1] * (offsets.ndim - 1)) + offsets
    assert not (at % item).any()
    return memory[: len(memory) // item * item].view(WHOLE[item])[torch.from_numpy(at // item)].view(dtype)


def _reference(shape: LayerShape, dtype: str, block_tokens: int, entries: Integers) -> list[Integers]:
    """Find k, v and scales as torch_backend.py says: parts one after the other, each of whole cache lines."""
    heads, item = shape.kv_heads, ITEM_BYTES[dtype]
    rows = [(heads, shape.qk_dim, item), (heads, shape.v_dim, item)]
    rows += [(heads, 1, SCALE_BYTES)] * 2 if dtype in SCALED else []
    found, begin = [], 0
    for count, width, size in rows:
        numbers = np.arange(count * width).reshape(count, width)
        own = begin + (entries[:, None, None] * count * width + numbers) * size
        found.append(own if len(found) < 2 else own[..., 0])
        begin += -(-count * width * size * block_tokens // ALIGNMENT) * ALIGNMENT
    return found


def _native(shape: LayerShape, dtype: str, block_tokens: int, entries: Integers) -> list[Integers]:
    """Find k, v and scales as native/kernel.h says: head after head, each with pages of k, of v, and its scales."""
    item, pages = ITEM_BYTES[dtype], block_tokens // PAGE
    k_page, v_page = (PAGE * -(-dim // 16) * 16 * item for dim in (shape.qk_dim, shape.v_dim))
    scales = 2 * SCALE_BYTES * block_tokens if dtype in SCALED else 0
    head = np.arange(shape.kv_heads)[:, None] * (pages * (k_page + v_page) + scales)
    page, token = entries[:, None, None] // PAGE, entries[:, None, None] % PAGE

    def within(line: Integers, place: Integers, which: Integers) -> Integers:
        """Find number ``place`` of the first or second half of a line; some types alternate the halves."""
        alternate = dtype in ("bfloat16", "float8_e4m3fn", "int8")
        return (line * LINE + (2 * place + which if alternate else PAGE * which + place)) * item

    d = np.arange(shape.qk_dim)
    k = head + page * k_page + within(d // 2, token, d % 2)
    d = np.arange(shape.v_dim)
    v = head + pages * k_page + page * v_page + within(d // 16 * (PAGE // 2) + token // 2, d % 16, token % 2)
    if not scales:
        return [k, v]
    k_scales = head[:, 0] + pages * (k_page + v_page) + SCALE_BYTES * entries[:, None]
    return [k, v, k_scales, k_scales + SCALE_BYTES * block_tokens]
