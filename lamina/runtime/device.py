"""The one thread of a node that computes, with an event loop of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

import uvloop

from lamina.errors import ConfigError
from lamina.runtime.spans import Place, Recorder

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def let_idle_threads_sleep() -> None:
    """Before torch is imported: OpenMP then reads how long its threads look for more work before they sleep.

    By default that is some milliseconds, in which they take a core from whoever shares it; a node waits for others
    in every layer. This many turns take about a quarter of a millisecond, longer than what lies between two operations
    of a slice. With much fewer, waking the threads costs up to half of the speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class Device:
    """A thread in which everything that computes runs, one after the other, and ``loop``, its event loop.

    The lanes of links belong to that loop (``Link.lane_loop``): between two operations the thread looks for arrived
    tags itself, and goes on with the batch that they are for. The node's other loop does control, and never computes.

    ``name`` is a torch device. ``cpus`` pins the whole process; ``threads`` is how many threads compute, by default
    one for each of ``cpus``, else as many as torch takes: both attributes say what came of it. ``busy_s`` is the time
    spent in functions so far, in seconds. ``recorder`` is given their spans where it is not None.
    """

    def __init__(self, name: str = "cpu", *, cpus: frozenset[int] | None = None, threads: int | None = None) -> None:
        import torch

        if cpus:
            _pin(cpus)
            threads = threads or len(cpus)
        if threads:
            torch.set_num_threads(threads)
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {name!r} was asked for, but torch finds no CUDA device on this machine")
        self.torch_device = torch.device(name)
        self.cpus = tuple(sorted(os.sched_getaffinity(0))) if cpus else None
        self.threads = torch.get_num_threads()
        self.busy_s = 0.0
        self.recorder: Recorder | None = None
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    # -- from the node's other loop

    def run(self, function: Callable[[*Ts], R], *args: *Ts) -> asyncio.Future[R]:
        """Have ``function`` run here; the future gives its result or error.

        Cancelling the future does not stop a function that runs.
        """

        async def job() -> R:
            return await self.compute(function, *args)

        return self.start(job())

    def start(self, coroutine: Coroutine[Any, Any, R]) -> asyncio.Future[R]:
        """Run a coroutine on ``loop``. Cancelling the future cancels it."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def close(self) -> None:
        """Stop when nothing computes. Links whose lanes are here have to be closed before."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    # -- from coroutines on ``loop``

    @staticmethod
    def clock() -> float:
        """Seconds; of the loop's own clock they would be too coarse."""
        return time.perf_counter()

    async def compute(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> R:
        """Run ``function`` now, without a look at anything else meanwhile. ``at``: for its span."""
        start = self.clock()
        try:
            return function(*args)
        finally:
            end = self.clock()
            self.busy_s += end - start
            if (recorder := self.recorder) is not None:
                recorder.add(getattr(function, "__name__", "operation"), at, start, end)

    # -- inside

    def _work(self) -> None:
        import torch

        asyncio.set_event_loop(self.loop)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            self.loop.run_forever()


def _pin(cpus: frozenset[int]) -> None:
    """Pin the process; `ConfigError` unless it has all of these processors. The system would leave out the others."""
    available = os.sched_getaffinity(0)
    missing = sorted(cpus - available)
    if missing:
        some = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ConfigError(f"cpus: this process has no processors {some}; expected some of {sorted(available)}")
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as e:
        raise ConfigError(f"cpus: cannot be pinned to the processors {sorted(cpus)}: {e.strerror}") from e
