"""An event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar, TypeVarTuple

from lamina.errors import DeadlockError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TASKS_NAMED = 20
"""The most tasks that an error names."""
MOST_ROUNDS = 100_000
"""Rounds of callbacks at one moment above which they are taken to go on for ever."""
MANY_CANCELLED = 1000
"""Cancelled timers above which, when they are the majority, the heap is rid of them."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that never waits: ``time()`` is in virtual seconds and starts at 0.

    Callbacks take no virtual time. When none is ready, the clock jumps to the next timer; timers of one moment run in
    the order in which they were set. When no timer is left either, nothing can ever happen again, and the loop raises
    ``DeadlockError``. It does so as well where the next timer lies behind ``limit_s``, since periodic timers would keep
    a run alive for ever, and where callbacks go on and on at one moment.

    Two runs of the same program make the same choices: tasks and futures hash to their number, so that sets of them
    have one order, and what is handed to an executor runs at once, in this thread. The loop belongs to one thread;
    ``call_soon_threadsafe`` is meant for code that does not know that.
    """

    _ready: deque[Any]  # handles, of which the private parts are used
    _stopping: bool
    _closed: bool

    def __init__(self, *, limit_s: float = math.inf) -> None:
        super().__init__()
        self.limit_s = limit_s
        self._now = 0.0
        self._rounds = 0
        """Those at the present moment."""
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._cancelled_timers = 0
        self._number = itertools.count(1).__next__

    # -- the clock

    def time(self) -> float:
        return self._now

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self._check_closed()
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        if when > self._now:
            heappush(self._timers, (when, self._number(), timer))
            timer._scheduled = True  # type: ignore[attr-defined]
        else:
            self._ready.append(timer)
        return timer

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            self._check_closed()
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    # -- what asyncio leaves to a loop, and what this one does otherwise

    def create_future(self) -> asyncio.Future[Any]:
        return VirtualFuture(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        if self.get_task_factory() is not None:
            return super().create_task(coro, name=name, context=context, **options)
        self._check_closed()
        return VirtualTask(coro, self, name=name, context=context, **options)

    def run_in_executor(self, executor: Executor | None, function: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Call ``function`` at once, in this thread."""
        self._check_closed()
        future = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _check_closed(self) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")  # as asyncio says it

    def _write_to_self(self) -> None:
        """Nothing: the loop never sleeps."""

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        if not timer._scheduled:  # type: ignore[attr-defined]
            return
        self._cancelled_timers += 1
        if self._cancelled_timers > MANY_CANCELLED and 2 * self._cancelled_timers > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._cancelled_timers = 0

    def _run_once(self) -> None:
        ready = self._ready
        if not ready:
            if self._stopping:
                return
            self._jump()
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise self._deadlock(f"callbacks have gone on for {MOST_ROUNDS} rounds without an end")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:  # as Handle._run does, without the call
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                message = f"Exception in callback {handle!r}"
                self.call_exception_handler({"message": message, "exception": error, "handle": handle})

    def _jump(self) -> None:
        """Make the timers of the next moment ready."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heappop(timers)
            self._cancelled_timers -= 1
        if not timers or timers[0][0] > self.limit_s:
            raise self._deadlock()
        self._now = now = timers[0][0]
        self._rounds = 0
        while timers and timers[0][0] == now:
            timer = heappop(timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]
            if timer._cancelled:
                self._cancelled_timers -= 1
            else:
                self._ready.append(timer)

    def _deadlock(self, what: str = "") -> DeadlockError:
        tasks = sorted(asyncio.all_tasks(self), key=hash)
        waiting = "; ".join(_where(task) for task in tasks[:TASKS_NAMED])
        if len(tasks) > TASKS_NAMED:
            waiting += f"; and {len(tasks) - TASKS_NAMED} more"
        if what:
            pass
        elif self._timers:
            what = (
                f"the next timer, at {self._timers[0][0]:g} s, lies behind the limit of {self.limit_s:g} s: "
                "something runs for ever, or limit_s is too small"
            )
        else:
            what = "no callback and no timer is left: find out what should have woken them"
        return DeadlockError(
            f"nothing can happen any more at {self._now:g} virtual seconds: {len(tasks)} tasks wait, and {what}. "
            f"Waiting: {waiting or 'none'}"
        )


class _Handle(asyncio.Handle):
    """A handle that does not note where it was made, which takes half the time."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop, context: Context | None
    ) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class VirtualFuture(asyncio.Future[Any]):
    """A future that hashes to its number."""

    __slots__ = ("_number",)

    def __hash__(self) -> int:
        try:
            return self._number
        except AttributeError:  # most futures are never in a set
            loop = self.get_loop()
            assert isinstance(loop, VirtualLoop)
            self._number: int = loop._number()
            return self._number


class VirtualTask(asyncio.Task[Any]):
    """A task that hashes to its number, and is named after it unless it has another name. ``context`` is its own."""

    __slots__ = ("_number", "context")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        loop: VirtualLoop,
        name: object = None,
        context: Context | None = None,
        **options: Any,
    ) -> None:
        self._number = number = loop._number()  # before all else: asyncio puts the task into a set
        self.context = copy_context() if context is None else context
        name = f"task {number}" if name is None else str(name)
        super().__init__(coroutine, loop=loop, name=name, context=self.context, **options)

    def __hash__(self) -> int:
        return self._number


def _where(task: asyncio.Task[Any]) -> str:
    """The name of a task and what it waits in: ``serve (Node.serve > Event.wait, locks.py:213)``."""
    names = []
    place = ""
    waiting: Any = task.get_coro()
    while (frame := getattr(waiting, "cr_frame", None)) is not None:
        names.append(waiting.__qualname__)
        place = f", {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        waiting = waiting.cr_await
    return f"{task.get_name()} ({' > '.join(names)}{place})"
