"""All nodes of a cluster file as processes of this machine, watched and stopped together."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from lamina.admin import AdminClient
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    write_cluster,
)
from lamina.errors import ConnectError, LaminaError, NodeError
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.transport import Address
from lamina.wire.admin import Status

log = logging.getLogger("lamina.cluster")

ASK_EVERY_S = 0.25
BLAME_AFTER_S = 1.0
"""How long the exit of a node waits for a better explanation, such as another node that was killed or fell silent."""
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


class Cluster:
    """The processes of a cluster, as a context manager that ends all of them.

    Nodes without ``threads`` in the file get an equal share of this machine's cores. ``log_file`` receives the logs of
    the nodes, by default this process's standard error. ``on_change`` is called after a node's state has changed.
    ``failed`` gets a NodeError when a node dies or falls silent.
    """

    def __init__(
        self, config: ClusterConfig, *, log_file: IO[bytes] | None = None, on_change: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._log_file = log_file
        self._on_change = on_change or (lambda: None)
        self._processes: dict[str, Process] = {}
        self._monitors: dict[str, AdminClient] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.states: dict[str, str] = {n.name: "starting" for n in config.node}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Cluster:
        try:
            for node in self._config.node:
                self._processes[node.name] = await self._spawn(node)
                self._tasks.append(asyncio.create_task(self._watch_process(node)))
                self._tasks.append(asyncio.create_task(self._watch_state(node)))
        except BaseException:
            await self.stop(drain=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(drain=False)

    async def ready(self) -> None:
        """Wait until every node is ready, within the nodes' own deadlines. NodeError if a node fails first."""
        while any(state != "ready" for state in self.states.values()):
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
            chosen = [
                self._processes[n.name] for n in self._config.node if n.role == role and n.name in self._processes
            ]
            await asyncio.gather(*(_end(process, patience + KILL_AFTER_S) for process in chosen))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for monitor in self._monitors.values():
            monitor.abort("the cluster is stopped")

    def command(self, node: NodeConfig) -> list[str]:
        """Return the arguments with which this Python runs ``node``."""
        return ["-m", "lamina", "node", "--role", node.role, "--config", str(self._config.file), "--name", node.name]

    async def _spawn(self, node: NodeConfig) -> Process:
        # Nodes on one machine share its cores; with all cores each, their threads would wait for each other.
        share = max(1, len(os.sched_getaffinity(0)) // len(self._config.node))
        environment = {"OMP_NUM_THREADS": str(share), **os.environ}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *self.command(node),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=self._log_file,
            env=environment,
            # In a session of its own the node does not get Ctrl-C of the terminal, so that nodes stop in order.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    async def _watch_process(self, node: NodeConfig) -> None:
        status = await self._processes[node.name].wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._set(node.name, how)
        if status > 0:
            # It may have ended because another node is silent, which this process notices no sooner than the node.
            await asyncio.sleep(BLAME_AFTER_S)
        self._fail(NodeError(f"node {node.name} {how}", node=node.name))

    async def _watch_state(self, node: NodeConfig) -> None:
        deadline_s = self._config.transport.start_timeout
        try:
            monitor = self._monitors[node.name] = await AdminClient.connect(
                node.address, self._config.options(), name="up", deadline_s=deadline_s
            )
            while True:
                status = await monitor.status()
                self._set(node.name, f"{status.state} for {status.waiting_for}" if status.waiting_for else status.state)
                await asyncio.sleep(ASK_EVERY_S)
        except ConnectError as e:
            self._fail(NodeError(f"node {node.name} does not answer: {e}", node=node.name))
        except LaminaError as e:
            # The exit status of a process says more than its broken link, so wait for it.
            await asyncio.sleep(ASK_EVERY_S)
            self._set(node.name, "lost")
            self._fail(NodeError(f"node {node.name} was lost: {e}", node=node.name))

    def _set(self, name: str, state: str) -> None:
        if self.states[name] != state and not self._stopping:
            self.states[name] = state
            self._on_change()

    def _fail(self, error: NodeError) -> None:
        if not self.failed.done() and not self._stopping:
            self.failed.set_exception(error)
            self.failed.exception()  # mark the error as seen, as no task may be waiting for it


async def _end(process: Process, patience_s: float) -> None:
    """Ask a process to stop, and kill it if it has not stopped within ``patience_s``."""
    for number in (signal.SIGTERM, signal.SIGCONT):  # a suspended process gets the first signal after the second
        if process.returncode is None:
            process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), patience_s)
    except TimeoutError:
        log.warning("event=killed pid=%d", process.pid)
        if process.returncode is None:
            process.kill()
        await process.wait()


def _die_with_parent() -> None:
    """Make the kernel stop this child process when its parent dies (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
