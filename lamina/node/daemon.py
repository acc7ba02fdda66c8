"""Run a daemon: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from lamina import log as logs
from lamina.errors import LaminaError, NodeError
from lamina.runtime.loop import PreciseLoop

log = logging.getLogger("lamina.node")

DRAIN_TIMEOUT_S = 30.0
"""The seconds that a node may take to finish its work when it is told to stop."""


Serve = Callable[[asyncio.Event], Awaitable[None]]


class Daemon(NamedTuple):
    """Holds what a process runs, and what it does at SIGHUP: nothing of its own if ``reload`` is None."""

    serve: Serve
    reload: Callable[[], None] | None = None


def run(name: str, make: Callable[[], Daemon], log_format: logs.Format = "logfmt") -> int:
    """Run what ``make`` returns until it ends, and return the exit status of the process.

    The first SIGTERM or SIGINT sets the event that it was given, after which it should drain. A second one cancels it.
    SIGHUP is for ``reload``, unless it says that the terminal of the process is gone, which ends it as SIGTERM does.
    An error, also one of ``make``, is the last event of the log, and is reported to the process that started this one.
    """
    logs.configure(name, format_=log_format)
    try:
        daemon = make()
        with asyncio.Runner(loop_factory=PreciseLoop) as runner:
            runner.run(_main(daemon))
    except asyncio.CancelledError:
        log.warning("event=stopped reason='second signal'")
        return 1
    except LaminaError as e:
        log.error("event=failed kind=%s reason=%r", type(e).__name__, str(e), extra={"failure": e})
        return e.exit_status
    except Exception as e:
        log.exception("event=internal_error", extra={"failure": NodeError(f"internal error: {e!r}", node=name)})
        return 1
    log.info("event=stopped")
    return 0


async def _main(daemon: Daemon) -> None:
    stopping = asyncio.Event()
    task = asyncio.ensure_future(daemon.serve(stopping))

    def stop() -> None:
        if stopping.is_set():
            task.cancel()
        log.info("event=%s", "stopping" if not stopping.is_set() else "stopping_now")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if (reload := daemon.reload) is not None:
        has_terminal = _has_terminal()
        loop.add_signal_handler(signal.SIGHUP, lambda: stop() if has_terminal and not _has_terminal() else reload())
    await task


def _has_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
