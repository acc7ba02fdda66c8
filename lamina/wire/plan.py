"""Pack what the hot path sends at fixed offsets: the plan of a step, and the header of a bulk chunk."""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from lamina.attention import Run
from lamina.errors import ProtocolError

SECONDS = struct.Struct("<d")
"""The seconds that a step's attention has taken so far, at the beginning of each answer."""
_PLAN = struct.Struct("<IIII")
_RUN = struct.Struct("<QII")
_new_run = partial(tuple.__new__, Run)  # a third of the time of the constructor, for each row
_CHUNK = struct.Struct("<QIII")
_MEMBER = "H"
CHUNK_HEADER = 64
"""The bytes before the keys of a bulk chunk: the header, padded so that the numbers behind it are aligned."""


@dataclass(frozen=True)
class StepPlan:
    """Tells a memory node about a step: which rows come, in this order.

    It stores k and v of the rows of ``storing``; the rows of ``reading`` only attend to what it holds. The first
    ``whole`` rows are answered with their attention, in the model's type; all others with a partial in float32.
    ``answers`` names, layer by layer, the compute node (its member id) that gets the answer; without it, the sender of
    the plan does. Every compute node that sends queries in a step sends its plan.
    """

    storing: tuple[Run, ...]
    reading: tuple[Run, ...]
    whole: int
    answers: tuple[int, ...] = ()

    @cached_property
    def stored_rows(self) -> int:
        """Return the number of rows whose keys and values the memory node stores."""
        return sum([run.count for run in self.storing])

    @cached_property
    def packed(self) -> bytes:
        """Return the plan as it is sent: a header, the runs, and the member ids of ``answers``."""
        runs = (*self.storing, *self.reading)
        head = _PLAN.pack(len(self.storing), len(self.reading), self.whole, len(self.answers))
        packed = b"".join([_RUN.pack(run.sequence, run.start, run.count) for run in runs])
        return head + packed + array(_MEMBER, self.answers).tobytes()

    @cached_property
    def rows(self) -> int:
        """Return the number of all rows."""
        return self.stored_rows + sum([run.count for run in self.reading])


def plan_bytes(max_rows: int, layers: int) -> int:
    """Return the bytes of the largest step plan."""
    return _PLAN.size + layers * array(_MEMBER).itemsize + max_rows * _RUN.size


def unpack_plan(buffer: memoryview, max_rows: int, layers: int) -> StepPlan:
    """Read the plan in ``buffer``.

    Raises ProtocolError for more rows than ``max_rows``, for a sequence that comes twice, and for answers to only some
    of the ``layers``.
    """
    storing, reading, whole, answers = _PLAN.unpack_from(buffer)
    count = storing + reading
    if not 1 <= count <= max_rows:
        raise ProtocolError(f"step plan with {count} runs; expected 1 to {max_rows}")
    if answers not in (0, layers):
        raise ProtocolError(f"step plan that names receivers for {answers} layers; expected none or {layers}")
    stop = _PLAN.size + count * _RUN.size
    runs = [*map(_new_run, _RUN.iter_unpack(buffer[_PLAN.size : stop]))]
    receivers = array(_MEMBER)
    receivers.frombytes(buffer[stop : stop + answers * receivers.itemsize])
    plan = StepPlan(tuple(runs[:storing]), tuple(runs[storing:]), whole, tuple(receivers))
    if len({run.sequence for run in runs}) < count or min(run.count for run in runs) < 1:
        raise ProtocolError("step plan with an empty run, or two runs of one sequence")
    if plan.rows > max_rows or whole > plan.stored_rows:
        raise ProtocolError(
            f"step plan with {plan.rows} rows, {plan.stored_rows} of them to be stored and {whole} whole; "
            f"expected at most {max_rows}"
        )
    return plan


class ChunkHeader(NamedTuple):
    """Says which keys and values a bulk chunk brings: ``tokens`` positions from ``start``, of one layer of one
    sequence."""

    sequence: int
    layer: int
    start: int
    tokens: int

    def pack(self) -> bytes:
        return _CHUNK.pack(*self)

    @classmethod
    def unpack(cls, buffer: memoryview) -> ChunkHeader:
        return cls(*_CHUNK.unpack_from(buffer))
