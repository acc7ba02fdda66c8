"""FlashInfer reads the blocks of the cache as its pages, which are counted and viewed here.

A block of the cache is one page. Pages are counted in cache lines, over a view of the whole memory that overlaps
itself: page ``i`` of a layer begins ``i * UNIT`` bytes after page 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.attention.cache import KVCache
from lamina.attention.layout import ALIGNMENT
from lamina.attention.placement import Integers
from lamina.attention.torch_backend import TorchBackend
from lamina.errors import ConfigError

UNIT = ALIGNMENT
"""Every block begins at a multiple of this many bytes."""

MAX_PAGES = 2**31
"""FlashInfer's page numbers are int32, so they reach 128 GiB."""

PAGE_0 = np.zeros(1, dtype=np.int64)
"""The block table of a row without positions has only page 0, which can always be read."""


class PageTables(NamedTuple):
    """The tables list the pages of B contexts in the form that FlashInfer takes: int32 on the host.

    Context ``i`` has the pages ``indices[indptr[i] : indptr[i + 1]]``, of which all but the last are full.
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
) -> PageTables:
    """Find the pages of the positions starts[i]..stops[i]-1 of a sequence with the block table tables[i].

    They begin with the page that holds starts[i]. A context without positions gets the first entry of page 0, which can
    always be read; the caller must drop the result.
    """
    empty = starts >= stops
    first, last = starts // block_tokens, -(-stops // block_tokens)
    blocks = [
        PAGE_0 if nothing else table[begin:end]
        for table, begin, end, nothing in zip(tables, first.tolist(), last.tolist(), empty.tolist(), strict=True)
    ]
    indptr = np.zeros(len(blocks) + 1, dtype=np.int32)
    np.cumsum(np.where(empty, 1, last - first), out=indptr[1:])
    return PageTables(
        indptr,
        (np.concatenate(blocks) // UNIT).astype(np.int32),
        np.where(empty, 1, (stops - 1) % block_tokens + 1).astype(np.int32),
    )


def page_views(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """Return views of k and v of a layer, over every page that the memory can hold: [pages, block_tokens, Hkv, D]."""
    shape, tokens, nbytes = cache.shape(layer), cache.layout.block_tokens, cache.memory.nbytes
    dtype: torch.dtype = getattr(torch, cache.layout.dtype)
    begin, size = cache.layer_offset(layer), TorchBackend.layer_bytes(shape, cache.layout.dtype, tokens)
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
    """Return the first position that a query at each of ``positions`` sees."""
    return np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
