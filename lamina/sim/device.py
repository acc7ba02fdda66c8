"""A device whose operations are carried out in no time and take as long as a model says."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, TypeVarTuple

import torch

from lamina.errors import UsageError
from lamina.runtime.spans import Place, Recorder
from lamina.sim.link import Trace
from lamina.sim.loop import VirtualLoop

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class ModelledWork:
    """The seconds that operations say they take themselves, as a model or a backend that computes nothing can."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """The operation under way takes so much longer."""
        self._seconds += seconds

    def take(self) -> float:
        """Return what the operation that was just called takes in all."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


Seconds = Callable[[str, Place | None], float] | Mapping[str, float] | float | ModelledWork
"""What operations take: by the name of the function and its place, by name alone, the same for all, or what they say
themselves."""


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
        self._is_instant = seconds == 0
        self._work = seconds if isinstance(seconds, ModelledWork) else None
        given = 0.0 if isinstance(seconds, ModelledWork) else seconds
        self._seconds = given if callable(given) else _lookup(given, name)
        self._trace = trace
        self._queue: deque[_Operation] = deque()
        self._busy = False

    def start(self) -> None:
        """Nothing: the loop is the world's, which runs it."""

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run an operation; its result, and the seconds from its start to its completion."""
        seconds = None
        if not self._busy and not self._watched and self._work is None:
            if self._is_instant:
                return function(*args), 0.0
            seconds = self._seconds(getattr(function, "__name__", "operation"), at)
            if seconds == 0:
                return function(*args), 0.0
        operation = _Operation(function, args, at)
        if self._busy:
            self._queue.append(operation)
        elif not self._start(operation, seconds):
            if operation.error is not None:
                raise operation.error
            return operation.result, 0.0  # type: ignore[return-value]
        operation.done = self.loop.create_future()
        await operation.done
        if operation.error is not None:
            raise operation.error
        return operation.result, operation.seconds  # type: ignore[return-value]

    def close(self) -> None:
        """Nothing: there is no thread to end. What was asked for is still carried out."""

    # -- inside

    def _start(self, operation: _Operation, seconds: float | None = None) -> bool:
        """Carry out an operation; whether it keeps the device busy for some time. The model is asked for ``seconds``
        once, as its answers may be random."""
        function, now = operation.function, self.loop.time()
        operation.start_s = now
        try:
            if seconds is None:
                seconds = self._seconds(getattr(function, "__name__", "operation"), operation.at)
            operation.seconds = seconds
            if not 0 <= seconds < math.inf:
                operation.seconds = 0.0
                raise UsageError(
                    f"device {self._name}: operation {operation.name} would take {seconds} s; 0 or more are allowed"
                )
            operation.result = function(*operation.args)
        except Exception as error:
            operation.error = error
        if self._work is not None:
            operation.seconds = self._work.take()
        if operation.seconds:
            self._busy = True
            self.loop.call_at(now + operation.seconds, self._complete, operation)
            return True
        if self._watched:
            self._record(operation)
        return False

    def _complete(self, operation: _Operation) -> None:
        """The device is free: start the next operation, or several that take no time."""
        self._busy = False
        self._finish(operation)
        queue = self._queue
        while queue:
            operation = queue.popleft()
            if operation.cancelled:
                continue
            if self._start(operation):
                return
            assert operation.done is not None, "it has waited"
            operation.done.set_result(None)

    def _finish(self, operation: _Operation) -> None:
        """Account for an operation that took time, and wake its task."""
        self.busy_s += operation.seconds
        if self._watched:
            self._record(operation)
        done = operation.done
        if done is not None and not done.done():
            done.set_result(None)

    @property
    def _watched(self) -> bool:
        return self.recorder is not None or self._trace is not None

    def _record(self, operation: _Operation) -> None:
        start, end = operation.start_s, self.loop.time()
        if self.recorder is not None:
            self.recorder.add(operation.name, operation.at, start, end)
        if self._trace is not None:
            place = f" batch={operation.at.batch} layer={operation.at.layer}" if operation.at else ""
            self._trace(f"{self._name} {operation.name}{place} start={start:.9f}")


class _Operation:
    """A function to be called, and then what came of it."""

    __slots__ = ("args", "at", "done", "error", "function", "result", "seconds", "start_s")

    def __init__(self, function: Callable[..., object], args: tuple[Any, ...], at: Place | None) -> None:
        self.function = function
        self.args = args
        self.at = at
        self.done: asyncio.Future[None] | None = None
        self.result: object = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self.start_s = 0.0

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "operation")

    @property
    def cancelled(self) -> bool:
        return self.done is not None and self.done.cancelled()


def _lookup(seconds: Mapping[str, float] | float, device: str) -> Callable[[str, Place | None], float]:
    def lookup(name: str, at: Place | None) -> float:
        if not isinstance(seconds, Mapping):
            return seconds
        try:
            return seconds[name]
        except KeyError:
            known = ", ".join(sorted(seconds)) or "none"
            raise UsageError(
                f"device {device}: no seconds are given for operation {name!r}; known are {known}"
            ) from None

    return lookup
