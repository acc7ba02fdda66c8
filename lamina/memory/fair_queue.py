"""A fair queue decides which tenant of a memory node computes next on the device that they share."""

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
"""The rounds of the loop before each choice. During these, links learn what has arrived, the coroutines that wait for
it are woken, and they queue their operations."""


class FairQueue:
    """Divides the time of ``device`` evenly among the tenants that have work, one operation after the other.

    This is start-time fair queueing (Goyal, Vin and Cheng, 1996) with equal weights. Each tenant has a virtual clock,
    which advances by the seconds that its operations take; the tenant whose clock shows least is next. When a tenant
    comes back after a pause, its clock is put forward to that of the tenant that was served last, so that no tenant
    saves up time by being idle. Of two tenants that always have work, neither gets ahead by more than one operation of
    each.

    A tenant that is alone computes at once. The queue belongs to the device's loop.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.shares: list[Share] = []
        self._now_s = 0.0
        """The virtual time of the tenant that was served last, when it was chosen."""
        self._serving: asyncio.Task[None] | None = None
        self._finished: asyncio.Future[None] | None = None
        """Done when the operation that was let in has completed."""

    async def enter(self, share: Share) -> None:
        """Wait until it is the turn of ``share``. The caller then runs one operation and calls `leave`."""
        if not share.waiting:
            share.clock_s = max(share.clock_s, self._now_s)
        loop = self.device.loop
        turn: asyncio.Future[None] = loop.create_future()
        share.waiting.append(turn)
        if self._serving is None:
            self._serving = loop.create_task(self._serve())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # it had its turn, and does not use it
            raise

    def leave(self) -> None:
        """The operation that was let in has completed."""
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    async def _serve(self) -> None:
        """Let operations in, one after the other, until none waits."""
        while True:
            for _ in range(ROUNDS):
                await asyncio.sleep(0)
            share = min((s for s in self.shares if s.waiting), key=lambda s: s.clock_s, default=None)
            if share is None:
                self._serving = None
                return
            turn = share.waiting.popleft()
            if turn.done():  # the coroutine that waited for it was cancelled
                continue
            self._now_s = share.clock_s
            self._finished = self.device.loop.create_future()
            turn.set_result(None)
            await self._finished


class Share:
    """Represents a tenant's share of a device. ``busy_s`` counts the seconds that its operations have taken so far."""

    def __init__(self, queue: FairQueue) -> None:
        self.busy_s = self.clock_s = 0.0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self._queue = queue
        queue.shares.append(self)

    def close(self) -> None:
        """Leave the device to the others. Coroutines that wait for a turn have to be cancelled before."""
        self._queue.shares.remove(self)

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run an operation when it is this tenant's turn; see `Device.run`."""
        queue = self._queue
        if len(queue.shares) == 1:
            result, seconds = await queue.device.run(function, *args, at=at)
        else:
            await queue.enter(self)
            try:
                result, seconds = await queue.device.run(function, *args, at=at)
                self.clock_s += seconds
            finally:
                queue.leave()
        self.busy_s += seconds
        return result, seconds
