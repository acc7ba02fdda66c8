"""The threads of a node run this event loop."""

from __future__ import annotations

import time

import uvloop


class PreciseLoop(uvloop.Loop):  # type: ignore[misc] # uvloop has no types that mypy follows here
    """This is uvloop with a precise clock. Its own tells the time of the last look at the sockets, in milliseconds.

    Both count seconds on the monotonic clock that all processes of a host share, so that timers stay as they are.
    """

    def time(self) -> float:
        """Return the time in seconds."""
        return time.perf_counter()
