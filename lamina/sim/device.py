"""A device whose operations are carried out in no time and take as long as a model says."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, TypeVarTuple, cast

import torch

from lamina.errors import UsageError
from lamina.runtime.spans import Place, Recorder
from lamina.sim.link import Trace
from lamina.sim.loop import VirtualLoop

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

Seconds = Callable[[str, Place | None], float] | Mapping[str, float]
"""What operations take: by the name of the function and its place, or by name alone."""


class ModelledDevice:
    """A ``Device`` on a virtual clock.

    An operation starts when all that were asked for before it are complete. Its function is called at the start; its
    result comes, or its error, after as many virtual seconds as ``seconds`` says. An operation of 0 seconds does not
    suspend on an idle device.

    An operation that is cancelled before it started is left out. One that has started keeps the device busy to its end,
    as it would on a real one, and then makes room for the next.
    """

    def __init__(
        self, loop: VirtualLoop, seconds: Seconds, *, name: str = "device", trace: Trace | None = None
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.torch_device = torch.device("cpu")
        self.threads = 1
        self.cpus: tuple[int, ...] | None = None
        self.busy_s = 0.0
        self.recorder: Recorder | None = None
        self._name = name
        self._seconds = _by_name(seconds, name) if isinstance(seconds, Mapping) else seconds
        self._trace = trace
        self._queue: deque[_Operation] = deque()
        self._busy = False

    def start(self) -> None:
        """Nothing: the loop is the world's, which runs it."""

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run an operation; its result, and the seconds from its start to its completion."""
        operation = _Operation(function, args, at)
        if self._busy:
            self._queue.append(operation)
            waits = True
        else:
            waits = self._start(operation)
        if waits:
            operation.done = self.loop.create_future()
            await operation.done
        if operation.error is not None:
            raise operation.error
        return cast("R", operation.result), operation.seconds

    def close(self) -> None:
        """Nothing: there is no thread to end. What was asked for is still carried out."""

    # -- inside

    def _start(self, operation: _Operation) -> bool:
        """Carry out an operation; whether it keeps the device busy for some time."""
        name = operation.name
        operation.start_s = self.loop.time()
        try:
            seconds = self._seconds(name, operation.at)
            if not 0 <= seconds < math.inf:
                raise UsageError(f"device {self._name}: operation {name} would take {seconds} s; 0 or more are allowed")
            operation.seconds = seconds
            operation.result = operation.function(*operation.args)
        except Exception as error:
            operation.error = error
        if not operation.seconds:
            self._finish(operation)
            return False
        self._busy = True
        self.loop.call_at(operation.start_s + operation.seconds, self._complete, operation)
        return True

    def _complete(self, operation: _Operation) -> None:
        """The device is free: start the next operation, or several that take no time."""
        self._busy = False
        self._finish(operation)
        queue = self._queue
        while queue:
            operation = queue.popleft()
            if not operation.cancelled and self._start(operation):
                return

    def _finish(self, operation: _Operation) -> None:
        """Account for an operation, and wake its task."""
        start, end = operation.start_s, self.loop.time()
        self.busy_s += operation.seconds
        if self.recorder is not None:
            self.recorder.add(operation.name, operation.at, start, end)
        if self._trace is not None:
            place = f" batch={operation.at.batch} layer={operation.at.layer}" if operation.at else ""
            self._trace(f"{self._name} {operation.name}{place} start={start:.9f}")
        if operation.done is not None and not operation.done.done():
            operation.done.set_result(None)


class _Operation:
    """A function to be called, and then what came of it."""

    __slots__ = ("args", "at", "done", "error", "function", "name", "result", "seconds", "start_s")

    def __init__(self, function: Callable[..., object], args: tuple[Any, ...], at: Place | None) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", "operation")
        self.args = args
        self.at = at
        self.done: asyncio.Future[None] | None = None
        self.result: object = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self.start_s = 0.0

    @property
    def cancelled(self) -> bool:
        return self.done is not None and self.done.cancelled()


def _by_name(seconds: Mapping[str, float], device: str) -> Callable[[str, Place | None], float]:
    def lookup(name: str, at: Place | None) -> float:
        try:
            return seconds[name]
        except KeyError:
            known = ", ".join(sorted(seconds)) or "none"
            raise UsageError(
                f"device {device}: no seconds are given for operation {name!r}; known are {known}"
            ) from None

    return lookup
