"""The journal keeps requests and what was answered to them, so that a front that starts again goes on with them.

It is one file of records: the length of a record in 4 bytes, its BLAKE2b digest in 8, and the record in msgpack. The
first says of which model they are, then each request has one when it is taken, and each step one for all its requests.
What ends the process leaves whole records and at most one torn one at the end, which is cut when the file is opened. So
is all from the first damaged record on, as it cannot be told what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec
from msgspec import Struct

from lamina.errors import NodeError, StorageError
from lamina.runtime.storage import LogFile
from lamina.runtime.workers import BackgroundWorkers
from lamina.transport import PROTOCOL_VERSION
from lamina.wire.requests import ChatForm, Failed, Request, Score

log = logging.getLogger("lamina.front")

LEAST_BYTES = 4 << 20
"""The file is rewritten when it is twice as long as after the last time, but not before it has so many bytes."""
RETRY_S = 1.0
"""How often it is tried to write again after a failure."""
MOST_STARTS = 5
"""A request that was under way at so many starts, without a token since, is given up: it may be what ends the front."""
CLOSE_S = 5.0
"""How long the end of the front waits for what is being written."""

_FRAME = struct.Struct("<I8s")


Mirror = Callable[[Literal["all", "more"], bytes], None]
"""Takes what is written: all that the file has then, or what comes behind it."""


class OpenedRecord(Struct, frozen=True, array_like=True, tag=0):
    """Begins the file."""

    version: int
    """That of the protocol, as the records hold what it defines."""
    model: str
    """The fingerprint of the model that answers."""
    node: str
    """The front that writes."""


class AcceptedRecord(Struct, frozen=True, array_like=True, tag=1):
    """A request has been taken."""

    number: int
    """How later records call it."""
    ticket: str
    request: Request
    """With token ids instead of text, and its seed."""
    form: ChatForm | None
    starts: int
    """How often the front has started since the last token of the answer."""


class Beginning(Struct, frozen=True, array_like=True):
    """What is known of an answer when its first token is there. Times are seconds."""

    shared_tokens: int
    queued_s: float
    prompt_s: float


class EndRecord(Struct, frozen=True, array_like=True):
    """How an answer ended."""

    reason: Literal["stop", "length", "failed", "cancelled"]
    """The last one, if its client wants nothing more of it."""
    stopped_by: int | None = None
    answer_s: float = 0.0
    failure: Failed | None = None


class StepRecord(Struct, array_like=True, tag=2):
    """What a step brought, by the numbers of the requests."""

    tokens: list[int] = msgspec.field(default_factory=list)
    """A number and a token for each row."""
    scores: list[tuple[int, Score]] = msgspec.field(default_factory=list)
    """Those of tokens whose requests want them."""
    prompt_scores: list[tuple[int, list[Score]]] = msgspec.field(default_factory=list)
    begun: list[tuple[int, Beginning]] = msgspec.field(default_factory=list)
    ends: list[tuple[int, EndRecord]] = msgspec.field(default_factory=list)

    def begin(self, entry: JournalEntry, beginning: Beginning) -> None:
        """The first token of an answer comes next."""
        entry.beginning = beginning
        self.begun.append((entry.number, beginning))

    def token(self, entry: JournalEntry, token: int, score: Score | None) -> None:
        """An answer has one more token."""
        entry.tokens.append(token)
        entry.starts = 0
        self.tokens += (entry.number, token)
        if score is not None:
            entry.scores.append(score)
            self.scores.append((entry.number, score))

    def prompt_scored(self, entry: JournalEntry, scores: list[Score]) -> None:
        """The next tokens of a prompt have scores."""
        entry.prompt_scores += scores
        self.prompt_scores.append((entry.number, scores))

    def end(self, entry: JournalEntry, end: EndRecord) -> None:
        """An answer is over."""
        entry.end = end
        self.ends.append((entry.number, end))

    def __bool__(self) -> bool:
        return bool(self.tokens or self.prompt_scores or self.ends)


@dataclass(slots=True, eq=False)
class JournalEntry:
    """A request in the journal, and what of its answer is there."""

    number: int
    ticket: str
    request: Request
    form: ChatForm | None
    starts: int = 0
    tokens: array[int] = field(default_factory=lambda: array("I"))
    scores: list[Score] = field(default_factory=list)
    """That of each token, if the request wants them."""
    prompt_scores: list[Score] = field(default_factory=list)
    beginning: Beginning | None = None
    end: EndRecord | None = None
    record: bytes = b""
    """How the request stands in the file."""

    @property
    def prompt(self) -> list[int]:
        """Return the tokens of the prompt."""
        assert not isinstance(self.request.prompt, str), "the front has made tokens of it"
        return self.request.prompt

    def note_accepted(self) -> None:
        """Make the record of the request."""
        self.record = _framed(AcceptedRecord(self.number, self.ticket, self.request, self.form, self.starts))

    def whole(self) -> bytes:
        """Return all records of it, in few."""
        step = StepRecord(
            tokens=[value for token in self.tokens for value in (self.number, token)],
            scores=[(self.number, score) for score in self.scores],
            prompt_scores=[(self.number, self.prompt_scores)] if self.prompt_scores else [],
            begun=[(self.number, self.beginning)] if self.beginning is not None else [],
            ends=[(self.number, self.end)] if self.end is not None else [],
        )
        return self.record + _framed(step) if step else self.record


def writer_of(data: bytes) -> str:
    """Return the name of the front that has written a journal; nothing if that is not known."""
    record, _, _ = _record_at(data, 0)
    return record.node if isinstance(record, OpenedRecord) else ""


class RequestJournal:
    """Writes the journal of one front, on the node's loop.

    What `write` gets is in the file before it calls back. With ``workers`` it is on the disk as well, and a thread of
    theirs waits for that, once for all that came meanwhile. If the file cannot be written, nothing waits: no request is
    taken, and what runs goes on without, until the whole file could be written anew.
    """

    def __init__(self, file: LogFile, *, node: str, model: str, workers: BackgroundWorkers | None = None) -> None:
        """``node`` is the name of this one, and ``model`` the fingerprint of what answers; entries of another model
        fail."""
        self.failure: StorageError | None = None
        """Why nothing can be written now."""
        self.entries: dict[str, JournalEntry] = {}
        """The requests whose clients may still come for something, by ticket."""
        self.bytes = 0
        """The length of the file."""
        self._file = file
        self._node = node
        self._model = model
        self._workers = workers
        self._numbers = itertools.count(1)
        self._most = -1
        self._mirror: Mirror | None = None
        self._queue: list[tuple[bytes, Callable[[], object]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(self, workers: BackgroundWorkers, copy: bytes | None = None) -> list[JournalEntry]:
        """Return what an earlier front has left, in the order in which it came: in this file, or in the ``copy`` of its
        own. StorageError if the file cannot be read."""
        try:
            data = await workers.run(self._file.read, long=True) if copy is None else copy
        except OSError as e:
            raise StorageError(f"{self._file.name} cannot be read: {e.strerror}") from e
        entries = await workers.run(self._taken_in, data, long=True)
        self.entries = {entry.ticket: entry for entry in entries}
        self._numbers = itertools.count(1 + max((entry.number for entry in entries), default=0))
        self._write(b"")  # the first time, all is rewritten
        return entries

    def mirror(self, mirror: Mirror | None) -> None:
        """Have ``mirror`` told of all that is written from now on, beginning with all that is here. It is told before
        the file has it."""
        self._mirror = mirror
        if mirror is not None:
            self._most = -1
            self._write(b"")

    def accept(self, ticket: str, request: Request, form: ChatForm | None) -> JournalEntry:
        """Keep a request. StorageError if that cannot be."""
        if self.failure is not None:
            raise self.failure
        entry = JournalEntry(next(self._numbers), ticket, request, form)
        entry.note_accepted()
        self.entries[ticket] = entry
        if (failure := self._write(entry.record)) is not None:
            del self.entries[ticket]
            raise failure
        return entry

    def write(self, step: StepRecord, then: Callable[[], object]) -> None:
        """Keep what a step brought, and call ``then``."""
        self._write(_framed(step), then)

    def end(self, entry: JournalEntry, end: EndRecord) -> None:
        """Keep that an answer is over."""
        step = StepRecord()
        step.end(entry, end)
        self._write(_framed(step))

    def drop(self, ticket: str) -> None:
        """Forget a request, if it is here: its client has all of it, or wants nothing more of it."""
        entry = self.entries.pop(ticket, None)
        if entry is not None and entry.end is None:
            self.end(entry, EndRecord("cancelled"))

    async def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=CLOSE_S)
        self._closed = True
        self._file.close()

    # -- reading

    def _taken_in(self, data: bytes) -> list[JournalEntry]:
        """Return the requests of a file that are not done with."""
        entries: dict[int, JournalEntry] = {}
        at, reason = 0, ""
        model = self._model
        while at < len(data) and not reason:
            record, nbytes, reason = _record_at(data, at)
            match record:
                case OpenedRecord(version, model, _):
                    if version != PROTOCOL_VERSION:
                        reason = f"it is of protocol version {version}, this front speaks {PROTOCOL_VERSION}"
                case AcceptedRecord():
                    entries[record.number] = JournalEntry(
                        record.number, record.ticket, record.request, record.form, record.starts
                    )
                case StepRecord():
                    _replay(record, entries)
            at += nbytes
        if reason:
            log.warning(
                "event=journal_cut file=%s at=%d bytes=%d reason=%r", self._file.name, at, len(data) - at, reason
            )
        left = [entry for entry in entries.values() if entry.end is None or entry.end.reason != "cancelled"]
        for entry in left:
            entry.starts += 1
            if entry.end is None and model != self._model:
                entry.end = self._failed(f"the front came back with another model: {self._model} instead of {model}")
            elif entry.end is None and entry.starts > MOST_STARTS:
                entry.end = self._failed(
                    f"the front was lost {MOST_STARTS} times before it had the next token of this answer, which was "
                    "given up"
                )
            entry.note_accepted()
        return left

    def _failed(self, message: str) -> EndRecord:
        return EndRecord("failed", failure=Failed.of(NodeError(message, node=self._node)))

    # -- writing

    def _write(self, data: bytes, then: Callable[[], object] = lambda: None) -> StorageError | None:
        """Write, and then call back; return why nothing can be written, if that is known at once."""
        if self.failure is not None or self._closed:
            then()
        elif self._workers is None:
            work = self._work(data)
            try:
                self._wrote(work())
            except OSError as e:
                self._fail(e)
            then()
        else:
            self._queue.append((data, then))
            self._begin(self._workers)
        return self.failure

    def _begin(self, workers: BackgroundWorkers) -> None:
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_queue(workers))

    async def _write_queue(self, workers: BackgroundWorkers) -> None:
        """Write what is queued, together, until nothing is; then call back."""
        try:
            while self._queue or self.failure is not None:
                batch, self._queue = self._queue, []
                try:
                    self._wrote(await workers.run(self._work(b"".join(data for data, _ in batch))))
                except OSError as e:
                    self._fail(e)
                    batch, self._queue = batch + self._queue, []
                    break
                finally:
                    for _, then in batch:
                        then()
        finally:
            self._writing = None

    def _work(self, data: bytes) -> Callable[[], int]:
        """Return what writes ``data``, and returns the length that the file then has. From time to time, and after a
        failure, it writes the whole file instead, which has ``data`` already."""
        sync = self._workers is not None
        if self.failure is not None or self.bytes + len(data) > self._most:
            opened = _framed(OpenedRecord(PROTOCOL_VERSION, self._model, self._node))
            whole = b"".join([opened, *(entry.whole() for entry in self.entries.values())])
            if self._mirror is not None:
                self._mirror("all", whole)
            return partial(self._rewrite, whole, sync)
        if self._mirror is not None:
            self._mirror("more", data)
        return partial(self._append, data, sync)

    def _append(self, data: bytes, sync: bool) -> int:
        self._file.append(data)
        if sync:
            self._file.sync()
        return self.bytes + len(data)

    def _rewrite(self, data: bytes, sync: bool) -> int:
        self._file.replace(data, sync=sync)
        self._most = max(LEAST_BYTES, 2 * len(data))
        return len(data)

    def _wrote(self, nbytes: int) -> None:
        self.bytes = nbytes
        if self.failure is not None:
            self.failure = None
            log.info("event=journal_written file=%s", self._file.name)

    def _fail(self, error: OSError) -> None:
        if self.failure is None:
            log.error("event=journal_failed file=%s reason=%r", self._file.name, error.strerror)
        self.failure = StorageError(
            f"no request is taken, as it could not be kept: the journal {self._file.name} cannot be written: "
            f"{error.strerror}; make room, or set recovery.journal to off"
        )
        if not self._closed:
            self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        if self._workers is not None:
            self._begin(self._workers)
            return
        try:
            self._wrote(self._work(b"")())
        except OSError as e:
            self._fail(e)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(OpenedRecord | AcceptedRecord | StepRecord).decode


def _framed(record: OpenedRecord | AcceptedRecord | StepRecord) -> bytes:
    packed = _encode(record)
    return _FRAME.pack(len(packed), _digest(packed)) + packed


def _digest(packed: bytes | memoryview) -> bytes:
    return hashlib.blake2b(packed, digest_size=8).digest()


def _record_at(data: bytes, at: int) -> tuple[OpenedRecord | AcceptedRecord | StepRecord | None, int, str]:
    """Return the record at ``at`` and its length with its frame, or why there is none."""
    start = at + _FRAME.size
    if start > len(data):
        return None, 0, "the last record is torn"
    nbytes, digest = _FRAME.unpack_from(data, at)
    if start + nbytes > len(data):
        return None, 0, "the last record is torn"
    packed = memoryview(data)[start : start + nbytes]
    if _digest(packed) != digest:
        return None, 0, "a record is damaged"
    try:
        record = _decode(packed)
    except msgspec.DecodeError as e:
        return None, 0, f"a record cannot be understood: {e}"
    if isinstance(record, OpenedRecord) != (at == 0):
        return None, 0, "this is no journal"
    return record, _FRAME.size + nbytes, ""


def _replay(step: StepRecord, entries: dict[int, JournalEntry]) -> None:
    """Take in what a step brought."""
    values: Iterable[int] = iter(step.tokens)
    for number, token in zip(values, values, strict=False):
        if entry := entries.get(number):
            entry.tokens.append(token)
            entry.starts = 0
    for number, score in step.scores:
        if entry := entries.get(number):
            entry.scores.append(score)
    for number, scores in step.prompt_scores:
        if entry := entries.get(number):
            entry.prompt_scores += scores
    for number, beginning in step.begun:
        if entry := entries.get(number):
            entry.beginning = beginning
    for number, end in step.ends:
        if entry := entries.get(number):
            entry.end = end
