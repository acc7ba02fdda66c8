"""The CPU is a device: one thread runs all operations."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from lamina.errors import ConfigError
from lamina.runtime.loop import PreciseLoop
from lamina.runtime.spans import Place, Recorder

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class CpuDevice:
    """Runs operations in one thread, the one of their coroutines, without suspending these.

    ``cpus`` pins the whole process; ``threads`` is how many threads compute, by default one for each of ``cpus``, else
    as many as torch takes. ``name`` is a torch device; tensors are moved to one that is not the CPU, and nothing else
    is done for it.
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
        self.loop: asyncio.AbstractEventLoop = PreciseLoop()
        self._time = self.loop.time

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._work, name="device", daemon=True).start()

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run ``function`` now; nothing else runs meanwhile."""
        start = self._time()
        try:
            result = function(*args)
        finally:
            end = self._time()
            self.busy_s += end - start
            if (recorder := self.recorder) is not None:
                recorder.add(getattr(function, "__name__", "operation"), at, start, end)
        return result, end - start

    def close(self) -> None:
        """Stop the thread after its present operation."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _work(self) -> None:
        import torch

        asyncio.set_event_loop(self.loop)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            self.loop.run_forever()


def let_idle_threads_sleep() -> None:
    """Let OpenMP's threads sleep soon when they have nothing to do. This is called before torch is imported.

    By default they look for more work for some milliseconds, in which they take a core from the processes that share
    it; a node waits for others in every layer. This many turns take about a quarter of a millisecond, longer than what
    lies between two operations of a slice. With much fewer, waking the threads costs up to half of the speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _pin(cpus: frozenset[int]) -> None:
    """Pin the process; raise ConfigError unless it has all of these processors. The system would leave out the
    others."""
    available = os.sched_getaffinity(0)
    missing = sorted(cpus - available)
    if missing:
        some = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ConfigError(f"cpus: this process has no processors {some}; expected some of {sorted(available)}")
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as e:
        raise ConfigError(f"cpus: cannot be pinned to the processors {sorted(cpus)}: {e.strerror}") from e
