"""Blocks of a tenant move from one memory node to another: what the two say to each other, and which bytes follow.

A transfer moves the same number of blocks of every layer, in their plain form (see
`lamina.attention.layout.plain_parts`): first those of layer 0, then those of layer 1, and so on. A *piece* is one block
of one layer; pieces are counted through the whole transfer. They travel in chunks, in their order, on the bulk lane.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from lamina.attention import LayerShape
from lamina.attention.layout import plain_parts
from lamina.transport import RemoteRegion
from lamina.wire.codec import Message
from lamina.wire.geometry import aligned
from lamina.wire.tenants import Attach, Refused, Token

MOVE_BYTES = 512 << 10
"""The bytes of blocks in one chunk, unless a block of one layer has more: as much as a decode step may have to wait
for."""
MOVE_CHUNKS = 8
"""The buffers between two memory nodes, and so the number of chunks that may be on their way at once."""
MOVE_HEADER = 64
"""The bytes before the blocks of a chunk, which align them."""

_CHUNK = struct.Struct("<QII")
_DIGEST_BYTES = 16


class Join(Message):
    """A memory node is going to send blocks of a tenant. Joined or Refused answers it."""

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    token: Token
    layout: Annotated[bytes, Meta(min_length=_DIGEST_BYTES, max_length=_DIGEST_BYTES)]
    """The digest of what both nodes have to have in common: see `layout_digest`."""
    credits: RemoteRegion
    """The region to which credits are written; they consist of tags alone."""

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.credits))


class Joined(Message):
    """Answers Join: where to write."""

    chunks: RemoteRegion

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.chunks))


FromReceiver = Joined | Refused


def layout_digest(attach: Attach) -> bytes:
    """Return a digest of what a tenant's blocks hold: equal on two nodes whose blocks mean the same."""
    told = (attach.model, attach.kv_dtype, attach.block_tokens, attach.layers, attach.first_heads)
    return blake2b(msgspec.msgpack.encode(told), digest_size=_DIGEST_BYTES).digest()


class MoveHeader(NamedTuple):
    """Says what a chunk brings: ``pieces`` pieces of a transfer, from number ``first`` on."""

    transfer: int
    first: int
    pieces: int

    def pack(self) -> bytes:
        return _CHUNK.pack(*self)

    @classmethod
    def unpack(cls, buffer: memoryview) -> MoveHeader:
        return cls(*_CHUNK.unpack_from(buffer))


class BlockSpan(NamedTuple):
    """Some blocks of one layer in a chunk: numbers ``start``..``stop``-1 of the transfer, from byte ``offset`` on."""

    layer: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class MoveGeometry:
    """Holds the sizes of what moves. Both ends compute it from the same facts."""

    layers: tuple[LayerShape, ...]
    kv_dtype: str
    block_tokens: int

    @classmethod
    def of(cls, attach: Attach) -> MoveGeometry:
        return cls(tuple(attach.layers), attach.kv_dtype, attach.block_tokens)

    @cached_property
    def piece_bytes(self) -> tuple[int, ...]:
        """Return the bytes of a piece of each layer."""
        return tuple(sum(plain_parts(shape, self.kv_dtype, self.block_tokens)) for shape in self.layers)

    @cached_property
    def chunk_bytes(self) -> int:
        """Return the bytes of one buffer."""
        return MOVE_HEADER + aligned(max(MOVE_BYTES, *self.piece_bytes))

    def pieces(self, blocks: int) -> int:
        """Return the number of pieces of a transfer of this many blocks."""
        return blocks * len(self.layers)

    def spans(self, blocks: int, first: int) -> Iterator[BlockSpan]:
        """Yield what a chunk holds that begins with piece ``first`` of a transfer of ``blocks`` blocks: as much as fits
        into it."""
        offset, total = MOVE_HEADER, self.pieces(blocks)
        while first < total:
            layer, start = divmod(first, blocks)
            stop = min(blocks, start + (self.chunk_bytes - offset) // self.piece_bytes[layer])
            if stop == start:
                return
            yield BlockSpan(layer, start, stop, offset)
            offset += (stop - start) * self.piece_bytes[layer]
            first += stop - start
