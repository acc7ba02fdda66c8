"""Run a daemon: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from lamina import log as logs
from lamina.errors import LaminaError
from lamina.runtime.loop import PreciseLoop

log = logging.getLogger("lamina.node")

DRAIN_TIMEOUT_S = 30.0
"""The seconds that a node may take to finish its work when it is told to stop."""


def run(name: str, serve: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run ``serve`` until it returns, and return the exit status of the process.

    The first SIGTERM or SIGINT sets the event that ``serve`` was given, which should then drain. A second one cancels
    it.
    """
    logs.configure(name)
    try:
        with asyncio.Runner(loop_factory=PreciseLoop) as runner:
            return runner.run(_main(serve))
    except asyncio.CancelledError:
        log.warning("event=stopped reason='second signal'")
        return 1


async def _main(serve: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    stopping = asyncio.Event()
    task = asyncio.ensure_future(serve(stopping))

    def stop() -> None:
        if stopping.is_set():
            task.cancel()
        log.info("event=%s", "stopping" if not stopping.is_set() else "stopping_now")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except LaminaError as e:
        log.error("event=failed kind=%s reason=%r", type(e).__name__, str(e))
        return e.exit_status
    except Exception:
        log.exception("event=internal_error")
        return 1
    log.info("event=stopped")
    return 0
