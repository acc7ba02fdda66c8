"""Collect the tags of finished writes; each batch slot waits for one tag after the other."""

from __future__ import annotations

import asyncio

from lamina.errors import LaminaError


class Arrivals:
    """Keeps the tags that have arrived, by slot, and wakes the steps that wait for them. It belongs to the device's
    loop.

    A tag may come before it is awaited. One that is not what is awaited next belongs to an older step: it is dropped,
    and counted in ``stale``.
    """

    def __init__(self) -> None:
        self.stale = 0
        self.error: LaminaError | None = None
        """The reason why nothing will arrive any more."""
        self._early: dict[int, int] = {}
        self._awaited: dict[int, tuple[int, asyncio.Future[None]]] = {}

    def arrive(self, slot: int, tag: int) -> None:
        """Take in a tag."""
        awaited, done = self._awaited.get(slot, (None, None))
        if done is not None and tag == awaited:
            if not done.done():
                done.set_result(None)
            del self._awaited[slot]
        else:
            self.stale += slot in self._early
            self._early[slot] = tag

    async def wait(self, slot: int, tag: int) -> None:
        """Wait until the tag has come; raise the error of `fail`."""
        early = self._early.pop(slot, None)
        if early == tag:
            return
        self.stale += early is not None
        if self.error:
            raise self.error
        done = asyncio.get_running_loop().create_future()
        self._awaited[slot] = tag, done
        await done

    def fail(self, error: LaminaError) -> None:
        """Nothing will arrive any more: every wait raises ``error``, now and later. The first error stays."""
        self.error = self.error or error
        for _, done in self._awaited.values():
            if not done.done():
                done.set_exception(error)
                done.exception()  # the step may be cancelled; then asyncio should not complain
        self._awaited.clear()
