"""The answers to many prompts, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from lamina.errors import CapacityError, LaminaError

P = TypeVar("P")
A = TypeVar("A")

AHEAD = 16
"""How many times as many answers as are asked for at a time may wait to be read."""


async def answers_in_order(
    ask: Callable[[P], Awaitable[A]], prompts: Iterable[P], concurrency: int
) -> AsyncGenerator[A | LaminaError]:
    """Yield what ``ask`` returns for each prompt, or the LaminaError that it raises, in the order of the prompts.

    ``concurrency`` of them are asked at a time, also while the first of them takes long, or the caller does.
    """
    places = asyncio.Semaphore(concurrency)
    asked: asyncio.Queue[asyncio.Task[A | LaminaError] | None] = asyncio.Queue(AHEAD * concurrency)
    running: set[asyncio.Task[A | LaminaError]] = set()

    def done(task: asyncio.Task[A | LaminaError]) -> None:
        running.discard(task)
        places.release()

    async def feed() -> None:
        try:
            for prompt in prompts:
                await places.acquire()
                task = asyncio.create_task(_patient(ask, prompt))
                running.add(task)
                task.add_done_callback(done)
                await asked.put(task)
        except Exception:
            await asked.put(None)
            raise
        await asked.put(None)

    feeding = asyncio.create_task(feed())
    try:
        while (answer := await asked.get()) is not None:
            yield await answer
        await feeding  # the prompts may have raised an error
    finally:
        for task in (feeding, *running):
            task.cancel()
        await asyncio.gather(feeding, *running, return_exceptions=True)


async def _patient(ask: Callable[[P], Awaitable[A]], prompt: P) -> A | LaminaError:
    """Ask, and ask again while the queue is full."""
    while True:
        try:
            return await ask(prompt)
        except CapacityError as e:
            if e.retry_after_s is None:
                return e
            await asyncio.sleep(e.retry_after_s)
        except LaminaError as e:
            return e
