"""Forget nodes that no file names when they have been lost for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lamina.config import RecoveryConfig


class Expiry:
    """Counts how long members have been lost, on the node's loop of the front. ``on_expired`` is told of one that has
    been away for as long as anything waits for it."""

    def __init__(self, recovery: RecoveryConfig, on_expired: Callable[[int], None]) -> None:
        self._patience_s = max(recovery.grace, recovery.lease)
        self._on_expired = on_expired
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def begin(self, member: int) -> None:
        """A member is lost; if it was before, the time goes on."""
        if member not in self._timers:
            self._timers[member] = asyncio.get_running_loop().call_later(self._patience_s, self._expire, member)

    def end(self, member: int) -> None:
        """A member is back, or is none any more."""
        if (timer := self._timers.pop(member, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Tell of none any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _expire(self, member: int) -> None:
        del self._timers[member]
        self._on_expired(member)
