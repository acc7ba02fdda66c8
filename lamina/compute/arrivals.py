"""Tags of finished writes, of which one at a time is awaited in each batch slot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from lamina.errors import LaminaError


class Arrivals:
    """What has arrived by slot, and who waits for it. Belongs to the device's loop.

    A tag may come before anybody waits for it. One that is not what is waited for next is of an older step: it is
    dropped, and counted in ``stale``.
    """

    def __init__(self) -> None:
        self.stale = 0
        self._early: dict[int, int] = {}
        self._awaited: dict[int, tuple[int, asyncio.Future[None]]] = {}
        self._error: LaminaError | None = None

    def arrive(self, slot: int, tag: int) -> None:
        """The tag has come."""
        awaited, done = self._awaited.get(slot, (None, None))
        if done is not None and tag == awaited:
            if not done.done():
                done.set_result(None)
            del self._awaited[slot]
        else:
            self.stale += slot in self._early
            self._early[slot] = tag

    async def wait(self, slot: int, tag: int) -> None:
        """Wait until the tag has come; raises the error of ``fail``."""
        early = self._early.pop(slot, None)
        if early == tag:
            return
        self.stale += early is not None
        if self._error:
            raise self._error
        done = asyncio.get_running_loop().create_future()
        self._awaited[slot] = tag, done
        await done

    def fail(self, error: LaminaError) -> None:
        """Nothing will come any more: tell those who wait, and whoever will."""
        self._error = error
        fail((done for _, done in self._awaited.values()), error)
        self._awaited.clear()


def fail(waiters: Iterable[asyncio.Future[Any]], error: LaminaError) -> None:
    """Tell whoever waits; nobody has to hear it."""
    for waiting in waiters:
        if not waiting.done():
            waiting.set_exception(error)
            waiting.exception()
