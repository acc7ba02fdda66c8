"""``lamina batch``: answer a file of requests with a running cluster, or with one that is started for it."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from lamina import log as logs
from lamina.cluster.local import Cluster
from lamina.cluster.up import log_folder
from lamina.config import ClusterConfig
from lamina.errors import ConfigError, LaminaError, first_error
from lamina.files import check_target
from lamina.serve.batch.inside import Handler, Inside
from lamina.serve.batch.journal import Journal
from lamina.serve.batch.lines import BatchInput, read_input
from lamina.serve.batch.progress import BatchProgress
from lamina.serve.batch.run import run as answer_all
from lamina.serve.facts import read_facts
from lamina.serve.front import FrontKeeper
from lamina.serve.local import LocalModel, small_cluster
from lamina.serve.options import DEFAULT_BODY, ChatOptions
from lamina.serve.service import Model, Service

PATIENCE_S = 10.0
"""How long the front may be away before the command ends."""


def run(
    cluster: ClusterConfig | LocalModel,
    source: Path,
    output: Path,
    handlers: Mapping[str, Handler],
    *,
    concurrency: int,
    names: Sequence[str] = (),
    chat: ChatOptions | None = None,
) -> int:
    """Answer the lines of ``source`` that have no answer yet, and write ``output`` when all have one.

    A running ``cluster`` answers, or one that is started for a checkpoint. At most ``concurrency`` lines are under way
    at the same time; they may name the model by ``names``, by default that of its folder. Return the exit status.
    """
    check_target(output, "--output")
    batch = read_input(source)
    journal = Journal(output, batch.digest)
    with journal:
        if not output.exists():
            return int(uvloop.run(_Command(batch, journal, handlers, concurrency, names, chat).run(cluster)))
        if not journal.was_there:
            journal.path.unlink()
            raise ConfigError(f"--output: {output} exists already; remove it, or name another file")
        journal.path.unlink()  # a run was killed after its last step but one
        sys.stderr.write(f"{output} is complete already\n")
        return 0


class _Command:
    """One run of the command."""

    def __init__(
        self,
        batch: BatchInput,
        journal: Journal,
        handlers: Mapping[str, Handler],
        concurrency: int,
        names: Sequence[str],
        chat: ChatOptions | None,
    ) -> None:
        self._batch = batch
        self._journal = journal
        self._handlers = handlers
        self._concurrency = concurrency
        self._names = names
        self._chat = chat
        self._progress = BatchProgress()

    async def run(self, cluster: ClusterConfig | LocalModel) -> int:
        """Answer until all lines have an answer, or until a signal. Return the exit status."""
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        stopping = asyncio.ensure_future(stopped.wait())
        with self._progress:
            work = self._start(cluster) if isinstance(cluster, LocalModel) else self._answer(cluster)
            working = asyncio.ensure_future(work)
            await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
            working.cancel()
            await asyncio.wait([working])
        stopping.cancel()
        total = self._batch.total
        kept = f"{len(self._journal)} of {total} lines are answered, and kept; the same command goes on"
        if working.cancelled():
            sys.stderr.write(f"stopped: {kept}\n")
            return 128 + signal.SIGINT
        if (error := working.exception()) is not None:
            if isinstance(cause := first_error(error), LaminaError):
                sys.stderr.write(kept + "\n")
            raise cause
        await asyncio.to_thread(self._journal.finish)
        failed = f", {self._progress.failed} of them with an error" if self._progress.failed else ""
        sys.stderr.write(f"answered {total} lines{failed}; {self._progress.tokens} tokens in this run\n")
        return 0

    async def _start(self, model: LocalModel) -> None:
        """Answer with a cluster that lives as long as this."""
        logs_at = log_folder(model.path)
        with tempfile.TemporaryDirectory(prefix="lamina-batch-") as folder:
            config = await small_cluster(model, Path(folder))
            async with Cluster(config, log_folder=logs_at, restart=model.restart, on_news=_say) as cluster:
                logs.configure("batch", logs_at / "batch.log")
                sys.stderr.write(f"starting two nodes; logs: {logs_at}\n")
                await cluster.ready()
                # Whether the front comes back, the cluster knows.
                working = asyncio.ensure_future(self._answer(config, patience_s=None))
                try:
                    await asyncio.wait([working, cluster.failed], return_when=asyncio.FIRST_COMPLETED)
                    if cluster.failed.done():
                        cluster.failed.result()
                finally:
                    working.cancel()
                    await asyncio.wait([working])
                working.result()

    async def _answer(self, config: ClusterConfig, *, patience_s: float | None = PATIENCE_S) -> None:
        async with _service(config, self._names, self._chat) as service:
            answer = Inside(service, self._handlers, patience_s=patience_s)
            await answer_all(self._batch, self._journal, answer, self._progress, concurrency=self._concurrency)


def _say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")
    sys.stderr.flush()


@asynccontextmanager
async def _service(config: ClusterConfig, names: Sequence[str], chat: ChatOptions | None) -> AsyncIterator[Service]:
    """Give what endpoints need, as a server has it."""
    path = config.model_path
    front = FrontKeeper(config, patience_s=config.recovery.lease)
    service = Service(front, list(names) or [path.resolve().name], DEFAULT_BODY)
    service.read = Model.make(path, await read_facts(path), config.model.context, chat)
    keeping = asyncio.create_task(front.keep())
    try:
        yield service
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        service.workers.close()
