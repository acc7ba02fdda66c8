"""A batch answers every line once, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lamina.errors import CapacityError, NodeError
from lamina.serve.batch.journal import Journal
from lamina.serve.batch.lines import InputLine, read_input
from lamina.serve.batch.run import AnsweredLine, run


class Counting:
    """Counts what a batch tells."""

    total = before = failed = tokens = done = 0

    def begun(self, total: int, done: int) -> None:
        self.total, self.before = total, done

    def answered(self, answered: AnsweredLine) -> None:
        self.done += 1
        self.failed += answered.status >= 400
        self.tokens += answered.tokens


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    requests = [
        {"custom_id": f"id {i}", "url": "/v1/completions", "body": {"prompt": f"{i % 7} {i}"}} for i in range(200)
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests) + "{\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_that_fails_again_and_again_is_complete_at_last(path: Path, tmp_path: Path) -> None:
    """The front is lost after a random number of answers, many times; in the end each line has one answer, in order."""
    random, output = Random(5), tmp_path / "out.jsonl"
    batch = read_input(path)
    asked: list[str] = []
    runs = 0

    async def attempt(answers: int) -> bool:
        watcher = Counting()

        async def answer(line: InputLine) -> AnsweredLine:
            nonlocal answers
            await asyncio.sleep(random.random() * 1e-3)
            if answers == 0:
                raise NodeError("the front was lost", node="c0")
            answers -= 1
            asked.append(line.custom_id)
            return AnsweredLine(200, {"text": line.body["prompt"]}, tokens=3)

        with Journal(output, batch.digest) as journal:
            known, lost = len(journal), False
            try:
                await run(batch, journal, answer, watcher, concurrency=16)
            except* NodeError:
                lost = True
            assert watcher.before == known
            if not lost:
                journal.finish()
            return not lost

    while not asyncio.run(attempt(random.randrange(40))):
        runs += 1
        assert not output.exists()

    assert runs > 3
    assert len(asked) == len(set(asked)) == 200  # what was answered was never asked again
    answers = lines_of(output)
    assert [a["custom_id"] for a in answers] == [f"id {i}" for i in range(200)] + [None]
    assert answers[-1]["error"]["code"] == "invalid_line"
    assert all(a["response"]["body"] == {"text": f"{i % 7} {i}"} for i, a in enumerate(answers[:-1]))


def test_a_full_queue_is_waited_for(path: Path, tmp_path: Path) -> None:
    """A line that the cluster has no place for is asked again; never more than ``concurrency`` are under way."""
    batch, watcher = read_input(path), Counting()
    under_way = most = refused = 0

    async def answer(line: InputLine) -> AnsweredLine:
        nonlocal under_way, most, refused
        if under_way >= 8:
            refused += 1
            raise CapacityError("full", retry_after_s=0.001)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return AnsweredLine(400 if line.custom_id == "id 3" else 200, {})

    async def main() -> None:
        with Journal(tmp_path / "out.jsonl", batch.digest) as journal:
            await run(batch, journal, answer, watcher, concurrency=20)
            journal.finish()

    asyncio.run(main())
    assert refused > 0
    assert most == 8
    assert (watcher.total, watcher.done, watcher.failed) == (201, 201, 2)
