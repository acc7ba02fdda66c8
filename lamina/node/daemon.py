"""Run a daemon: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from lamina import log as logs
from lamina.errors import LaminaError, NodeError
from lamina.runtime.loop import PreciseLoop

log = logging.getLogger("lamina.node")

DRAIN_TIMEOUT_S = 30.0
"""The seconds that a node may take to finish its work when it is told to stop."""


Serve = Callable[[asyncio.Event], Awaitable[None]]


def run(name: str, make: Callable[[], Serve], log_format: logs.Format = "logfmt") -> int:
    """Run what ``make`` returns until it ends, and return the exit status of the process.

    The first SIGTERM or SIGINT sets the event that it was given, after which it should drain. A second one cancels it.
    An error, also one of ``make``, is the last event of the log, and is reported to the process that started this one.
    """
    logs.configure(name, format_=log_format)
    try:
        serve = make()
        with asyncio.Runner(loop_factory=PreciseLoop) as runner:
            runner.run(_main(serve))
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


async def _main(serve: Serve) -> None:
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
    await task
