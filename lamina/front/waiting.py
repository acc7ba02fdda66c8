"""The sequences that wait to be admitted, and who is next."""

from __future__ import annotations

import heapq
from typing import Any, Generic, Protocol, TypeVar

FIRST_COME_EVERY = 8
"""One in so many admissions goes to whoever came first, whatever the rank: the n-th of those who wait, by arrival, is
admitted after at most n times as many."""


class Ranked(Protocol):
    """What can wait. Neither property changes meanwhile."""

    @property
    def rank(self) -> tuple[int, ...]: ...

    @property
    def arrival(self) -> int: ...


T = TypeVar("T", bound=Ranked)
_Heap = list[tuple[Any, int, T]]


class Waiting(Generic[T]):
    """A queue by rank, the smallest first, in which nobody starves. Every operation takes logarithmic time."""

    def __init__(self) -> None:
        self._tickets: dict[T, int] = {}
        """Of everybody who waits, what the valid entries in both heaps are marked with."""
        self._by_rank: _Heap[T] = []
        self._by_arrival: _Heap[T] = []
        self._issued = 0
        self._taken = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, one: T) -> None:
        """Wait, again perhaps."""
        self._issued += 1
        self._tickets[one] = self._issued
        heapq.heappush(self._by_rank, (one.rank, self._issued, one))
        heapq.heappush(self._by_arrival, (one.arrival, self._issued, one))

    def remove(self, one: T) -> bool:
        """Wait no more; False for one that does not."""
        if self._tickets.pop(one, None) is None:
            return False
        for heap in (self._by_rank, self._by_arrival):
            if len(heap) > 2 * len(self._tickets) + 64:
                heap[:] = [entry for entry in heap if self._is_valid(entry)]
                heapq.heapify(heap)
        return True

    def head(self) -> T | None:
        """Who is next."""
        first_come = self._taken % FIRST_COME_EVERY == FIRST_COME_EVERY - 1
        heap = self._by_arrival if first_come else self._by_rank
        while heap and not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def take(self, head: T) -> None:
        """Admit the head."""
        self.remove(head)
        self._taken += 1

    def _is_valid(self, entry: tuple[Any, int, T]) -> bool:
        return self._tickets.get(entry[2]) == entry[1]
