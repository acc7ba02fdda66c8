"""A crossing is the only way from one event loop of a node to another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class Crossing:
    """Leads to the event loop ``loop`` of this process, which runs in another thread, or is the caller's own.

    An object belongs to one loop. Calls from another loop go through a crossing. Those by `post` and `call` arrive in
    the order in which they were made; a coroutine begins one round of that loop later.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call ``function`` there soon. An error in it goes to that loop's exception handler."""
        _send(self.loop, function, *args)

    def call(self, function: Callable[[*Ts], R], *args: *Ts) -> asyncio.Future[R]:
        """Call ``function`` there; the future, of the caller's loop, gets its result or its error.

        A future that is cancelled before the function has begun leaves it out; it does not stop one that runs.
        """
        here = asyncio.get_running_loop()
        answer: asyncio.Future[R] = here.create_future()

        def work() -> None:
            if answer.cancelled():
                return
            try:
                result = function(*args)
            except Exception as error:
                _send(here, _fail, answer, error)
            else:
                _send(here, _finish, answer, result)

        self.loop.call_soon_threadsafe(work)
        return answer

    def start(self, coroutine: Coroutine[Any, Any, R]) -> asyncio.Future[R]:
        """Run a coroutine there; the future belongs to the caller's loop. Cancelling it cancels the coroutine.

        An error that the coroutine raises after it was cancelled is dropped: what it used may be gone by then.
        """
        here = asyncio.get_running_loop()
        if self.loop is here:
            return here.create_task(coroutine)
        return self._start(coroutine, here, lambda: None)

    async def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine there to its end. When this is cancelled, it cancels the coroutine and waits for its end."""
        here = asyncio.get_running_loop()
        if self.loop is here:
            return await coroutine
        ended = asyncio.Event()
        answer = self._start(coroutine, here, ended.set)
        try:
            return await answer
        except asyncio.CancelledError:
            answer.cancel()
            await ended.wait()
            raise

    def _start(
        self, coroutine: Coroutine[Any, Any, R], here: asyncio.AbstractEventLoop, on_end: Callable[[], None]
    ) -> asyncio.Future[R]:
        answer: asyncio.Future[R] = here.create_future()
        tasks: list[asyncio.Task[R]] = []

        def begin() -> None:
            task = self.loop.create_task(coroutine)
            tasks.append(task)
            task.add_done_callback(lambda task: _send(here, _copy, task, answer, on_end))

        def end(answer: asyncio.Future[R]) -> None:
            if answer.cancelled():
                self.post(lambda: tasks[0].cancel())

        answer.add_done_callback(end)
        self.loop.call_soon_threadsafe(begin)
        return answer


def _send(loop: asyncio.AbstractEventLoop, function: Callable[[*Ts], object], *args: *Ts) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function, *args)


def _copy(task: asyncio.Task[R], answer: asyncio.Future[R], on_end: Callable[[], None]) -> None:
    on_end()
    if task.cancelled():
        answer.cancel()
    elif (error := task.exception()) is not None:
        if not answer.done():
            answer.set_exception(error)
    elif not answer.done():
        answer.set_result(task.result())


def _finish(answer: asyncio.Future[R], result: R) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
