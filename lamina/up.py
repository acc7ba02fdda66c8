"""``lamina up``: all nodes of a cluster file on this machine, until Ctrl-C or until one of them dies."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

import uvloop

from lamina import log as logs
from lamina.cluster import Cluster
from lamina.config import ClusterConfig

log = logging.getLogger("lamina.up")


def run(config: ClusterConfig) -> int:
    """Start, show states, stop; the exit status of the command. NodeError names the node that ended it."""
    logs.configure("up")
    return int(uvloop.run(_main(config)))


async def _main(config: ClusterConfig) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def show() -> None:
        sys.stdout.write(" · ".join(f"{n.name} ({n.role}) {cluster.states[n.name]}" for n in config.node) + "\n")
        sys.stdout.flush()

    cluster = Cluster(config, on_change=show)
    async with cluster:
        stopped = asyncio.ensure_future(stop.wait())
        ends: list[asyncio.Future[Any]] = [stopped, cluster.failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        log.info("event=stopping reason=%s", "asked" if stopped.done() else "failure")
        await cluster.stop(drain=stopped.done())
        stopped.cancel()
        if cluster.failed.done():
            cluster.failed.result()
    sys.stdout.write("all nodes stopped\n")
    return 0
