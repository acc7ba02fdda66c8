"""When a node that has died is started again, and how often."""

from __future__ import annotations

from collections import deque

LIMIT = 5
"""So often a node is started again within WITHIN_S."""
WITHIN_S = 600.0
FIRST_DELAY_S = 0.5
"""The first restart comes after this time, each further one after twice the time before."""


class Restarts:
    """Counts the restarts of one node."""

    def __init__(self) -> None:
        self._at_s: deque[float] = deque()

    @property
    def count(self) -> int:
        """How many restarts there were within WITHIN_S before the last one, with that one."""
        return len(self._at_s)

    def next_s(self, now_s: float) -> float | None:
        """Return after how many seconds the node is to be started again, and count that; None if it may not be."""
        while self._at_s and self._at_s[0] <= now_s - WITHIN_S:
            self._at_s.popleft()
        if len(self._at_s) == LIMIT:
            return None
        self._at_s.append(now_s)
        return float(FIRST_DELAY_S * 2 ** (len(self._at_s) - 1))
