"""``lamina serve MODEL_DIR``: a compute node, a memory node and the HTTP endpoint for one checkpoint, on this machine.

Ctrl-C lets answers end; the second one does not wait for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from lamina import log as logs
from lamina.attention.available import available_bytes
from lamina.cluster.child import Child
from lamina.cluster.local import Cluster, free_addresses, free_ports
from lamina.cluster.screen import Screen
from lamina.cluster.up import log_folder
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    format_size,
    write_cluster,
)
from lamina.errors import CapacityError, LaminaError, NodeError
from lamina.log import NodeReport
from lamina.model.checkpoint import check_checkpoint
from lamina.model.files import find_weights, read_config, stored_dtype
from lamina.serve.facts import Facts, read_facts
from lamina.serve.options import ServeOptions
from lamina.serve.run import DRAIN_S, listen

log = logging.getLogger("lamina.serve")

SEQUENCES = 64
"""Requests of the full context for which the KV cache has room at most: as many as a batch has by default."""
_SPARE = 1 << 30
"""Memory that the processes need beside weights and KV cache."""
_BLOCK = 16
_LEAST_CONTEXT = 64
_KILL_AFTER_S = 5.0


@dataclass(frozen=True)
class LocalModel:
    """Says how to start a small cluster for the checkpoint ``path``.

    None takes the context of the model, of the free memory as much as is of use, and the type as stored. With
    ``restart`` nodes that die are started again, as `Cluster` says.
    """

    path: Path
    context: int | None = None
    memory: int | None = None
    dtype: Dtype | None = None
    restart: bool = True


def run(model: LocalModel, options: ServeOptions, *, verbose: bool) -> int:
    """Serve a checkpoint until Ctrl-C. Return the exit status. LaminaError says what failed.

    Logs go into a folder of the user, or to standard error if ``verbose``.
    """
    if options.port == 0:
        options = dataclasses.replace(options, port=free_ports(1)[0])  # the screen names it
    listen(options).close()  # what cannot be is said before a large model is loaded
    return int(uvloop.run(_main(model, options, verbose=verbose)))


async def _main(model: LocalModel, options: ServeOptions, *, verbose: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="lamina-serve-") as folder:
        config = await small_cluster(model, Path(folder))
        logs_at = None if verbose else log_folder(model.path)
        return await _Serving(config, options, logs_at, restart=model.restart).run()


async def small_cluster(model: LocalModel, folder: Path) -> ClusterConfig:
    """Write the file of a cluster of two nodes on this machine for a checkpoint into ``folder``."""
    path = model.path.resolve()
    check_checkpoint(path)
    facts = await read_facts(path)
    memory, context = _sizes(path, facts, model.context, model.memory, model.dtype)
    front, other = free_addresses(2)
    return write_cluster(
        folder / "cluster.toml",
        ModelConfig(path=str(path), dtype=model.dtype, context=context),
        [ComputeNodeConfig(name="c0", address=front), MemoryNodeConfig(name="m0", address=other, memory=memory)],
    )


def _sizes(
    model: Path, facts: Facts, context: int | None, memory: int | None, dtype: Dtype | None
) -> tuple[int, int | None]:
    """Return the size of the KV cache, and the context if it is not that of the model."""
    config = read_config(model)
    stored = stored_dtype(model, config)
    size = {"float32": 4}.get(dtype or stored, 2)
    per_token = facts.kv_numbers * size
    if memory is None:
        files = sum(file.stat().st_size for file in find_weights(model, config).files)
        weights = files * size // (4 if stored == "float32" else 2)
        where, free = min(available_bytes().items(), key=lambda item: item[1], default=("on this machine", 4 << 30))
        memory = (free - weights * 5 // 4 - _SPARE) // 2  # the other half is for everything else that runs here
        if memory < per_token * _LEAST_CONTEXT or memory < 1 << 20:
            raise CapacityError(
                f"{model}: the weights need {format_size(weights)}, of which with a KV cache too little is free: "
                f"{format_size(free)} {where}; give a smaller --dtype, or --memory if this estimate is wrong"
            )
        if per_token:
            memory = min(memory, max(64 << 20, SEQUENCES * (context or facts.context) * per_token))
        memory -= memory % (1 << 20)
    if context is None and per_token and per_token * facts.context > memory * 9 // 10:
        context = max(_BLOCK, memory * 9 // 10 // per_token // _BLOCK * _BLOCK)
    return memory, context


class _Serving:
    """The processes, from their start to their end."""

    def __init__(self, config: ClusterConfig, options: ServeOptions, folder: Path | None, *, restart: bool) -> None:
        self._config = config
        self._options = options
        self._folder = folder
        scheme = "https" if options.tls_certificate else "http"
        host = f"[{options.host}]" if ":" in options.host else options.host
        self._url = f"{scheme}://{host}:{options.port}"
        self._screen = Screen(config, {"http": ("endpoint", self._url)})
        self._state = "starting"
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._cluster = Cluster(
            config, log_folder=folder, on_change=self._show, restart=restart, on_news=self._screen.say
        )

    async def run(self) -> int:
        asked, asked_again = asyncio.Event(), asyncio.Event()

        def interrupt() -> None:
            (asked_again if asked.is_set() else asked).set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        async with self._cluster:
            logs.configure("serve", self._folder and self._folder / "serve.log")
            if self._folder:
                self._screen.say(f"logs: {self._folder}")
            context = self._config.model.context
            memory = format_size(self._config.memory_nodes[0].memory)
            self._screen.say(f"KV cache: {memory}" + (f"; context: {context} tokens" if context else ""))
            server = await self._start_server()
            watching = asyncio.create_task(self._watch(server))
            stopped = asyncio.ensure_future(asked.wait())
            try:
                ends: list[asyncio.Future[Any]] = [stopped, self._failed, self._cluster.failed]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                self._stopping = True
                if stopped.done():
                    self._screen.say("stopping; Ctrl-C again does not wait for answers")
                    await _until(self._drain(server), asked_again)
            finally:
                self._stopping = True
                stopped.cancel()
                await server.end(_KILL_AFTER_S if not stopped.done() else 0.0)
                watching.cancel()
                server.close()
                await self._cluster.stop(drain=False)
            for failed in (self._failed, self._cluster.failed):
                if failed.done():
                    failed.result()
        self._screen.say("all processes stopped")
        return 0

    async def _drain(self, server: Child) -> None:
        """Let answers end, then the nodes."""
        await server.end(DRAIN_S + _KILL_AFTER_S)
        await self._cluster.stop(drain=True)

    async def _start_server(self) -> Child:
        with ExitStack() as stack:
            log_file = None
            if self._folder:
                log_file = stack.enter_context((self._folder / "http.log").open("wb"))
            return await Child.start(
                ["-m", "lamina", "serve", str(self._config.file), *_arguments(self._options)],
                threads=1,
                log_file=log_file,
                on_report=self._take,
            )

    async def _watch(self, server: Child) -> None:
        status = await server.wait()
        if not self._stopping:
            self._fail(NodeError(f"the HTTP endpoint ended with status {status}", node="http"))

    def _take(self, report: NodeReport) -> None:
        if report.failure:
            self._fail(LaminaError(report.failure))
            return
        self._state = report.progress
        self._show("http")
        if report.progress == "ready":
            self._screen.say(f"ready; next: curl {self._url}/v1/models (Ctrl-C here stops everything)")

    def _fail(self, error: LaminaError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # mark it as seen

    def _show(self, name: str) -> None:
        if not self._stopping:
            self._screen.show(name, {**self._cluster.states, "http": self._state})


async def _until(work: Any, at_once: asyncio.Event) -> None:
    """Do the work, unless ``at_once`` is set before it is done."""
    working, impatient = asyncio.ensure_future(work), asyncio.ensure_future(at_once.wait())
    await asyncio.wait([working, impatient], return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if not working.done():
        log.info("event=stopping_now")
        working.cancel()
        await asyncio.wait([working])
    elif not working.cancelled():
        working.result()


def _arguments(options: ServeOptions) -> Sequence[str]:
    """Return the words with which ``lamina serve`` gets these options."""
    words = ["--host", options.host, "--port", str(options.port), "--max-body", format_size(options.max_body)]
    for name in options.names:
        words += ["--served-model-name", name]
    for origin in options.origins:
        words += ["--cors-origin", origin]
    for option, file in (
        ("--api-key-file", options.api_key_file),
        ("--tls-certificate", options.tls_certificate),
        ("--tls-key", options.tls_key),
        ("--files", options.files),
        ("--chat-template", options.chat.template),
        ("--tool-parser", options.chat.tools),
        ("--reasoning-parser", options.chat.reasoning),
    ):
        if file is not None:
            words += [option, str(file)]
    return words
