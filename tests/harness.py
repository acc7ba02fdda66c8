"""Real nodes for tests: the ``lamina`` command in real processes, forked from one that has imported torch already."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lamina
from lamina.cluster import free_ports
from lamina.config import ClusterConfig, load
from lamina.protocol import Status

START_TIMEOUT_S = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


@dataclass
class Node:
    """A running ``lamina node`` and the file with its log."""

    process: BaseProcess
    log: Path

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 20.0) -> int:
        """The exit status, or minus the signal that killed it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s:\n{self.log.read_text()}"
        return self.process.exitcode

    def stop(self) -> int:
        """Drain by SIGTERM; the exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(log: Path, *arguments: str) -> Node:
    """Run ``lamina`` with ``arguments`` in a process of its own."""
    process = _context.Process(target=_main, args=(str(log), arguments), daemon=True)
    process.start()
    return Node(process, log)


def _main(log: str, arguments: tuple[str, ...]) -> None:
    """In the child: what the installed command does."""
    from lamina.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["lamina", *arguments]
    main()


def write_config(
    folder: Path,
    model: Path,
    memory_ports: Sequence[int],
    *,
    dtype: str = "float32",
    memory: str = "16MiB",
    sections: str = "",
    model_keys: str = "",
) -> ClusterConfig:
    """A cluster file with one compute node ``c0`` and memory nodes ``m0``, ``m1``, ... on ``memory_ports``."""
    (front,) = free_ports(1)
    lines = [f'[model]\npath = "{model}"\ndtype = "{dtype}"\n{model_keys}\n{sections}']
    lines.append(f'[[node]]\nname = "c0"\nrole = "compute"\naddress = "tcp://127.0.0.1:{front}"\nthreads = 1')
    lines += [
        f'[[node]]\nname = "m{i}"\nrole = "memory"\naddress = "tcp://127.0.0.1:{port}"\nthreads = 1\n'
        f'memory = "{memory}"'
        for i, port in enumerate(memory_ports)
    ]
    file = folder / "cluster.toml"
    file.write_text("\n".join(lines) + "\n")
    return load(file)


def start_memory(folder: Path, port: int, *, memory: str = "16MiB") -> Node:
    """A memory node without a configuration."""
    address = f"tcp://127.0.0.1:{port}"
    return start(
        folder / f"memory-{port}.log",
        "node",
        "--role",
        "memory",
        "--listen",
        address,
        "--memory",
        memory,
        "--threads",
        "1",
    )


def start_node(config: ClusterConfig, name: str) -> Node:
    """A node of a cluster file."""
    log = config.file.parent / f"{name}.log"
    return start(log, "node", "--role", config.find(name).role, "--config", str(config.file), "--name", name)


@contextlib.contextmanager
def running(*nodes: Node) -> Iterator[None]:
    """Leaves none of ``nodes`` behind, whatever happens; shows their logs when a test fails."""
    try:
        yield
    except BaseException:
        for node in nodes:
            sys.stderr.write(f"--- {node.log}\n{node.log.read_text() if node.log.exists() else ''}")
        raise
    finally:
        for node in nodes:
            if node.process.is_alive():
                node.kill()


async def ready(config: ClusterConfig, node: Node) -> Status:
    """Wait until the front takes requests."""
    deadline = time.monotonic() + START_TIMEOUT_S
    async with lamina.connect(config.front.address, deadline_s=START_TIMEOUT_S) as client:
        while (status := await client.status()).state != "ready":
            assert node.process.is_alive(), f"the front ended while starting:\n{node.log.read_text()}"
            assert time.monotonic() < deadline, f"the front is not ready:\n{node.log.read_text()}"
            await asyncio.sleep(0.05)
        return status


async def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait until the coroutine function ``condition`` returns something true."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.02)
