"""The one thread of a node that computes."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lamina.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[object]", Callable[[], object]]


class Device:
    """Runs functions one after the other in a thread of its own, so that the event loop never computes.

    ``name`` is a torch device. ``cpus`` pins the whole process; ``threads`` is how many threads compute, by default
    one for each of ``cpus``, else as many as torch takes: both attributes say what came of it. ``busy_s`` is the time
    spent in functions so far, in seconds.
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
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Queue ``function`` for the device thread; the future gives its result or error.

        Cancelling the future does not stop a function that runs.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._jobs.put((loop, future, lambda: function(*args, **kwargs)))  # type: ignore[arg-type]
        return future

    def close(self) -> None:
        """Stop after what is queued."""
        self._jobs.put(None)

    def _work(self) -> None:
        import torch

        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                loop, future, function = job
                if future.cancelled():
                    continue
                start = time.perf_counter()
                try:
                    outcome: Callable[[], None] = _Set(future.set_result, function())
                except BaseException as e:
                    outcome = _Set(future.set_exception, e)
                self.busy_s += time.perf_counter() - start
                try:
                    loop.call_soon_threadsafe(_unless_done, future, outcome)
                except RuntimeError:
                    return  # the loop is closed: nobody waits any more


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


class _Set:
    """A result on its way from the thread to the loop."""

    __slots__ = ("_set", "_value")

    def __init__(self, set_: Callable[[Any], None], value: object) -> None:
        self._set, self._value = set_, value

    def __call__(self) -> None:
        self._set(self._value)


def _unless_done(future: asyncio.Future[object], outcome: Callable[[], None]) -> None:
    if not future.done():
        outcome()
