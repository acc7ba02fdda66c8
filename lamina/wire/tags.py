"""A 32-bit tag says what a write brought, and for which batch slot, layer and step."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from lamina.errors import ProtocolError
from lamina.runtime.spans import Place


class Kind(IntEnum):
    """Says what a finished write brought."""

    PLAN = 0
    QUERY = 1
    KEY_VALUE = 2
    OUTPUT = 3
    CHUNK = 4
    CREDIT = 5
    CARRY = 6


_KINDS = tuple(Kind)  # which is faster than to ask the class
_new = tuple.__new__  # which is faster than a named tuple's own constructor


class Tag(NamedTuple):
    """Holds a tag that has arrived, unpacked."""

    kind: Kind
    slot: int
    layer: int
    step: int

    @classmethod
    def unpack(cls, tag: int) -> Tag:
        """Unpack a tag; raise ProtocolError for a kind that does not exist."""
        try:
            kind = _KINDS[tag >> 29]
        except IndexError as e:
            raise ProtocolError(f"tag {tag:#010x} has the unknown kind {tag >> 29}") from e
        return _new(cls, (kind, tag >> 24 & 31, tag >> 14 & 1023, tag & STEP_MASK))


def pack(kind: Kind, slot: int, layer: int, step: int) -> int:
    """Pack a tag into 32 bits: kind (3 bits), slot (5), layer (10), step (14, the low bits).

    For CHUNK and CREDIT, ``step`` is the number of the bulk buffer.
    """
    return kind << 29 | slot << 24 | layer << 14 | step & STEP_MASK


def place_of(tag: int, peer: str) -> Place:
    """Return what a trace says of a packed tag that was written to ``peer`` or by it."""
    return Place(tag >> 24 & 31, tag >> 14 & 1023, tag & STEP_MASK, peer)


def slot_of(tag: int) -> int:
    """Return the batch slot of a packed tag."""
    return tag >> 24 & 31


STEP_MASK = 2**14 - 1
