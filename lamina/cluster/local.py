"""All nodes of a cluster file as processes of this machine, watched and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import IO

from lamina.admin import AdminClient
from lamina.cluster import preflight
from lamina.cluster.child import Child
from lamina.cluster.restarts import LIMIT, WITHIN_S, Restarts
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    write_cluster,
)
from lamina.errors import (
    ConnectError,
    HandshakeError,
    LaminaError,
    NodeError,
    PeerLostError,
    PeerSilentError,
    UsageError,
)
from lamina.log import NodeReport
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.transport import Address
from lamina.wire.admin import Status

log = logging.getLogger("lamina.cluster")

ASK_EVERY_S = 0.25
SETTLE_S = 0.1
"""How long the cause of a failure waits for one that came earlier."""
BLAME_AFTER_S = 1.0
"""How long what may be a consequence of another failure waits for that, such as for a node that fell silent."""
RECONNECT_S = 10.0
"""How long a node may take to answer again after this process was suspended."""
PAUSE_S = 0.75
"""This process was suspended, or had no processor, if its timers are later than that."""
KILL_AFTER_S = 5.0
"""How long a process may take to end after it has drained, or if it need not drain."""
TOLD_TO_STOP = (0, -signal.SIGTERM, -signal.SIGINT)
"""The exit statuses of a node that was told to stop; a signal kills it only at the very beginning of its start."""


def local_config(
    folder: Path, model: Path, *, memory_nodes: int, dtype: Dtype, memory: int, compiled: bool = True
) -> ClusterConfig:
    """Write ``folder``/cluster.toml: one compute node and ``memory_nodes`` memory nodes on free ports of this machine.

    Each memory node has ``memory`` bytes of KV cache. Each node computes with one thread, as the nodes share the
    machine's cores.
    """
    front, *others = free_addresses(1 + memory_nodes)
    return write_cluster(
        folder / "cluster.toml",
        ModelConfig(path=str(model.resolve()), dtype=dtype, compile=compiled),
        [
            ComputeNodeConfig(name="c0", address=front, threads=1),
            *(MemoryNodeConfig(name=f"m{i}", address=a, threads=1, memory=memory) for i, a in enumerate(others)),
        ],
    )


def free_addresses(count: int) -> list[Address]:
    """Return loopback addresses of this machine, with ports on which no process listens."""
    return [Address("tcp", "127.0.0.1", port) for port in free_ports(count)]


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address on which no process listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


class _Rank(IntEnum):
    """How near to the cause of a failure a symptom is; the nearest is told."""

    OWN = 0
    """A node says what went wrong with it, was killed, or fell silent."""
    WORDLESS = 1
    """A node ended and did not say why."""
    BLAMING = 2
    """A node ended because of another one."""


@dataclass(order=True)
class _Symptom:
    """One sign that the cluster has failed; symptoms are in the order in which they explain the failure."""

    rank: _Rank
    at_s: float
    error: NodeError = field(compare=False)


class Cluster:
    """The processes of a cluster, as a context manager that ends all of them.

    Nodes without ``threads`` in the file get an equal share of this machine's cores. In ``log_folder`` each node has a
    log; else all logs go to ``log_file``, by default this process's standard error. ``on_change`` is called with the
    name of a node after its state has changed. ``failed`` gets a NodeError when a node dies or falls silent, with the
    node's own words where it had any.

    With ``restart``, a node that dies or falls silent is started again instead, as often as `Restarts` allows, once all
    nodes were ready; ``on_news`` gets the sentences that say so. A node that was told to stop, or that finds the
    cluster file wrong, is not started again.

    Entering it raises the LaminaError that the nodes would end with, where that is known before they are started.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        log_file: IO[bytes] | None = None,
        log_folder: Path | None = None,
        on_change: Callable[[str], None] | None = None,
        restart: bool = False,
        on_news: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._log_file = log_file
        self._log_folder = log_folder
        self._on_change = on_change or (lambda name: None)
        self._restart = restart
        self._on_news = on_news or (lambda sentence: None)
        self._children: dict[str, Child] = {}
        self._monitors: dict[str, AdminClient] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._symptoms: dict[str, _Symptom] = {}
        """The last failure of each node since all nodes were ready."""
        self._failing: set[str] = set()
        """The nodes of which it is known why they end."""
        self._back: set[str] = set()
        """The nodes that were started again and are not ready yet."""
        self._pauses = 0
        """How often this process was suspended."""
        self._was_ready = False
        self._stopping = False
        self.states: dict[str, str] = {n.name: "starting" for n in config.node}
        self._progress = dict(self.states)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Cluster:
        preflight.check(self._config)
        try:
            self._tasks.append(asyncio.create_task(self._count_pauses()))
            for node in self._config.node:
                self._children[node.name] = await self._start(node)
                self._tasks.append(asyncio.create_task(self._keep(node)))
        except BaseException:
            await self.stop(drain=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(drain=False)

    @property
    def is_ready(self) -> bool:
        """Whether all nodes are ready."""
        return all(state == "ready" for state in self.states.values())

    async def ready(self) -> None:
        """Wait until every node is ready, within the nodes' own deadlines. NodeError if a node fails first."""
        while not self.is_ready:
            done, _ = await asyncio.wait({self.failed}, timeout=ASK_EVERY_S / 4)
            if done:
                self.failed.result()

    async def statuses(self) -> dict[str, Status]:
        """Ask all nodes for their status, and return the answers by name."""
        return {name: await monitor.status() for name, monitor in self._monitors.items()}

    async def stop(self, *, drain: bool) -> None:
        """End all processes, compute nodes first; with ``drain`` they finish their requests before, if no node is
        missing."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        missing = any(child.process.returncode is not None for child in self._children.values())
        patience = DRAIN_TIMEOUT_S if drain and not missing else 0.0
        for role in ("compute", "memory"):
            names = [n.name for n in self._config.node if n.role == role and n.name in self._children]
            await asyncio.gather(*(self._children[name].end(patience + KILL_AFTER_S) for name in names))
        for monitor in self._monitors.values():
            monitor.abort("the cluster is stopped")
        for child in self._children.values():
            child.close()

    def command(self, node: NodeConfig) -> list[str]:
        """Return the arguments with which this Python runs ``node``."""
        return ["-m", "lamina", "node", str(self._config.file), "--name", node.name]

    async def _start(self, node: NodeConfig) -> Child:
        # Nodes on one machine share its cores; with all cores each, their threads would wait for each other.
        share = max(1, len(os.sched_getaffinity(0)) // len(self._config.node))

        with ExitStack() as stack:
            log_file = self._log_file
            if self._log_folder:
                # What a node that died has logged last is needed most.
                mode = "ab" if node.name in self._children else "wb"
                log_file = stack.enter_context((self._log_folder / f"{node.name}.log").open(mode))
            return await Child.start(
                self.command(node), threads=share, log_file=log_file, on_report=partial(self._take_report, node.name)
            )

    # -- what happens to nodes

    async def _keep(self, node: NodeConfig) -> None:
        """Start a node again each time that it has ended, as long as that is allowed; then let the cluster fail."""
        restarts = Restarts()
        died = await self._end_of(node)
        while died and self._restart and self._was_ready and (delay_s := self._delay(node, restarts)) is not None:
            self._set(node.name, f"starts again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            self._failing.discard(node.name)
            self._back.add(node.name)
            self._progress[node.name] = "starting"
            self._set(node.name, "starting")
            try:
                self._children[node.name] = await self._start(node)
            except OSError as e:
                self._note(_Rank.OWN, node.name, "lost", f"node {node.name} cannot be started: {e}")
            else:
                died = await self._end_of(node)
        symptom = self._symptoms[node.name]
        # Silence is looked at four times in peer_timeout, so this process may notice it later than a node did.
        consequence_s = BLAME_AFTER_S + self._config.transport.peer_timeout / 2
        await asyncio.sleep(SETTLE_S if symptom.rank is _Rank.OWN else consequence_s)
        self._fail()

    def _delay(self, node: NodeConfig, restarts: Restarts) -> float | None:
        """Say that a node is started again, and return after how many seconds; or say that it is not, None."""
        reason = str(self._symptoms[node.name].error)
        delay_s = restarts.next_s(asyncio.get_running_loop().time())
        if delay_s is None:
            log.error("event=restart_limit member=%s restarts=%d reason=%r", node.name, LIMIT, reason)
            self._on_news(
                f"{node.role} {reason}; it was started again {LIMIT} times within {WITHIN_S / 60:g} minutes, "
                "so the cluster ends"
            )
            return None
        count = restarts.count
        log.warning(
            "event=restarting member=%s restart=%d limit=%d delay_s=%g reason=%r",
            node.name, count, LIMIT, delay_s, reason,
        )  # fmt: skip
        self._on_news(f"{node.role} {reason}; starting it again ({count} of {LIMIT})")
        return delay_s

    async def _end_of(self, node: NodeConfig) -> bool:
        """Wait until a node has ended, which one that is lost is made to do.

        Return False if it was told to stop, or said that the cluster file or the command line is wrong.
        """
        child = self._children[node.name]
        lost = asyncio.ensure_future(self._watch_state(node, child))
        ended = asyncio.ensure_future(child.wait())
        try:
            await asyncio.wait((lost, ended), return_when=asyncio.FIRST_COMPLETED)
            is_lost = not ended.done()
            if is_lost:
                await child.end(0.0)
            status = await ended
        finally:
            for task in (lost, ended):
                task.cancel()
        told_to_stop = status in TOLD_TO_STOP and node.name not in self._failing
        if status < 0:
            how, why = f"was killed by signal {-status}", f" ({signal.strsignal(-status)})"
            if status == -signal.SIGKILL:
                why += ", perhaps because the machine ran out of memory"
        else:
            how, why = f"ended with status {status}", ", as it was told to stop" if status == 0 else ""
        self._note(_Rank.OWN if status < 0 else _Rank.WORDLESS, node.name, how, f"node {node.name} {how}{why}")
        return is_lost or not (told_to_stop or status == UsageError.exit_status)

    async def _watch_state(self, node: NodeConfig, child: Child) -> None:
        """Ask for the state of a node until it is lost.

        A node gives up a link whose other end is silent. That is no failure of the node if this process was suspended.
        """
        deadline_s = self._config.transport.start_timeout
        connected = False
        while True:
            pauses = self._pauses
            try:
                monitor = self._monitors[node.name] = await AdminClient.connect(
                    node.address, self._config.options(), name="up", deadline_s=deadline_s
                )
                connected = True
                while True:
                    status = await monitor.status()
                    pauses = self._pauses
                    if status.pid == child.process.pid:  # else another process has the port
                        self._take(status, node.name)
                    await asyncio.sleep(ASK_EVERY_S)
            except LaminaError as e:
                # The end of a process says more than its broken link, and whether there was a pause is known soon.
                closed = isinstance(e, PeerLostError) and not isinstance(e, PeerSilentError)
                if await self._ends_within(child, KILL_AFTER_S if closed and self._pauses == pauses else PAUSE_S):
                    return
                if self._pauses != pauses:
                    deadline_s = RECONNECT_S if connected else deadline_s
                    continue
                how = "does not answer" if isinstance(e, ConnectError | HandshakeError) else "was lost"
                self._note(_Rank.OWN, node.name, "lost", f"node {node.name} {how}: {e}")
                return

    async def _ends_within(self, child: Child, seconds: float) -> bool:
        """Whether the process of a node ends so soon, which `_end_of` explains; or a pause shows."""
        deadline, pauses = asyncio.get_running_loop().time() + seconds, self._pauses
        while child.process.returncode is None:
            if asyncio.get_running_loop().time() > deadline or self._pauses != pauses:
                return False
            await asyncio.sleep(ASK_EVERY_S)
        return True

    async def _count_pauses(self) -> None:
        """Notice when this process goes on after it was suspended, as by Ctrl-Z."""
        now = asyncio.get_running_loop().time
        while True:
            before = now()
            await asyncio.sleep(ASK_EVERY_S)
            self._pauses += now() - before > ASK_EVERY_S + PAUSE_S

    def _take(self, status: Status, name: str) -> None:
        """Take over the state that a node tells; how far its start is, it has reported before."""
        if name in self._failing:
            return
        state = self._progress[name] if status.state == "starting" else status.state
        self._set(name, f"waiting for {status.waiting_for}" if status.waiting_for else state)

    def _take_report(self, name: str, report: NodeReport) -> None:
        if report.failure:
            rank = _Rank.BLAMING if report.blamed else _Rank.OWN
            self._note(rank, name, "failed", f"node {name}: {report.failure}")
        elif self.states[name] != "ready":
            self._progress[name] = report.progress
            self._set(name, report.progress)

    def _set(self, name: str, state: str) -> None:
        if self.states[name] == state or self._stopping:
            return
        self.states[name] = state
        self._on_change(name)
        if state == "ready" and name in self._back:
            self._back.discard(name)
            log.info("event=ready_again member=%s", name)
            self._on_news(f"{self._config.find(name).role} node {name} is ready again")
        if self.is_ready:
            self._was_ready = True
            self._symptoms.clear()

    def _note(self, rank: _Rank, name: str, state: str, sentence: str) -> None:
        """Take the first sign that a node has failed. What comes later, such as the end of its process, says less."""
        if name not in self._failing:
            self._failing.add(name)
            self._symptoms[name] = _Symptom(rank, asyncio.get_running_loop().time(), NodeError(sentence, node=name))
            self._set(name, state)

    def _fail(self) -> None:
        """End the cluster with the cause of what has happened to its nodes."""
        if not self.failed.done() and not self._stopping:
            self.failed.set_exception(min(self._symptoms.values()).error)
            self.failed.exception()  # mark the error as seen, as no task may be waiting for it
