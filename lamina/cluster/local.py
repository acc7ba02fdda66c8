"""All nodes of a cluster file as processes of this machine, watched and stopped together."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from lamina.config import ClusterConfig, NodeConfig, load
from lamina.errors import ConnectError, LaminaError, NodeError, TransportError
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.transport import Hello, Link, connect
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import decode, encode

log = logging.getLogger("lamina.cluster")

ASK_EVERY_S = 0.25
BLAME_AFTER_S = 1.0
"""How long a node that has failed by itself must wait for a better explanation: one that was killed or fell silent."""
KILL_AFTER_S = 5.0
"""How long a process may take to end once it has drained, or once it need not."""


def local_config(
    folder: Path, model: Path, *, memory_nodes: int, dtype: str, memory: str, compiled: bool = True
) -> ClusterConfig:
    """Write ``folder``/cluster.toml: one compute node and ``memory_nodes`` memory nodes on free ports of this machine.

    Each node computes with one thread, as they share the machine's cores.
    """
    front, *ports = free_ports(1 + memory_nodes)
    address = "tcp://127.0.0.1:{}".format
    lines = [
        "[model]",
        f"path = {json.dumps(str(model.resolve()))}",
        f'dtype = "{dtype}"',
        f"compile = {json.dumps(compiled)}",
    ]
    lines += ["[[node]]", 'name = "c0"', 'role = "compute"', f'address = "{address(front)}"', "threads = 1"]
    for i, port in enumerate(ports):
        lines += ["[[node]]", f'name = "m{i}"', 'role = "memory"', f'address = "{address(port)}"', "threads = 1"]
        lines.append(f'memory = "{memory}"')
    file = folder / "cluster.toml"
    file.write_text("\n".join(lines) + "\n")
    return load(file)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


class Cluster:
    """The processes of a cluster, as a context manager: leaving it leaves none behind.

    Nodes whose file does not say how many ``threads`` they use get an equal share of this machine's cores.
    ``log_file`` takes the nodes' logs, by default this process's standard error. ``on_change`` is called whenever a
    node's state has changed. ``failed`` gets a NodeError when a node dies or falls silent.
    """

    def __init__(
        self, config: ClusterConfig, *, log_file: IO[bytes] | None = None, on_change: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._log_file = log_file
        self._on_change = on_change or (lambda: None)
        self._processes: dict[str, Process] = {}
        self._monitors: dict[str, _Monitor] = {}
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
        """Wait until every node is ready. NodeError if one fails first; bounded by the nodes' own deadlines."""
        while any(state != "ready" for state in self.states.values()):
            done, _ = await asyncio.wait({self.failed}, timeout=ASK_EVERY_S / 4)
            if done:
                self.failed.result()

    async def statuses(self) -> dict[str, Status]:
        """What every node says of itself now, by name."""
        return {name: await monitor.ask() for name, monitor in self._monitors.items()}

    async def stop(self, *, drain: bool) -> None:
        """End all processes: compute nodes first, and with ``drain`` after they have answered what they were asked."""
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
            monitor.link.abort("the cluster is stopped")

    def command(self, node: NodeConfig) -> list[str]:
        """The arguments that make this Python run ``node``."""
        return ["-m", "lamina", "node", "--role", node.role, "--config", str(self._config.file), "--name", node.name]

    async def _spawn(self, node: NodeConfig) -> Process:
        # Nodes that share a machine share its cores: given all of them each, their threads wait for each other.
        share = max(1, len(os.sched_getaffinity(0)) // len(self._config.node))
        environment = {"OMP_NUM_THREADS": str(share), **os.environ}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *self.command(node),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=self._log_file,
            env=environment,
            # A session of its own keeps Ctrl-C of the terminal from it: it is stopped in order, not all at once.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    async def _watch_process(self, node: NodeConfig) -> None:
        status = await self._processes[node.name].wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._set(node.name, how)
        if status > 0:
            # It may have ended because another one is silent, which is found here as fast as there, but not faster.
            await asyncio.sleep(BLAME_AFTER_S)
        self._fail(NodeError(f"node {node.name} {how}", node=node.name))

    async def _watch_state(self, node: NodeConfig) -> None:
        hello = Hello("monitor", "up")
        deadline_s = self._config.transport.start_timeout
        try:
            link = await connect(node.listen, hello, self._config.options(), deadline_s=deadline_s)
            monitor = self._monitors[node.name] = _Monitor(link)
            while True:
                status = await monitor.ask()
                self._set(node.name, f"{status.state} for {status.waiting_for}" if status.waiting_for else status.state)
                await asyncio.sleep(ASK_EVERY_S)
        except ConnectError as e:
            self._fail(NodeError(f"node {node.name} does not answer: {e}", node=node.name))
        except LaminaError as e:
            # A process that has ended says more than its broken link: give its exit status time to come.
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
            self.failed.exception()  # whoever waits is told; nobody has to


class _Monitor:
    """Asks one node for its status."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._asked: list[asyncio.Future[Status]] = []
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    async def ask(self) -> Status:
        future: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self.link.send(encode(AskStatus()))
        return await future

    def _on_message(self, plain: dict[str, Any]) -> None:
        status = decode(plain, Status)
        if self._asked and not (future := self._asked.pop(0)).done():
            future.set_result(status)

    def _on_lost(self, error: TransportError) -> None:
        for future in self._asked:
            if not future.done():
                future.set_exception(error)


async def _end(process: Process, patience_s: float) -> None:
    """Ask a process to stop, and kill it if it does not within ``patience_s``."""
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process takes the first with the second
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
    """In the child: be told to stop when the parent dies, however it dies (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
