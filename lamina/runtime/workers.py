"""Background workers run functions that take long, beside the loops of a node."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

NICE = 10
"""How much worse the priority of workers is than that of the node's other threads, which step by step wait for each
other."""


class BackgroundWorkers:
    """Runs functions in two threads, one of which is kept for those that do not take long.

    It belongs to one loop. On a virtual one, functions run at once, and no thread is ever started.
    """

    def __init__(self) -> None:
        self._short, self._long = _Worker("worker"), _Worker("long-worker")

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, long: bool = False) -> R:
        """Return what ``function`` returns. If this is cancelled while it waits for a thread, the function is never
        called; one that runs goes on to its end."""
        return await (self._long if long else self._short).run(function, *args)

    def close(self) -> None:
        """Begin nothing more. This does not wait for what runs."""
        self._short.pool.shutdown(wait=False, cancel_futures=True)
        self._long.pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """One thread. What waits for it, waits on the loop, where it is forgotten when its caller is."""

    def __init__(self, name: str) -> None:
        self.pool = ThreadPoolExecutor(1, name, initializer=_give_way)
        self._free = asyncio.Lock()

    async def run(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        await self._free.acquire()
        try:
            running = asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        except BaseException:
            self._free.release()
            raise
        running.add_done_callback(lambda _: self._free.release())
        return await asyncio.shield(running)


def _give_way() -> None:
    """Let other threads go first where there are fewer processors than threads."""
    me = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + NICE))
