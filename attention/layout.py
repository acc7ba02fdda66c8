"""A layout says what a KV cache holds: the attention of every layer, the type stored and the size of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lamina.errors import ConfigError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
"""A cache can store these types, with this many bytes per number."""

SCALED = frozenset({"float8_e4m3fn", "int8"})
"""These types have one float32 scale per token and KV head, for k and for v: a value is number times scale."""

SCALE_BYTES = 4

ALIGNMENT = 64
"""Extents, blocks and the parts of blocks begin at multiples of this many bytes, a cache line."""

MAX_SIZE = 1 << 16
"""A layer has at most this many heads, a head this many numbers and a block this many tokens: far more than any model
needs, and few enough that kernels may multiply two of them."""

MIN_SOFTCAP = 1e-6
"""A smaller soft cap would make all scores equal, and ``score / softcap`` would overflow float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """A shape describes the attention of one layer over one shard.

    A score is ``scale * q.k``, then, with ``softcap``, ``softcap * tanh(score / softcap)``. With ``window``, a
    token attends to itself and the ``window - 1`` tokens before it (``key position > query position - window``,
    as in transformers). With ``chunk``, it attends to no position before the last multiple of ``chunk``. Query head
    ``h`` reads KV head ``h // (q_heads // kv_heads)``.
    ``sinks`` are learned scores, one for each query head, that join the softmax's denominator, neither scaled nor
    capped, and have no value. They count once for each row, however many shards it attends to.
    ``slopes``, one for each query head, are those of ALiBi: ``slope * (key position - query position)`` joins a score.
    """

    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "qk_dim", "v_dim"):
            _require_positive_int(f"LayerShape.{name}", getattr(self, name), MAX_SIZE)
        for name in ("window", "chunk"):
            if getattr(self, name) is not None:
                _require_positive_int(f"LayerShape.{name}", getattr(self, name))
        if self.q_heads % self.kv_heads:
            raise ConfigError(
                f"LayerShape.kv_heads: expected a divisor of q_heads = {self.q_heads}, got {self.kv_heads}"
            )
        if not math.isfinite(self.scale):
            raise ConfigError(f"LayerShape.scale: expected a finite number, got {self.scale}")
        if self.softcap is not None and not MIN_SOFTCAP <= self.softcap < math.inf:
            raise ConfigError(f"LayerShape.softcap: expected a finite number >= {MIN_SOFTCAP}, got {self.softcap}")
        for name in ("sinks", "slopes"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.q_heads:
                raise ConfigError(
                    f"LayerShape.{name}: expected one number for each of {self.q_heads} query heads, got {numbers}"
                )
            if not all(math.isfinite(number) for number in numbers or ()):
                raise ConfigError(f"LayerShape.{name}: expected finite numbers, got {numbers}")

    @property
    def knows_positions(self) -> bool:
        """Say whether the attention depends on the positions themselves, and not only on their order.

        Then a cache has to number the positions of a sequence as the model does.
        """
        return (self.window, self.chunk, self.slopes) != (None, None, None)

    def first_visible(self, position: int) -> int:
        """Return the first position that a query at ``position`` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position - position % self.chunk)

    def of_heads(self, kv: range, q: range) -> LayerShape:
        """Return the attention of these heads alone."""
        return replace(
            self,
            kv_heads=len(kv),
            q_heads=len(q),
            sinks=self.sinks and self.sinks[q.start : q.stop],
            slopes=self.slopes and self.slopes[q.start : q.stop],
        )


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of a group share block tables, because their windows, chunks and KV shapes are equal."""

    layers: tuple[int, ...]
    window: int | None
    chunk: int | None
    kv_heads: int
    qk_dim: int
    v_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """A tenant's cache holds the ``layers`` of its model in order, stored as ``dtype``."""

    layers: tuple[LayerShape, ...]
    dtype: str
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("KVLayout.layers: expected at least one layer, got none")
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"KVLayout.dtype: expected one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")
        _require_positive_int("KVLayout.block_tokens", self.block_tokens, MAX_SIZE)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers form these groups, by window, chunk and KV shape, in order of first appearance."""
        found: dict[tuple[int | None, int | None, int, int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            found.setdefault((layer.window, layer.chunk, layer.kv_heads, layer.qk_dim, layer.v_dim), []).append(index)
        return tuple(LayerGroup(tuple(layers), *alike) for alike, layers in found.items())

    @property
    def bytes_per_token(self) -> int:
        """The keys and values of one position take this many bytes in all layers, with their scales."""
        scales = 2 * SCALE_BYTES if self.dtype in SCALED else 0
        return sum(
            layer.kv_heads * ((layer.qk_dim + layer.v_dim) * ITEM_BYTES[self.dtype] + scales) for layer in self.layers
        )


def plain_parts(shape: LayerShape, dtype: str, block_tokens: int) -> list[int]:
    """Return the bytes of each part of a block of one layer in its plain form.

    In this form blocks move from one cache to another, whatever backends these have; it is also that in which the
    reference backend stores them. Its parts are k [block_tokens, Hkv, Dk], v [block_tokens, Hkv, Dv] and, where the
    type has scales, those of k and those of v, float32 [block_tokens, Hkv]. Each is padded to whole cache lines.
    """
    rows = [shape.kv_heads * dim * ITEM_BYTES[dtype] for dim in (shape.qk_dim, shape.v_dim)]
    if dtype in SCALED:
        rows += [shape.kv_heads * SCALE_BYTES] * 2
    return [-(-row * block_tokens // ALIGNMENT) * ALIGNMENT for row in rows]


def window_blocks(window: int, ahead: int, block_tokens: int) -> int:
    """Return how many blocks a window and ``ahead`` positions beyond it can touch at once, at any offset."""
    return -(-(window - 1 + ahead) // block_tokens) + 1


def _require_positive_int(name: str, value: object, most: int | None = None) -> None:
    if not isinstance(value, int) or value < 1 or (most is not None and value > most):
        allowed = ">= 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{name}: expected an integer {allowed}, got {value!r}")
