"""Answer all lines of a batch that have no answer yet, many at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, Protocol

from lamina.errors import CapacityError
from lamina.serve.batch.journal import Journal
from lamina.serve.batch.lines import BadLine, BatchInput, InputLine, LinePlace

_LONGEST_PAUSE_S = 10.0
"""When the cluster's queue is full, the next try comes no later than this."""


class AnsweredLine(NamedTuple):
    """Holds what the API answered: its status, its body, and the tokens that the body counts."""

    status: int
    body: dict[str, Any]
    tokens: int = 0


Answer = Callable[[InputLine], Awaitable[AnsweredLine]]
"""Answers one request, as the HTTP endpoint would. CapacityError means that it may be asked again later; any other
error of Lamina's ends the batch, which another run continues."""


class Watcher(Protocol):
    """Is told how a batch proceeds."""

    def begun(self, total: int, done: int) -> None:
        """The batch has ``total`` lines, of which ``done`` were answered by earlier runs."""

    def answered(self, answered: AnsweredLine) -> None:
        """One more line is answered."""


async def run(batch: BatchInput, journal: Journal, answer: Answer, watcher: Watcher, *, concurrency: int) -> None:
    """Answer what ``journal`` lacks, at most ``concurrency`` lines at the same time.

    Every answer is in the journal before the next line begins in its place. If an error ends the batch, the answers
    that were complete are kept.
    """
    watcher.begun(batch.total, len(journal))
    for bad in batch.bad:
        if bad.number not in journal:
            journal.add(bad.number, record_of_bad(bad))
            watcher.answered(AnsweredLine(400, {}))
    left = batch.read([place for place in batch.places if place.number not in journal])
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(_work(left, journal, answer, watcher))


async def _work(
    left: Iterator[tuple[LinePlace, InputLine]], journal: Journal, answer: Answer, watcher: Watcher
) -> None:
    """Answer one line after another until none is left."""
    for place, line in left:
        answered = await _patiently(answer, line)
        journal.add(place.number, record_of(place, line, answered))
        watcher.answered(answered)


async def _patiently(answer: Answer, line: InputLine) -> AnsweredLine:
    while True:
        try:
            return await answer(line)
        except CapacityError as e:
            if e.retry_after_s is None:
                raise
            await asyncio.sleep(min(e.retry_after_s, _LONGEST_PAUSE_S))


def record_of(place: LinePlace, line: InputLine, answered: AnsweredLine) -> dict[str, Any]:
    """Return a line of the output."""
    id_ = f"batch_req_{place.number}"
    response = {"status_code": answered.status, "request_id": id_, "body": answered.body}
    return {"id": id_, "custom_id": line.custom_id, "response": response, "error": None}


def record_of_bad(bad: BadLine) -> dict[str, Any]:
    """Return the line of the output for one of the input that is no request."""
    error = {"code": "invalid_line", "message": bad.reason}
    return {"id": f"batch_req_{bad.number}", "custom_id": bad.custom_id, "response": None, "error": error}
