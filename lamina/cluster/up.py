"""``lamina up``: all nodes of a cluster file on this machine, until Ctrl-C or until a node dies again and again.

The first Ctrl-C lets the nodes finish their answers; the second one stops them at once.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import hashlib
import logging
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

from lamina import log as logs
from lamina.cluster.local import Cluster
from lamina.cluster.screen import Screen
from lamina.config import ClusterConfig

log = logging.getLogger("lamina.up")


def run(config: ClusterConfig, *, restart: bool, verbose: bool, log_format: logs.Format) -> int:
    """Start the nodes, show their states, and stop them. Return the exit status. NodeError names a node that died.

    With ``restart`` nodes that die are started again, as `Cluster` says. Logs go into a folder of the user, or to
    standard error if ``verbose``.
    """
    os.environ[logs.FORMAT_VARIABLE] = log_format  # the nodes get it as well
    return int(uvloop.run(_main(config, restart=restart, verbose=verbose, log_format=log_format)))


async def _main(config: ClusterConfig, *, restart: bool, verbose: bool, log_format: logs.Format) -> int:
    asked, asked_again = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        (asked_again if asked.is_set() else asked).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)

    screen = Screen(config)
    ready = False

    def on_change(name: str) -> None:
        nonlocal ready
        screen.show(name, cluster.states)
        if cluster.is_ready and not ready:
            ready = True
            screen.say(f'ready; next: lamina generate {config.file} "Once upon a time" (Ctrl-C here stops the nodes)')

    folder = None if verbose else log_folder(config.file)
    cluster = Cluster(config, log_folder=folder, on_change=on_change, restart=restart, on_news=screen.say)
    async with cluster:
        # Not before: a cluster of this file that runs already has its logs there.
        logs.configure("up", folder and folder / "up.log", log_format)
        if folder:
            screen.say(f"logs: {folder}")
        stopped = asyncio.ensure_future(asked.wait())
        ends: list[asyncio.Future[Any]] = [stopped, cluster.failed]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        log.info("event=stopping reason=%s", "asked" if stopped.done() else "failure")
        if stopped.done():
            screen.say("stopping; Ctrl-C again does not wait for answers")
            await _drain(cluster, asked_again)
        else:
            stopped.cancel()
            await cluster.stop(drain=False)
        if cluster.failed.done():
            cluster.failed.result()
    screen.say("all nodes stopped")
    return 0


def log_folder(path: Path) -> Path:
    """Return the folder of logs for a cluster file or a checkpoint, which only the user can read; it is made if it is
    missing. It is this process's until its end; while another one writes its logs there, there is a second folder."""
    file = path.resolve()
    name = f"{file.stem}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        folder, number = state / "lamina" / name, 1
        while not _takes(folder):
            number += 1
            folder = state / "lamina" / f"{name}-{number}"
    except (OSError, RuntimeError):  # a user without a home that can be written
        folder = Path(tempfile.mkdtemp(prefix="lamina-"))
        atexit.register(_remove_if_empty, folder)
    return folder


def _takes(folder: Path) -> bool:
    """Make a folder and take it until the end of this process, if no other process has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder of logs in which there are none, as no node was started."""
    with suppress(OSError):
        folder.rmdir()


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
