"""Record what a node's device does and when, in a ring that is read afterwards."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

MAX_SPANS = 1 << 17
"""The number of spans that are kept. Older ones are forgotten."""

_SPAN = struct.Struct("<hhidd")
_pack = _SPAN.pack_into
_NOWHERE = -1
_NO_PLACE = (_NOWHERE, _NOWHERE)


class Place(NamedTuple):
    """Says what an operation is part of: a batch slot, and a layer if it has one."""

    batch: int
    layer: int = _NOWHERE


class Span(NamedTuple):
    """Describes one operation. Times are seconds on the monotonic clock that all processes of a host share.

    ``batch`` and ``layer`` are -1 where it belongs to none.
    """

    name: str
    batch: int
    layer: int
    start_s: float
    end_s: float


class Recorder:
    """Keeps the last ``MAX_SPANS`` spans in a ring. One thread adds, and no other reads before it has stopped.

    It holds numbers in a buffer rather than objects, which would keep the garbage collector busy.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(MAX_SPANS * _SPAN.size)
        self._added = 0
        self._names: dict[str, int] = {}

    def add(self, name: str, at: Place | None, start_s: float, end_s: float) -> None:
        """Keep one span."""
        number = self._names.get(name)
        if number is None:
            number = self._names[name] = len(self._names)
        batch, layer = at or _NO_PLACE
        _pack(self._buffer, self._added % MAX_SPANS * _SPAN.size, number, batch, layer, start_s, end_s)
        self._added += 1

    def __iter__(self) -> Iterator[Span]:
        """Return the spans that are kept, oldest first."""
        names = [name.lstrip("_") for name in self._names]
        for i in range(max(0, self._added - MAX_SPANS), self._added):
            number, *rest = _SPAN.unpack_from(self._buffer, i % MAX_SPANS * _SPAN.size)
            yield Span(names[number], *rest)
