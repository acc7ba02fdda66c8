"""Collect the tags of finished writes; each batch slot waits for one tag after the other."""

from __future__ import annotations

import asyncio

from lamina.errors import LaminaError
from lamina.wire.tags import STEP_MASK


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
        self._given_up: dict[int, tuple[int, LaminaError]] = {}
        """By slot, the low bits of the number of a step that the other end gave up, and why."""

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
        """Wait until the tag has come; raise the error of `fail`, also if it has come, as what came with it is gone."""
        early = self._early.pop(slot, None)
        if self.error:
            raise self.error
        if early == tag:
            return
        self.stale += early is not None
        step, error = self._given_up.pop(slot, (-1, None))
        if error is not None and step == tag & STEP_MASK:
            raise error
        done = asyncio.get_running_loop().create_future()
        self._awaited[slot] = tag, done
        await done
        if self.error:
            raise self.error

    def give_up(self, slot: int, step: int, error: LaminaError) -> None:
        """Nothing more will arrive for a step: its wait in this slot raises ``error``."""
        tag, done = self._awaited.get(slot, (None, None))
        if tag is None or done is None or tag & STEP_MASK != step:
            self._given_up[slot] = step, error
            return
        del self._awaited[slot]
        _set_error(done, error)

    def fail(self, error: LaminaError) -> None:
        """Nothing will arrive any more: every wait raises ``error``, now and later. The first error stays."""
        self.error = self.error or error
        for _, done in self._awaited.values():
            _set_error(done, error)
        self._awaited.clear()


def _set_error(done: asyncio.Future[None], error: LaminaError) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # the step may be cancelled; then asyncio should not complain
