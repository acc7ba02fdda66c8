"""Background workers run functions that take long, beside the loops of a node."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
R = TypeVar("R")
T = TypeVar("T")

NICE = 10
"""How much worse the priority of workers is than that of the node's other threads, which step by step wait for each
other."""


STACK_BYTES = 64 << 20
"""The stack of each worker, of which only what is used takes memory: libraries in C and Rust recurse over what users
give them, and a stack that is too small ends the process."""
MAX_PARALLEL = 8


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
            with _large_stacks():
                running = asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        except BaseException:
            self._free.release()
            raise
        running.add_done_callback(lambda _: self._free.release())
        return await asyncio.shield(running)


class ParallelWorkers:
    """Runs a short function for each of many values, in as many threads as there are processors, up to some.

    On a virtual loop the function is called at once, and no thread is ever started.
    """

    def __init__(self) -> None:
        self._threads = min(MAX_PARALLEL, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, "parallel-worker", initializer=_give_way)

    def each(self, function: Callable[[T], None], values: Iterable[T]) -> list[asyncio.Future[None]]:
        """Begin to call ``function`` with each value; return what ends when all calls have ended. Threads that are free
        take the values in order, so one that takes long keeps no other waiting while there are threads."""
        waiting = deque(values)

        def work() -> None:
            while True:
                try:
                    value = waiting.popleft()
                except IndexError:
                    return
                function(value)

        run = asyncio.get_running_loop().run_in_executor
        with _large_stacks():
            return [run(self._pool, work) for _ in range(min(self._threads, len(waiting)))]

    def close(self) -> None:
        """Begin nothing more. This does not wait for what runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _large_stacks() -> Iterator[None]:
    """Give threads that are started in here a large stack."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def _give_way() -> None:
    """Let other threads go first where there are fewer processors than threads."""
    me = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + NICE))
