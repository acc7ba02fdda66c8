"""Sequences wait in this queue until they are admitted."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

FIRST_COME_EVERY = 8
"""One in this many admissions goes to the oldest waiting sequence, whatever its rank. So the n-th oldest is admitted
after at most n times this many admissions."""


class Ranked(Protocol):
    """Says what an item needs in order to wait. Neither property changes meanwhile."""

    @property
    def rank(self) -> tuple[int, ...]: ...

    @property
    def arrival(self) -> int: ...


T = TypeVar("T", bound=Ranked)
_Heap = list[tuple[Any, int, T]]


class WaitingQueue(Generic[T]):
    """Orders items by rank, the smallest first, without starvation. All operations are logarithmic."""

    def __init__(self) -> None:
        self._tickets: dict[T, int] = {}
        """The ticket of each waiting item. Heap entries with any other ticket are void."""
        self._by_rank: _Heap[T] = []
        self._by_arrival: _Heap[T] = []
        self._issued = 0
        self._taken = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[T]:
        return iter(self._tickets)

    def push(self, item: T) -> None:
        """Add an item, perhaps for a second time after it was taken."""
        self._issued += 1
        self._tickets[item] = self._issued
        heapq.heappush(self._by_rank, (item.rank, self._issued, item))
        heapq.heappush(self._by_arrival, (item.arrival, self._issued, item))

    def remove(self, item: T) -> bool:
        """Remove an item; return False if it does not wait."""
        if self._tickets.pop(item, None) is None:
            return False
        for heap in (self._by_rank, self._by_arrival):
            if len(heap) > 2 * len(self._tickets) + 64:
                heap[:] = [entry for entry in heap if self._is_valid(entry)]
                heapq.heapify(heap)
        return True

    def head(self) -> T | None:
        """Return the item that is next."""
        first_come = self._taken % FIRST_COME_EVERY == FIRST_COME_EVERY - 1
        heap = self._by_arrival if first_come else self._by_rank
        while heap and not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def take(self, head: T) -> None:
        """Remove the head because it is admitted."""
        self.remove(head)
        self._taken += 1

    def _is_valid(self, entry: tuple[Any, int, T]) -> bool:
        return self._tickets.get(entry[2]) == entry[1]
