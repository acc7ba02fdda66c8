"""``lamina serve CONFIG``: begin the server, and end it when its last answer has been sent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from lamina import log as logs
from lamina.config import ClusterConfig
from lamina.errors import CheckpointError, ConfigError, ConnectError, LaminaError
from lamina.serve.app import BATCHED, make_app
from lamina.serve.batch.offline import Offline, default_folder
from lamina.serve.cluster_view import ClusterView
from lamina.serve.facts import read_facts
from lamina.serve.front import FrontKeeper
from lamina.serve.gate import App
from lamina.serve.options import ChatOptions, ServeOptions
from lamina.serve.protocol import IDLE_S, BoundedProtocol
from lamina.serve.service import Model, Service

log = logging.getLogger("lamina.serve")

DRAIN_S = 30.0
"""How long answers may take after the server was told to stop."""
ASK_EVERY_S = 0.1


def run(config: ClusterConfig, options: ServeOptions) -> int:
    """Serve the cluster of ``config`` until this process is told to stop. Return the exit status."""
    options.check()
    logs.configure("serve", format_=logs.choose_format(configured=config.log.format))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it says of requests, this server says itself
    _raise_descriptor_limit()
    try:
        failure = uvloop.run(_main(config, options))
        if failure:
            raise CheckpointError(failure)
    except LaminaError as e:
        log.error("event=failed reason=%r", str(e), extra={"failure": e})
        raise
    return 0


async def _main(config: ClusterConfig, options: ServeOptions) -> str:
    """Serve until the end. Return why the model cannot be served, if that was the reason."""
    front = FrontKeeper(config, patience_s=config.recovery.lease)
    names = list(options.names) or [config.model_path.resolve().name]
    service = Service(front, names, options.max_body)
    listening = listen(options)
    view = ClusterView(config)
    server = _Server(make_app(service, view, keys=options.keys(), origins=options.origins), options)
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        log.info("event=%s", "stopping_now" if service.draining.is_set() else "stopping")
        if service.draining.is_set():
            server.force_exit = server.should_exit = True
        service.draining.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    scheme = "https" if options.tls_certificate else "http"
    with listening:
        address = listening.getsockname()
        log.info("event=listening url=%s://%s:%d", scheme, options.host, address[1], extra={"progress": "connecting"})
        offline = _open_files(service, options.files)
        beside = [
            front.keep(),
            _read_model(service, config, options.chat),
            _announce(service),
            _end_when_drained(service, server),
        ]
        if offline is not None:
            beside.append(offline.batches.serve())
        tasks = [asyncio.create_task(work) for work in beside]
        for task in tasks:
            task.add_done_callback(partial(_end_after_error, server))
        try:
            await server.serve(sockets=[listening])
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await view.close()
            service.workers.close()
            if offline is not None:
                offline.close()
    log.info("event=stopped")
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return service.failure


def _end_after_error(server: uvicorn.Server, task: asyncio.Task[None]) -> None:
    """End the server if what it cannot do without has met an error that nobody expected."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("event=internal_error", exc_info=error)
        server.should_exit = True


def _open_files(service: Service, folder: Path | None) -> Offline | None:
    """Open the folder of files and batches. Without one that was asked for by name, the server does without."""
    try:
        service.offline = offline = Offline(folder or default_folder(), service, BATCHED)
    except ConfigError as e:
        if folder is not None:
            raise ConfigError(f"--files: {e}") from e
        service.offline_failure = str(e)
        log.warning("event=no_files reason=%r", str(e))
        return None
    return offline


async def _read_model(service: Service, config: ClusterConfig, chat: ChatOptions) -> None:
    path = config.model_path
    try:
        facts = await read_facts(path)
        service.read = await service.workers.run(Model.make, path, facts, config.model.context, chat, long=True)
    except LaminaError as e:
        service.failure = str(e)
        service.draining.set()  # it would never be ready


async def _announce(service: Service) -> None:
    """Say once that requests are taken."""
    while not service.is_ready:  # noqa: ASYNC110 # several things make it so
        await asyncio.sleep(ASK_EVERY_S)
    log.info("event=ready model=%s", service.names[0], extra={"progress": "ready"})


async def _end_when_drained(service: Service, server: uvicorn.Server) -> None:
    """End the server after its last answer. Until then it listens, and says that it is not ready."""
    await service.draining.wait()
    try:
        await asyncio.wait_for(service.idle.wait(), DRAIN_S)
    except TimeoutError:
        log.warning("event=answers_cut answers=%d seconds=%g", len(service.running), DRAIN_S)
        service.stop_answers()
        await asyncio.sleep(ASK_EVERY_S)
    server.should_exit = True


def listen(options: ServeOptions) -> socket.socket:
    """Return a listening socket. ConnectError says why there can be none."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
        listening.setblocking(False)
    except OSError as e:
        raise ConnectError(
            f"--host and --port: the server cannot listen at {options.host}:{options.port}: "
            f"{(e.strerror or str(e)).lower()}; choose another port"
        ) from e
    return listening


def _raise_descriptor_limit() -> None:
    """Allow as many connections as the system allows this process, not only the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 20)), hard))


class _Server(uvicorn.Server):
    """uvicorn, whose signals its caller handles."""

    def __init__(self, app: App, options: ServeOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                interface="asgi3",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(IDLE_S),
                timeout_graceful_shutdown=2,
                ssl_certfile=options.tls_certificate,
                ssl_keyfile=options.tls_key,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
