"""`Rows` says to which position of which sequence each row of a step's tensors belongs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lamina.errors import UsageError


class Run(NamedTuple):
    """A run is ``count`` consecutive positions of one sequence from ``start`` on: 1 in decode, more in prefill."""

    sequence: int
    start: int
    count: int  # type: ignore[assignment]  # no run is asked how often it holds a value

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step's q, k and v are those of ``runs[0]``, then those of ``runs[1]``, and so on.

    A sequence has at most one run per step, so that all of its rows have the same past.
    """

    runs: tuple[Run, ...]
    tokens: int = field(init=False, compare=False, repr=False)
    """The step has this many rows, T in the shapes of this package."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("the rows of a step need at least one run, got none")
        tokens, seen = 0, set()
        for run in self.runs:
            if run.start < 0 or run.count < 1:
                raise UsageError(f"{run}: expected start >= 0 and count >= 1")
            if run.sequence in seen:
                raise UsageError(f"sequence {run.sequence} has two runs in one step; expected one")
            seen.add(run.sequence)
            tokens += run.count
        object.__setattr__(self, "tokens", tokens)  # read in every layer
