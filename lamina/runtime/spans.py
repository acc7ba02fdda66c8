"""Record what a node does and when, in a ring that is read afterwards."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

MAX_SPANS = 1 << 18
"""The number of spans that are kept. Older ones are forgotten."""

_SPAN = struct.Struct("<BHHhhqqdd")
_pack = _SPAN.pack_into
_NOWHERE = -1


class Activity(IntEnum):
    """Says what kind of thing a span is."""

    OPERATION = 0
    """The device ran an operation, which has the name of its function."""
    WAIT = 1
    """A step waited for ``peer``; the name says for what."""
    SENT = 2
    """Something was sent to ``peer``. It begins and ends at once."""
    ARRIVED = 3
    """Something arrived from ``peer``. It begins and ends at once."""
    REQUEST = 4
    """A step prefilled or decoded for a request; ``request`` is its number among all that the front has taken."""


QUERY, ANSWER, CARRY = "query", "answer", "carry"
"""What goes to a memory node in each layer and what comes back, and what one compute node hands to the next: names of
spans that are WAIT, SENT or ARRIVED."""
PREFILL, DECODE = "prefill", "decode"
"""What a step does for a request: names of spans that are REQUEST."""


class Place(NamedTuple):
    """Says what a span is part of: a batch slot, a layer and a step of the slot if it has them, and the node that it
    concerns: on a memory node the compute node, else the one that something is exchanged with."""

    batch: int
    layer: int = _NOWHERE
    step: int = _NOWHERE
    peer: str = ""


_NO_PLACE = Place(_NOWHERE)


class Span(NamedTuple):
    """Describes one thing that a node did. Times are seconds on the monotonic clock that all processes of a host share.

    ``batch``, ``layer``, ``step`` and ``request`` are -1, and ``peer`` is empty, where it belongs to none.
    """

    name: str
    batch: int
    layer: int
    start_s: float
    end_s: float
    step: int = _NOWHERE
    peer: str = ""
    activity: Activity = Activity.OPERATION
    request: int = _NOWHERE


class Recorder:
    """Keeps the last ``MAX_SPANS`` spans in a ring. One thread adds, and no other reads before it has stopped.

    It holds numbers in a buffer rather than objects, which would keep the garbage collector busy.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(MAX_SPANS * _SPAN.size)
        self._added = 0
        self._names: dict[str, int] = {}

    @property
    def forgotten(self) -> int:
        """Return the number of spans for which there was no room any more."""
        return max(0, self._added - MAX_SPANS)

    def add(
        self,
        name: str,
        at: Place | None,
        start_s: float,
        end_s: float,
        activity: Activity = Activity.OPERATION,
        request: int = _NOWHERE,
    ) -> None:
        """Keep one span."""
        names = self._names
        batch, layer, step, peer = at or _NO_PLACE
        name_number, peer_number = names.setdefault(name, len(names)), names.setdefault(peer, len(names))
        offset = self._added % MAX_SPANS * _SPAN.size
        _pack(self._buffer, offset, activity, name_number, peer_number, batch, layer, step, request, start_s, end_s)
        self._added += 1

    def mark(self, name: str, at: Place, time_s: float, activity: Activity) -> None:
        """Keep something that took no time."""
        self.add(name, at, time_s, time_s, activity)

    def __iter__(self) -> Iterator[Span]:
        """Return the spans that are kept, oldest first."""
        names = list(self._names)
        for i in range(self.forgotten, self._added):
            activity, name, peer, batch, layer, step, request, start_s, end_s = _SPAN.unpack_from(
                self._buffer, i % MAX_SPANS * _SPAN.size
            )
            yield Span(
                names[name].lstrip("_"), batch, layer, start_s, end_s, step, names[peer], Activity(activity), request
            )
