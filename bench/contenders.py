"""Decode attention in several libraries, each with its own KV cache in the same memory.

All caches hold the same numbers, so that the results can be compared: position p of every sequence in every layer has
the key and value ``p % len(content.k)`` of a `Content`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamina.attention.backend import Backend, create_backend, require_backend
from lamina.attention.layout import ITEM_BYTES, SCALED, KVLayout, LayerShape
from lamina.attention.pool import ExtentPool, Memory
from lamina.attention.rows import Rows, Run
from lamina.errors import ConfigError

KV_HEADS = 8
BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One token for each of ``batch`` sequences of ``context`` tokens, in a layer of 8 KV heads."""

    kv_dtype: str
    batch: int
    context: int
    gqa: int
    head_dim: int

    @property
    def q_heads(self) -> int:
        return KV_HEADS * self.gqa

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def kv_bytes(self) -> int:
        """Bytes that attention in one layer must read: keys, values and scales of all contexts, without padding."""
        scales = 2 * 4 if self.kv_dtype in SCALED else 0
        return self.batch * self.context * KV_HEADS * (2 * self.head_dim * ITEM_BYTES[self.kv_dtype] + scales)

    @property
    def shape(self) -> LayerShape:
        dim = self.head_dim
        return LayerShape(q_heads=self.q_heads, kv_heads=KV_HEADS, qk_dim=dim, v_dim=dim, scale=self.scale)


@dataclass(frozen=True, slots=True)
class Content:
    """Queries q [batch, Hq, D], and k, v [n, 8, D], which repeat over each context; normally distributed bfloat16."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, point: Point, tokens: int = 256) -> Content:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16)

        return cls(
            q=normal(point.batch, point.q_heads, point.head_dim),
            k=normal(tokens, KV_HEADS, point.head_dim),
            v=normal(tokens, KV_HEADS, point.head_dim),
        )


class Contender(Protocol):
    """A library's attention over the filled caches of ``layers`` layers."""

    def attend(self, layer: int) -> Tensor:
        """Return the attention of all queries to their contexts in a layer, [batch, Hq, D]."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Library:
    """A library that can be measured, and how to create a contender from it."""

    make: Callable[[Point, int, Memory, int], Contender]
    """Fill caches for a point: arguments are the point, the number of layers, the memory and the number of threads."""
    nbytes: Callable[[Point, int], int]
    """How much memory that takes, from the point and the number of layers."""
    kv_dtypes: tuple[str, ...]
    unavailable: Callable[[], str | None] = lambda: None
    """The reason why the library cannot be used here, or None."""
    own: bool = False
    """Whether it is a backend of Lamina."""
    default: bool = True
    """Whether it is measured when the user names no library."""


class OwnBackend:
    """A contender that is one of Lamina's backends, with its blocks in random order."""

    def __init__(self, name: str, point: Point, layers: int, memory: Memory, threads: int) -> None:
        content = Content.of(point)
        self.backend = scattered(name, layout_of(point, layers), memory, threads)
        self._q = content.q
        for sequence in range(point.batch):
            self.backend.cache.reserve(sequence, point.context + 1)
        chunk = len(content.k)
        for start in range(0, point.context, chunk):
            count = min(chunk, point.context - start)
            rows = Rows(tuple(Run(sequence, start, count) for sequence in range(point.batch)))
            k, v = (x[:count].repeat(point.batch, 1, 1) for x in (content.k, content.v))
            for layer in range(layers):
                self.backend.append(layer, rows, k, v)
        self.rows = Rows(tuple(Run(sequence, point.context, 1) for sequence in range(point.batch)))
        self.plan = self.backend.plan(self.rows)

    def attend(self, layer: int) -> Tensor:
        return self.backend.past(self.plan, layer, self._q).o

    def close(self) -> None:
        self.backend.close()


def layout_of(point: Point, layers: int) -> KVLayout:
    return KVLayout(layers=(point.shape,) * layers, dtype=point.kv_dtype, block_tokens=BLOCK_TOKENS)


def scattered(name: str, layout: KVLayout, memory: Memory, threads: int) -> Backend:
    """Create a backend that allocates blocks in random order, as on a node that has served for a while."""
    pool = ExtentPool(memory, extent_bytes=_block_bytes(name, layout))
    extents = [pool.allocate() for _ in range(pool.available)]
    for i in np.random.default_rng(0).permutation(len(extents)):
        pool.free(extents[i])
    return create_backend(name, layout, pool, threads=threads)


def _block_bytes(name: str, layout: KVLayout) -> int:
    size = require_backend(name).layer_bytes(layout.layers[0], layout.dtype, layout.block_tokens)
    return size * len(layout.layers)


def _own(name: str, *, default: bool = True) -> Library:
    def nbytes(point: Point, layers: int) -> int:
        return point.batch * (point.context // BLOCK_TOKENS + 1) * _block_bytes(name, layout_of(point, layers))

    def unavailable() -> str | None:
        try:
            require_backend(name)
        except ConfigError as e:
            return str(e)
        return None

    def make(point: Point, layers: int, memory: Memory, threads: int) -> Contender:
        return OwnBackend(name, point, layers, memory, threads)

    return Library(make, nbytes, tuple(ITEM_BYTES), unavailable, own=True, default=default)


class _Dense:
    """Keys and values in the layout that torch prefers, [layers, B, 8, context, D]."""

    def __init__(self, point: Point, layers: int, memory: Memory, threads: int) -> None:
        content = Content.of(point)
        shape = (2, layers, point.batch, KV_HEADS, point.context, point.head_dim)
        self.keys, self.values = _carve(memory, shape, torch.bfloat16)
        for stored, once in ((self.keys, content.k), (self.values, content.v)):
            stored.copy_(_repeated(once, point.context).transpose(0, 1))
        self.point, self.q = point, content.q

    def close(self) -> None:
        del self.keys, self.values


class Sdpa(_Dense):
    """Torch's ``scaled_dot_product_attention``, which supports grouped heads."""

    def attend(self, layer: int) -> Tensor:
        q = self.q.unsqueeze(2)
        return scaled_dot_product_attention(q, self.keys[layer], self.values[layer], enable_gqa=True).squeeze(2)


class Matmul(_Dense):
    """Two batched matrix products, with the query heads of a KV head as the rows of one matrix."""

    def attend(self, layer: int) -> Tensor:
        q = self.q.view(self.point.batch, KV_HEADS, self.point.gqa, self.point.head_dim)
        scores = torch.matmul(q, self.keys[layer].transpose(2, 3)).mul_(self.point.scale)
        return torch.matmul(scores.softmax(-1), self.values[layer]).flatten(1, 2)


class Vllm:
    """The attention kernel of vLLM's CPU backend, over a paged cache with blocks in random order."""

    BLOCK: ClassVar = 128
    """The block size that vLLM uses on CPUs by default, in tokens."""

    def __init__(self, point: Point, layers: int, memory: Memory, threads: int) -> None:
        content = Content.of(point)
        self._ops = importlib.import_module("vllm._custom_ops")
        isa = importlib.import_module("vllm.v1.attention.backends.cpu_attn")._get_attn_isa(
            torch.bfloat16, self.BLOCK, point.head_dim, "auto"
        )
        per_sequence = -(-point.context // self.BLOCK)
        blocks = point.batch * per_sequence
        caches = _carve(memory, (layers, blocks, KV_HEADS, 2 * self.BLOCK, point.head_dim), torch.bfloat16)
        self._caches = [cache.chunk(2, dim=2) for cache in caches]
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(point.batch, per_sequence)
        k, v = (_repeated(x, point.context).contiguous() for x in (content.k, content.v))
        positions = torch.arange(point.context)
        for keys, values in self._caches:
            for blocks_of in table:
                slots = blocks_of[positions // self.BLOCK] * self.BLOCK + positions % self.BLOCK
                self._ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)
        starts = torch.arange(point.batch + 1, dtype=torch.int32)
        contexts = torch.full((point.batch,), point.context, dtype=torch.int32)
        metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=point.batch,
            num_heads=point.q_heads,
            num_kv_heads=KV_HEADS,
            head_dim=point.head_dim,
            seq_lens=contexts,
            dtype=torch.bfloat16,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        self._out = torch.empty_like(content.q)
        self._arguments: dict[str, Any] = {
            "query": content.q,
            "output": self._out,
            "query_start_loc": starts,
            "seq_lens": contexts,
            "scale": point.scale,
            "causal": True,
            "alibi_slopes": None,
            "sliding_window": -1,
            "block_table": table.to(torch.int32),
            "softcap": 0.0,
            "scheduler_metadata": metadata,
            "s_aux": None,
        }

    def attend(self, layer: int) -> Tensor:
        keys, values = self._caches[layer]
        self._ops.cpu_attention_with_kv_cache(key_cache=keys, value_cache=values, **self._arguments)
        return self._out

    def close(self) -> None:
        self._caches.clear()

    @staticmethod
    def unavailable() -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vllm is not installed"
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # vLLM would log to standard output
        try:
            importlib.import_module("vllm._custom_ops")
            importlib.import_module("vllm.v1.attention.backends.cpu_attn")
        except Exception as e:
            return f"vllm cannot be imported: {e}"
        if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
            return "this vllm is not built for CPUs"
        return None


class LlamaCpp:
    """ggml's FLASH_ATTN_EXT as llama.cpp calls it: float32 queries, float16 keys and values with tokens outermost."""

    def __init__(self, point: Point, layers: int, memory: Memory, threads: int) -> None:
        from lamina.bench.ggml import FlashAttention

        content = Content.of(point)
        shape = (2, layers, point.batch, point.context, KV_HEADS, point.head_dim)
        keys, values = _carve(memory, shape, torch.float16)
        for stored, once in ((keys, content.k), (values, content.v)):
            stored.copy_(_repeated(once, point.context))
        self._attention = FlashAttention(content.q.float(), keys, values, point.scale, threads)

    def attend(self, layer: int) -> Tensor:
        return self._attention.run(layer)

    def close(self) -> None:
        self._attention.close()

    @staticmethod
    def unavailable() -> str | None:
        from lamina.bench.ggml import unavailable

        return unavailable()


def _exact(point: Point, layers: int) -> int:
    return layers * point.kv_bytes


def _carve(memory: Memory, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the first bytes of the memory as a tensor."""
    return memory.tensor[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _repeated(once: Tensor, tokens: int) -> Tensor:
    """Repeat ``once`` [n, ...] along its first dimension until there are ``tokens``."""
    return once.repeat(-(-tokens // len(once)), 1, 1)[:tokens]


LIBRARIES = {
    "native": _own("native"),
    "sdpa": Library(Sdpa, _exact, ("bfloat16",)),
    "matmul": Library(Matmul, _exact, ("bfloat16",)),
    "vllm": Library(Vllm, _exact, ("bfloat16",), Vllm.unavailable),
    "llama.cpp": Library(LlamaCpp, _exact, ("float16",), LlamaCpp.unavailable),
    "torch": _own("torch", default=False),
}
"""The libraries by name. The reference backend, torch, is measured only if the user names it."""
