"""Real nodes for tests: the ``lamina`` command in real processes, forked from one that has imported torch already."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lamina
from lamina.admin import AdminClient
from lamina.cluster.local import free_ports
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    PipelineConfig,
    RecoveryConfig,
    TransportConfig,
    TransportKind,
    write_cluster,
    write_secret,
)
from lamina.transport import Address, TlsFiles
from lamina.wire.admin import Status

START_TIMEOUT_S = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


TRANSPORTS = ("auto", "tcp", "shm", "rdma", "tls")
"""What tests can be run over; ``tls`` is tcp, encrypted."""


@dataclass(frozen=True)
class Wiring:
    """How the nodes of a test reach each other."""

    kind: TransportKind = "auto"
    compute: str = "127.0.0.1"
    memory: str = "127.0.0.1"
    """Addresses of compute node and memory nodes."""
    compute_device: str | None = None
    memory_device: str | None = None
    """RDMA devices."""
    secret: Path | None = None
    tls: TlsFiles | None = None
    peer_timeout: float = 4.0

    def keys(self) -> dict[str, str]:
        """Keys of ``[transport]``, and with other words for it options of ``lamina node``."""
        keys = {"secret_file": self.secret}
        if self.tls:
            keys |= {"tls_certificate": self.tls.certificate, "tls_key": self.tls.key}
            keys |= {"tls_authority": self.tls.authority}
        return {key: str(file) for key, file in keys.items() if file}

    def memory_address(self, port: int) -> Address:
        return Address("tcp", self.memory, port)


def wire(transport: str, folder: Path) -> Wiring:
    """The wiring for one of TRANSPORTS; its secret and certificates are made in ``folder``."""
    if transport in ("auto", "tcp", "shm"):
        return Wiring(transport)
    secret = folder / "cluster.key"
    if not secret.exists():
        write_secret(secret)
    if transport == "rdma":
        # The two ends of the wire in the user-mode kernel, see tests/rdma.
        # All nodes share its one processor: whoever computes keeps the others from speaking.
        return Wiring("rdma", "10.77.0.1", "10.77.0.2", "rxe0", "rxe1", secret, peer_timeout=20.0)
    return Wiring("tcp", secret=secret, tls=certificates(folder))


def certificates(folder: Path, name: str = "node") -> TlsFiles:
    """A new authority in ``folder``, and a certificate that it signed."""
    authority, authority_key = folder / f"{name}-authority.pem", folder / f"{name}-authority.key"
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    _openssl(*new, "-subj", "/CN=authority", "-keyout", str(authority_key), "-out", str(authority))
    signed = ["-CA", str(authority), "-CAkey", str(authority_key), "-addext", "basicConstraints=critical,CA:FALSE"]
    _openssl(*new, *signed, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate))
    return TlsFiles(certificate, key, authority)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)  # noqa: S607 - wherever it is


default = Wiring()
"""Of nodes whose test does not say otherwise; chosen by ``--transport``."""


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
    memory: int = 16 << 20,
    quota: int | None = None,
    pipeline: PipelineConfig | None = None,
    wiring: Wiring | None = None,
    start_timeout: float = 60.0,
    compute: Sequence[range | None] = (None,),
    dtype: Dtype = "float32",
    compiled: bool = False,
    recovery: RecoveryConfig | None = None,
    **model_keys: Any,
) -> ClusterConfig:
    """A cluster file with compute nodes ``c0``, ``c1``, ... and memory nodes ``m0``, ``m1``, ... on ``memory_ports``.

    ``compute`` has the layers of each compute node; None: all of them. ``model_keys`` are more keys of ``[model]``.
    ``recovery`` is by default without a lease, as tests share memory nodes: a front that is killed has to leave its
    space to the next one's.

    The slices are not ``compiled`` by default: a tiny model is ready sooner and hardly slower without.
    """
    wiring = wiring or default
    nodes: list[NodeConfig] = [
        ComputeNodeConfig(
            name=f"c{i}",
            address=Address("tcp", wiring.compute, port),
            threads=1,
            layers=layers,
            rdma_device=wiring.compute_device,
        )
        for i, (port, layers) in enumerate(zip(free_ports(len(compute)), compute, strict=True))
    ]
    nodes += [
        MemoryNodeConfig(
            name=f"m{i}",
            address=wiring.memory_address(port),
            threads=1,
            memory=memory,
            quota=quota,
            rdma_device=wiring.memory_device,
        )
        for i, port in enumerate(memory_ports)
    ]
    return write_cluster(
        folder / "cluster.toml",
        ModelConfig(path=str(model), dtype=dtype, compile=compiled, **model_keys),
        nodes,
        pipeline=pipeline,
        recovery=recovery or RecoveryConfig(lease=0),
        transport=TransportConfig(
            kind=wiring.kind, peer_timeout=wiring.peer_timeout, start_timeout=start_timeout, **wiring.keys()
        ),
    )


def start_memory(folder: Path, port: int, *, memory: str = "16MiB", wiring: Wiring | None = None) -> Node:
    """A memory node without a configuration."""
    wiring = wiring or default
    given = {"role": "memory", "listen": str(wiring.memory_address(port)), "memory": memory, "threads": "1"}
    given |= {"transport": wiring.kind, "peer_timeout": str(wiring.peer_timeout)} | wiring.keys()
    if wiring.memory_device:
        given["rdma_device"] = wiring.memory_device
    options = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    return start(folder / f"memory-{port}.log", "node", *options)


def start_node(config: ClusterConfig, name: str) -> Node:
    """A node of a cluster file."""
    log = config.file.parent / f"{name}.log"
    return start(log, "node", str(config.file), "--name", name)


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


def client(config: ClusterConfig, **settings: Any) -> AbstractAsyncContextManager[lamina.AsyncClient]:
    """A client of a running cluster, with its secret and certificates."""
    links = config.links
    settings = {"secret": links.secret, "tls": links.tls, "peer_timeout": links.peer_timeout} | settings
    return lamina.connect(config.front.address, **settings)


async def status_of(config: ClusterConfig, node: NodeConfig) -> Status:
    """What a node says of itself."""
    async with await AdminClient.connect(node.address, config.options(), name="test", deadline_s=30) as asking:
        return await asking.status()


async def ready(config: ClusterConfig, node: Node) -> Status:
    """Wait until the front takes requests."""

    async def ask() -> Status:
        async with client(config, deadline_s=START_TIMEOUT_S) as asking:
            while (status := await asking.status()).state != "ready":  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
            return status

    asked = asyncio.ensure_future(ask())
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (await asyncio.wait([asked], timeout=0.02))[0]:
            assert node.process.is_alive(), f"the front ended while starting:\n{node.log.read_text()}"
            assert time.monotonic() < deadline, f"the front is not ready:\n{node.log.read_text()}"
        return await asked
    finally:
        asked.cancel()


async def eventually(condition: Any, timeout_s: float = 30.0) -> None:
    """Wait until the coroutine function ``condition`` returns something true."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.02)
