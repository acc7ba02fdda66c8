"""How a compute node starts, and runs in one part after the other: as the front, or following it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from lamina.errors import NodeError
from lamina.front.intake import Intake
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.enlistment import Enlistment

log = logging.getLogger("lamina.compute")

T = TypeVar("T")

Part = Intake | Enlistment
"""What a compute node does: it takes requests in, or follows a front."""

BLAME_AFTER_S = 1.0
"""How long a start may go on when another node is lost, to end with a reason of its own."""


class StartLoss:
    """Remembers the first loss of a node during the start of the front, which that ends."""

    def __init__(self) -> None:
        self.error: NodeError | None = None
        self._noted = asyncio.Event()

    def note(self, error: NodeError) -> None:
        """A node is lost."""
        if self.error is None:
            self.error = error
            self._noted.set()

    def forgive(self) -> None:
        """It does not matter, as this node is not the front."""
        self.error = None
        self._noted.clear()

    def check(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            raise self.error

    async def end(self, start: Coroutine[Any, Any, T], stopping: asyncio.Event, peers: Collection[str]) -> T | None:
        """Start; return None if the node is told to stop before. Raises NodeError if another node is lost before.

        ``peers`` are the names of the other compute nodes.
        """
        starting = asyncio.ensure_future(start)
        ends = [asyncio.ensure_future(event.wait()) for event in (stopping, self._noted)]
        try:
            await asyncio.wait((starting, *ends), return_when=asyncio.FIRST_COMPLETED)
            if self.error is not None and not starting.done():
                # The start may know better why: what it waits for fails as well.
                await asyncio.wait((starting, ends[0]), timeout=BLAME_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
            if self.error is not None and not (starting.done() or stopping.is_set()):
                raise self.error
            if ends[1].done() and self.error is None:  # forgiven
                await asyncio.wait((starting, ends[0]), return_when=asyncio.FIRST_COMPLETED)
            return starting.result() if starting.done() and not stopping.is_set() else None
        except NodeError as error:
            if self.error is not None and self.error.node in set(peers) - {error.node}:
                raise self.error from error  # memory nodes refuse what is left of a tenant when its front is gone
            raise
        finally:
            for task in (starting, *ends):
                task.cancel()


async def run_part(
    part: Part, running: asyncio.Future[None], stopping: asyncio.Event, superseded: asyncio.Future[None]
) -> None:
    """Wait until ``running``, which runs a part, is over, or has drained after ``stopping`` was set. Raises the errors
    of both futures."""
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((running, stop, superseded), return_when=asyncio.FIRST_COMPLETED)
        if superseded.done():
            superseded.result()
        if not running.done():
            drained = asyncio.ensure_future(part.drain())
            await asyncio.wait((running, drained), timeout=DRAIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done() and not running.done():
                log.warning("event=drain_timeout")
            drained.cancel()
    finally:
        stop.cancel()
        if not running.done():
            running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def unless(stopping: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what a coroutine returns; None, and it is cancelled, if ``stopping`` is set before."""
    working, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((working, stop), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait((working,))
        return None
    finally:
        stop.cancel()
        working.cancel()
