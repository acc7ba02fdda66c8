"""The batches behind ``/v1/batches``: one after another, in the background, and on where a killed server left them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from lamina.errors import LaminaError, RequestError, StorageError, first_error
from lamina.serve.batch.files import FileStore, private_folder, unwritable, write_json
from lamina.serve.batch.journal import Journal
from lamina.serve.batch.lines import URLS, BadLine, BatchInput, read_input
from lamina.serve.batch.run import Answer, AnsweredLine, run

log = logging.getLogger("lamina.serve")

WINDOW_S = 24 * 3600
CONCURRENCY = 256
"""So many lines are under way at the same time: enough to fill the cluster, and few enough to leave its queue open."""
_SAVE_EVERY_S = 1.0
RETRY_S = 10.0
"""A batch whose answers cannot be written is tried again so often, until its time is over."""

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
_OVER = ("failed", "completed", "expired", "cancelled")


class Counts(msgspec.Struct, frozen=True):
    """Counts the lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Holds a batch, as its file does. Times are seconds since 1970."""

    id: str
    number: int
    """Its place among all batches of this server: the order in which they run."""
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    created_at: int
    expires_at: int
    status: Status = "validating"
    request_counts: Counts = Counts()
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def shown(self) -> dict[str, Any]:
        """Return the batch as the API shows it."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        del plain["owner"], plain["number"]
        errors = {"object": "list", "data": self.errors} if self.errors else None
        return plain | {"object": "batch", "errors": errors}


class BatchService:
    """Runs batches of the files in ``files``, one after another; ``answer`` answers a line for an owner.

    Their state lies in ``folder``, so that another process goes on with what this one left. ``now`` gives seconds since
    1970.
    """

    def __init__(
        self, folder: Path, files: FileStore, answer: Callable[[str], Answer], *, now: Callable[[], float]
    ) -> None:
        self._folder = private_folder(folder)
        self._files = files
        self._answer = answer
        self._now = now
        self._batches: dict[str, Batch] = {}
        self._due = asyncio.Event()
        self._answering: tuple[str, asyncio.Task[None]] | None = None
        """The batch whose lines are being answered, which can be stopped."""
        for path in self._folder.glob("batch_*.json"):
            with suppress(OSError, msgspec.DecodeError):
                batch = msgspec.json.decode(path.read_bytes(), type=Batch)
                self._batches[batch.id] = batch

    # -- what clients ask for

    def create(
        self, endpoint: str, input_file_id: str, window: str, metadata: dict[str, str] | None, owner: str
    ) -> Batch:
        """Take a batch. RequestError says what is wrong with it; its lines are read later."""
        if endpoint not in URLS:
            raise RequestError(f"endpoint: expected one of {', '.join(URLS)}; got {endpoint!r:.100}")
        if window != "24h":
            raise RequestError(f'completion_window: expected "24h", got {window!r:.100}')
        if self._files.get(input_file_id, owner).purpose != "batch":
            raise RequestError(f'input_file_id: {input_file_id} was uploaded with another purpose; expected "batch"')
        now = int(self._now())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            number=max((other.number for other in self._batches.values()), default=0) + 1,
            owner=owner,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=window,
            metadata=metadata,
            created_at=now,
            expires_at=now + WINDOW_S,
        )
        self._save(batch)
        self._due.set()
        return batch

    def get(self, id_: str, owner: str) -> Batch:
        """Return a batch. RequestError if there is none, also if it is somebody else's."""
        batch = self._batches.get(id_)
        if batch is None or batch.owner != owner:
            raise RequestError(f"no batch {id_!r:.100}; GET /v1/batches lists those that are there")
        return batch

    def of(self, owner: str) -> list[Batch]:
        """Return all batches of one owner, the newest first."""
        found = [batch for batch in self._batches.values() if batch.owner == owner]
        return sorted(found, key=lambda batch: batch.number, reverse=True)

    def cancel(self, id_: str, owner: str) -> Batch:
        """Stop a batch; what it has answered becomes its output. RequestError if it is over."""
        batch = self.get(id_, owner)
        if batch.status in _OVER:
            raise RequestError(f"batch {id_} is {batch.status} already")
        batch = self._change(batch, "cancelling")
        if self._answering is not None and self._answering[0] == id_:
            self._answering[1].cancel()
        self._due.set()
        return batch

    # -- in the background

    async def serve(self) -> None:
        """Run batches until cancelled. What is unfinished then is left for the next process.

        While the disk is full, batches wait: what was answered is kept, and whoever makes room lets them go on.
        """
        while True:
            self._due.clear()
            waiting = sorted(
                (batch for batch in self._batches.values() if batch.status not in _OVER),
                key=lambda batch: (batch.status != "cancelling", batch.number),
            )
            if not waiting:
                await self._due.wait()
                continue
            try:
                await self._run_or_fail(waiting[0])
            except StorageError as e:
                log.warning("event=batch_waits batch=%s seconds=%g reason=%r", waiting[0].id, RETRY_S, str(e))
                await asyncio.sleep(RETRY_S)

    async def _run_or_fail(self, batch: Batch) -> None:
        """Run a batch to its end, whatever that is. StorageError says that its state cannot be written."""
        try:
            await self._run(batch)
        except Exception as e:  # trouble with one batch must not harm the others
            error = first_error(e)
            if isinstance(error, StorageError):
                raise error from e
            self._fail(batch.id, error)

    def _fail(self, id_: str, error: BaseException) -> None:
        batch = self._batches[id_]
        if not isinstance(error, LaminaError):
            log.error("event=internal_error batch=%s", id_, exc_info=error)
        log.warning("event=batch_failed batch=%s reason=%r", id_, str(error))
        reason = {"code": "failed", "message": str(error), "line": None, "param": None}
        self._change(replace(batch, errors=[reason]), "failed")

    async def _run(self, batch: Batch) -> None:
        output = self._folder / batch.id
        if not output.exists():
            source = self._files.path(batch.input_file_id, batch.owner)
            found = _only(await asyncio.to_thread(read_input, source), batch.endpoint)
            with Journal(output, found.digest) as journal:
                if self._batches[batch.id].status == "validating":
                    self._change(self._batches[batch.id], "in_progress")
                self._count(batch.id, replace(self._batches[batch.id].request_counts, total=found.total))
                if self._batches[batch.id].status == "in_progress":
                    await self._answer_all(batch, found, journal)
                self._change(self._batches[batch.id], self._batches[batch.id].status, finalizing_at=int(self._now()))
                await asyncio.to_thread(journal.finish)
        await asyncio.to_thread(self._hand_over, batch.id, output)

    async def _answer_all(self, batch: Batch, found: BatchInput, journal: Journal) -> None:
        """Answer all lines, or, when the batch is cancelled or its time is over, some of them."""
        left_s = batch.expires_at - self._now()
        if left_s <= 0:
            return
        watcher = _SavedCounts(self, batch.id, asyncio.get_running_loop().time)
        answering = asyncio.create_task(
            run(found, journal, self._answer(batch.owner), watcher, concurrency=CONCURRENCY)
        )
        self._answering = batch.id, answering
        try:
            await asyncio.wait([answering], timeout=left_s)
        finally:
            self._answering = None
            answering.cancel()
            await asyncio.wait([answering])
            watcher.save()
        if not answering.cancelled():
            answering.result()

    def _hand_over(self, id_: str, output: Path) -> None:
        """Make files of a batch's output: one of the answers, and one of the lines that failed."""
        batch = self._batches[id_]
        parts = output.with_name(f"{id_}.answers.part"), output.with_name(f"{id_}.errors.part")
        counts = [0, 0]
        ids: list[str | None] = [None, None]
        try:
            with output.open("rb") as lines, parts[0].open("wb") as answers, parts[1].open("wb") as errors:
                for line in lines:
                    response = msgspec.json.decode(line)["response"]
                    failed = response is None or response["status_code"] >= 400
                    counts[failed] += 1
                    (errors if failed else answers).write(line)
            for which, (part, name) in enumerate(zip(parts, ("output", "error"), strict=True)):
                if counts[which]:
                    filename = f"{id_}_{name}.jsonl"
                    file = self._files.take(
                        part, filename=filename, purpose="batch_output", owner=batch.owner, now_s=self._now()
                    )
                    ids[which] = file.id
            self._note_end(batch, ids, counts)
        except (OSError, StorageError) as e:
            for taken in ids:
                if taken is not None:
                    self._files.delete(taken, batch.owner)
            raise unwritable(output, e) if isinstance(e, OSError) else e from e
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        output.unlink(missing_ok=True)

    def _note_end(self, batch: Batch, ids: list[str | None], counts: list[int]) -> None:
        """Note the files of a batch's answers and errors, and how many lines they have."""
        completed, failed = counts
        total = batch.request_counts.total
        batch = replace(
            batch,
            output_file_id=ids[0],
            error_file_id=ids[1],
            request_counts=Counts(total, completed=completed, failed=failed),
        )
        if batch.status == "cancelling":
            self._change(batch, "cancelled")
        else:  # lines without an answer are left only where the time was over
            self._change(batch, "completed" if completed + failed == total else "expired")

    def _change(self, batch: Batch, status: Status, **others: Any) -> Batch:
        """Note that a batch has another state from now on."""
        if batch.status != status or not others:
            others[f"{status}_at"] = int(self._now())
        batch = replace(batch, status=status, **others)
        self._save(batch)
        return batch

    def _save(self, batch: Batch) -> None:
        write_json(self._folder / f"{batch.id}.json", batch)
        self._batches[batch.id] = batch  # only now, as a client may be told that it was not taken

    def _count(self, id_: str, counts: Counts) -> None:
        self._save(replace(self._batches[id_], request_counts=counts))


class _SavedCounts:
    """Keeps the counts of a running batch, and saves them now and then."""

    def __init__(self, service: BatchService, id_: str, clock: Callable[[], float]) -> None:
        self._service = service
        self._id = id_
        self._clock = clock
        self._counts = Counts()
        self._saved_s = clock()

    def begun(self, total: int, done: int) -> None:
        self._counts = self._service._batches[self._id].request_counts

    def answered(self, answered: AnsweredLine) -> None:
        failed = int(answered.status >= 400)
        counts = self._counts
        self._counts = Counts(counts.total, counts.completed + 1 - failed, counts.failed + failed)
        if self._clock() >= self._saved_s + _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        self._saved_s = self._clock()
        self._service._count(self._id, self._counts)


def _only(found: BatchInput, endpoint: str) -> BatchInput:
    """Return the input, in which the lines for other endpoints are bad ones."""
    bad = list(found.bad)
    places = []
    for place, line in found.read(found.places):
        if line.url == endpoint:
            places.append(place)
        else:
            reason = f"line {place.number}: url: expected {endpoint!r}, that of the batch; got {line.url!r:.100}"
            bad.append(BadLine(place.number, line.custom_id, reason))
    return found._replace(places=places, bad=bad)
