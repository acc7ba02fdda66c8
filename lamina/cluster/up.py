"""``lamina up``: all nodes of a cluster file on this machine, until Ctrl-C or until a node dies.

The first Ctrl-C lets the nodes finish their answers; the second one stops them at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

import uvloop

from lamina import log as logs
from lamina.cluster.local import Cluster
from lamina.config import ClusterConfig

log = logging.getLogger("lamina.up")


def run(config: ClusterConfig) -> int:
    """Start the nodes, show their states, and stop them. Return the exit status. NodeError names a node that died."""
    logs.configure("up")
    return int(uvloop.run(_main(config)))


async def _main(config: ClusterConfig) -> int:
    asked, asked_again = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        (asked_again if asked.is_set() else asked).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)

    def show() -> None:
        sys.stdout.write(" · ".join(f"{n.name} ({n.role}) {cluster.states[n.name]}" for n in config.node) + "\n")
        sys.stdout.flush()

    cluster = Cluster(config, on_change=show)
    async with cluster:
        stopped = asyncio.ensure_future(asked.wait())
        ends: list[asyncio.Future[Any]] = [stopped, cluster.failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        log.info("event=stopping reason=%s", "asked" if stopped.done() else "failure")
        if stopped.done():
            await _drain(cluster, asked_again)
        else:
            stopped.cancel()
            await cluster.stop(drain=False)
        if cluster.failed.done():
            cluster.failed.result()
    sys.stdout.write("all nodes stopped\n")
    return 0


async def _drain(cluster: Cluster, at_once: asyncio.Event) -> None:
    """Stop the cluster after its last answer, or as soon as ``at_once`` is set."""
    draining = asyncio.ensure_future(cluster.stop(drain=True))
    impatient = asyncio.ensure_future(at_once.wait())
    await asyncio.wait([draining, impatient], return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if draining.done():
        draining.result()
        return
    log.info("event=stopping_now")
    draining.cancel()
    await asyncio.wait([draining])
    await cluster.stop(drain=False)
