"""A mailbox is a queue with one reader."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Holds what has arrived for one coroutine, in order, on one loop.

    It does less than `asyncio.Queue`, and takes a third of the time: a memory node has two arrivals in every layer.
    """

    __slots__ = ("_items", "_reader")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Add an item, and wake the reader if it waits."""
        self._items.append(item)
        if (reader := self._reader) is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    async def get(self) -> T:
        """Wait for the oldest item, and return it. Only one coroutine at a time may call this."""
        items = self._items
        while not items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return items.popleft()

    async def peek(self) -> T:
        """Wait for the oldest item, and return it without taking it. Only the coroutine that takes items may call
        this."""
        items = self._items
        while not items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return items[0]
