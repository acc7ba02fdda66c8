"""Say where things lie: which heads on which memory node, and which bytes at which offset of a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lamina.attention import LayerShape
from lamina.attention.layout import ITEM_BYTES
from lamina.errors import ConfigError
from lamina.wire.plan import CHUNK_HEADER, plan_bytes

CHUNK_TOKENS = 64
"""The number of tokens of one bulk chunk. A decode write may have to wait for one chunk on a shared wire."""
ANSWER_HEADER = 64
"""The bytes before the rows of an answer, which align them."""
PARTIAL_ITEM = 4
"""The bytes of a number of a partial, which is float32."""
CHUNKS = 8
"""The bulk buffers per memory node, and so the number of chunks that may be on their way at once."""


def split_heads(kv_heads: int, nodes: int) -> list[range]:
    """Divide KV heads over ``nodes`` memory nodes in contiguous ranges that differ by at most one head.

    For example, 8 heads on 3 nodes are 3 + 3 + 2.
    """
    base, more = divmod(kv_heads, nodes)
    ranges, first = [], 0
    for node in range(nodes):
        count = base + (node < more)
        ranges.append(range(first, first + count))
        first += count
    return ranges


@dataclass(frozen=True)
class HeadShard:
    """Says which heads one memory node has, layer by layer."""

    kv: tuple[range, ...]
    q: tuple[range, ...]
    layers: tuple[LayerShape, ...]
    """The attention of each layer, over these heads alone."""


def shard_by_heads(layers: Sequence[LayerShape], names: Sequence[str]) -> list[HeadShard]:
    """Divide the KV heads of every layer, with the query heads that read them, over the memory nodes ``names``."""
    fewest = min(layer.kv_heads for layer in layers)
    if fewest < len(names):
        raise ConfigError(
            f"the model has {fewest} KV head{'' if fewest == 1 else 's'} in a layer, which cannot be split over "
            f"{len(names)} memory nodes ({', '.join(names)}); use at most {fewest}, or "
            'pipeline.partition = "requests", which divides no heads'
        )
    shards = []
    for node in range(len(names)):
        kv = tuple(split_heads(layer.kv_heads, len(names))[node] for layer in layers)
        groups = [layer.q_heads // layer.kv_heads for layer in layers]
        q = tuple(range(r.start * g, r.stop * g) for r, g in zip(kv, groups, strict=True))
        own = tuple(layer.of_heads(k, h) for layer, k, h in zip(layers, kv, q, strict=True))
        shards.append(HeadShard(kv, q, own))
    return shards


def shard_whole(layers: Sequence[LayerShape]) -> HeadShard:
    """Give a memory node all heads of every layer."""
    kv = tuple(range(layer.kv_heads) for layer in layers)
    q = tuple(range(layer.q_heads) for layer in layers)
    return HeadShard(kv, q, tuple(layers))


@dataclass(frozen=True)
class Geometry:
    """Holds the sizes of the regions between a compute node and one memory node. Both ends compute it from the same
    facts.

    Every region but that of the chunks has one part per batch in flight, and that of the plans has two, for alternate
    steps, so that the plan of the next step never overwrites one that is being read. Within a part lie, packed, the
    values of a layer's rows: q [rows, Hq, Dk]; k [rows, Hkv, Dk] followed by v [rows, Hkv, Dv]; and of the answer,
    behind ANSWER_HEADER bytes of which the first 8 are the seconds that the step's attention has taken so far
    (float64), o [rows, Hq, Dv] of the rows that are whole, and from the next multiple of 64 bytes on o [rows, Hq, Dv]
    and lse [rows, Hq] of the others in float32. A chunk is its header, then k and v of up to CHUNK_TOKENS positions.
    """

    layers: tuple[LayerShape, ...]
    dtype: str
    slots: int
    max_rows: int

    @cached_property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]

    @cached_property
    def plan_bytes(self) -> int:
        return aligned(plan_bytes(self.max_rows, len(self.layers)))

    def plan_offset(self, slot: int, step: int) -> int:
        """Return where the plan of a step of a batch slot lies."""
        return (2 * slot + step % 2) * self.plan_bytes

    @cached_property
    def query_bytes(self) -> int:
        return aligned(self.max_rows * self.item * max(s.q_heads * s.qk_dim for s in self.layers))

    @cached_property
    def key_value_bytes(self) -> int:
        return aligned(self.max_rows * self._key_value_bytes_per_token)

    @cached_property
    def output_bytes(self) -> int:
        rows = self.max_rows * PARTIAL_ITEM * max(s.q_heads * (s.v_dim + 1) for s in self.layers)
        return ANSWER_HEADER + aligned(rows) + 64

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Return, by layer, the first layer whose attention has the same shape."""
        return tuple(self.layers.index(layer) for layer in self.layers)

    @cached_property
    def chunk_bytes(self) -> int:
        return aligned(CHUNK_HEADER + CHUNK_TOKENS * self._key_value_bytes_per_token)

    @cached_property
    def _key_value_bytes_per_token(self) -> int:
        return self.item * max(s.kv_heads * (s.qk_dim + s.v_dim) for s in self.layers)


def aligned(nbytes: int) -> int:
    """Round up, so that the parts of a region do not share cache lines."""
    return -(-nbytes // 64) * 64
