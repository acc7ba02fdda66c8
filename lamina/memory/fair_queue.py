"""Who computes next on a device that several tenants share: whoever has had the least of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from lamina.runtime.device import Device
from lamina.runtime.spans import Place

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

ROUNDS = 3
"""Rounds of the loop before each choice: in these, links learn what has arrived, those who wait for it are woken, and
they say that they want to compute."""


class Turns:
    """Divides the time of ``device`` evenly among the tenants that have something to do, one operation after the other.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996) with equal weights. Each tenant has a clock, which
    advances by what its operations take; the one whose clock shows least is next. Where a tenant comes back after a
    pause, its clock is put forward to that of whoever was served last, so that nobody saves up time by being idle. Of
    two tenants that always have something to do, neither gets ahead by more than one operation of each.

    A tenant that is alone computes at once. All of it belongs to the device's thread.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.shares: list[Share] = []
        self._now_s = 0.0
        """What the clock of the tenant that was served last showed then."""
        self._serving: asyncio.Task[None] | None = None

    def wait(self, share: Share) -> asyncio.Future[None]:
        """Done when it is the turn of ``share``: for whoever awaits it, to compute as soon as it is resumed."""
        if not share.waiting:
            share.clock_s = max(share.clock_s, self._now_s)
        turn: asyncio.Future[None] = self.device.loop.create_future()
        share.waiting.append(turn)
        if self._serving is None:
            self._serving = self.device.loop.create_task(self._serve())
        return turn

    async def _serve(self) -> None:
        """Give turns until nobody waits for one."""
        while True:
            for _ in range(ROUNDS):
                await asyncio.sleep(0)
            share = min((s for s in self.shares if s.waiting), key=lambda s: s.clock_s, default=None)
            if share is None:
                self._serving = None
                return
            turn = share.waiting.popleft()
            if turn.done():  # whoever waited for it was cancelled
                continue
            self._now_s, busy_s = share.clock_s, share.busy_s
            turn.set_result(None)
            await asyncio.sleep(0)  # meanwhile it computes
            share.clock_s += share.busy_s - busy_s


class Share:
    """A tenant's share of a device. ``busy_s``: seconds that its operations have taken so far."""

    def __init__(self, turns: Turns) -> None:
        self.busy_s = self.clock_s = 0.0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self._turns = turns
        turns.shares.append(self)

    def leave(self) -> None:
        """Let the others have it; whoever waits for a turn has to be cancelled before."""
        self._turns.shares.remove(self)

    async def compute(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run ``function`` when it is this tenant's turn; what it returns, and the seconds that it took."""
        if len(self._turns.shares) > 1:
            await self._turns.wait(self)
        device = self._turns.device
        before_s = device.busy_s
        result = await device.compute(function, *args, at=at)
        spent_s = device.busy_s - before_s
        self.busy_s += spent_s
        return result, spent_s
