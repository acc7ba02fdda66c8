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
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    write_cluster,
)
from lamina.errors import ConnectError, HandshakeError, LaminaError, NodeError, PeerLostError, PeerSilentError
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

    Entering it raises the LaminaError that the nodes would end with, where that is known before they are started.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        log_file: IO[bytes] | None = None,
        log_folder: Path | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._log_file = log_file
        self._log_folder = log_folder
        self._on_change = on_change or (lambda name: None)
        self._children: dict[str, Child] = {}
        self._monitors: dict[str, AdminClient] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._symptoms: list[_Symptom] = []
        self._explained: set[str] = set()
        """The nodes that have said themselves why they end."""
        self._pauses = 0
        """How often this process was suspended."""
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
                self._tasks.append(asyncio.create_task(self._watch_process(node)))
                self._tasks.append(asyncio.create_task(self._watch_state(node)))
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
        """End all processes, compute nodes first; with ``drain`` they finish their requests before."""
        self._stopping = True
        patience = DRAIN_TIMEOUT_S if drain else 0.0
        for role in ("compute", "memory"):
            names = [n.name for n in self._config.node if n.role == role and n.name in self._children]
            await asyncio.gather(*(self._children[name].end(patience + KILL_AFTER_S) for name in names))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
                log_file = stack.enter_context((self._log_folder / f"{node.name}.log").open("wb"))
            return await Child.start(
                self.command(node), threads=share, log_file=log_file, on_report=partial(self._take_report, node.name)
            )

    # -- what happens to nodes

    async def _watch_process(self, node: NodeConfig) -> None:
        status = await self._children[node.name].wait()
        if node.name in self._explained:
            return
        if status < 0:
            how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
            if status == -signal.SIGKILL:
                how += ", perhaps because the machine ran out of memory"
        else:
            how = f"ended with status {status}"
        self._set(node.name, how)
        self._suffer(_Rank.OWN if status < 0 else _Rank.WORDLESS, node.name, f"node {node.name} {how}")

    async def _watch_state(self, node: NodeConfig) -> None:
        """Ask for the state of a node until it is lost.

        A node gives up a link whose other end is silent. That is no failure of the node if this process was suspended.
        """
        deadline_s = self._config.transport.start_timeout
        while True:
            pauses = self._pauses
            try:
                monitor = self._monitors[node.name] = await AdminClient.connect(
                    node.address, self._config.options(), name="up", deadline_s=deadline_s
                )
                while True:
                    status = await monitor.status()
                    pauses = self._pauses
                    if status.pid == self._children[node.name].process.pid:  # else another process has the port
                        self._take(status, node.name)
                    await asyncio.sleep(ASK_EVERY_S)
            except LaminaError as e:
                # The end of a process says more than its broken link, and whether there was a pause is known soon.
                closed = isinstance(e, PeerLostError) and not isinstance(e, PeerSilentError)
                ended = await self._ends_within(node, KILL_AFTER_S if closed and self._pauses == pauses else PAUSE_S)
                if ended:
                    return
                if self._pauses != pauses:
                    deadline_s = RECONNECT_S if node.name in self._monitors else deadline_s
                    continue
                how = "does not answer" if isinstance(e, ConnectError | HandshakeError) else "was lost"
                self._set(node.name, "lost")
                self._suffer(_Rank.OWN, node.name, f"node {node.name} {how}: {e}")
                return

    async def _ends_within(self, node: NodeConfig, seconds: float) -> bool:
        """Whether the process of a node ends so soon, which `_watch_process` explains; or a pause shows."""
        deadline, pauses = asyncio.get_running_loop().time() + seconds, self._pauses
        while self._children[node.name].process.returncode is None:
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
        state = self._progress[name] if status.state == "starting" else status.state
        self._set(name, f"waiting for {status.waiting_for}" if status.waiting_for else state)

    def _take_report(self, name: str, report: NodeReport) -> None:
        if report.failure:
            self._explained.add(name)
            self._set(name, "failed")
            self._suffer(_Rank.BLAMING if report.blamed else _Rank.OWN, name, f"node {name}: {report.failure}")
        elif self.states[name] != "ready":
            self._progress[name] = report.progress
            self._set(name, report.progress)

    def _set(self, name: str, state: str) -> None:
        if self.states[name] != state and not self._stopping:
            self.states[name] = state
            self._on_change(name)

    def _suffer(self, rank: _Rank, name: str, sentence: str) -> None:
        """Take a symptom of a failure, which ends the cluster when its cause has had time to show."""
        loop = asyncio.get_running_loop()
        self._symptoms.append(_Symptom(rank, loop.time(), NodeError(sentence, node=name)))
        # Silence is looked at four times in peer_timeout, so this process may notice it later than a node did.
        consequence_s = BLAME_AFTER_S + self._config.transport.peer_timeout / 2
        loop.call_later(SETTLE_S if rank is _Rank.OWN else consequence_s, self._fail)

    def _fail(self) -> None:
        if not self.failed.done() and not self._stopping:
            self.failed.set_exception(min(self._symptoms).error)
            self.failed.exception()  # mark the error as seen, as no task may be waiting for it
