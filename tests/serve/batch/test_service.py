"""Batches run in the background: to their end, to a cancellation, and on after the server was killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import CapacityError, ConfigError, NodeError, RequestError, StorageError
from lamina.serve.batch.files import FileStore
from lamina.serve.batch.lines import InputLine
from lamina.serve.batch.run import AnsweredLine
from lamina.serve.batch.service import Batch, BatchService

NOW_S = 1e9


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def lines(count: int, url: str = "/v1/completions") -> bytes:
    requests = [
        {"custom_id": f"id {i}", "method": "POST", "url": url, "body": {"prompt": str(i)}} for i in range(count)
    ]
    return "".join(json.dumps(request) + "\n" for request in requests).encode()


async def reached(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)


class Asked:
    """Answers lines, and keeps what it was asked."""

    def __init__(self, delay_s: float = 0.0, fail_at: str = "") -> None:
        self.ids: list[str] = []
        self._delay_s = delay_s
        self._fail_at = fail_at

    def __call__(self, owner: str) -> Callable[[InputLine], Any]:
        async def answer(line: InputLine) -> AnsweredLine:
            await asyncio.sleep(self._delay_s)
            if line.custom_id == self._fail_at:
                raise NodeError("the front was lost", node="c0")
            self.ids.append(line.custom_id)
            return AnsweredLine(400 if line.custom_id == "id 3" else 200, {"owner": owner}, 1)

        return answer


class Server:
    """Holds what a server process has of files and batches."""

    def __init__(self, folder: Path, asked: Asked, now: Callable[[], float] = lambda: NOW_S) -> None:
        folder.chmod(0o700)
        self.files = FileStore(folder / "files", 10**6)
        self.batches = BatchService(folder / "batches", self.files, asked, now=now)

    async def upload(self, data: bytes, owner: str = "me", purpose: str = "batch") -> str:
        file = await self.files.add(chunks(data), filename="in.jsonl", purpose=purpose, owner=owner, now_s=NOW_S)
        return file.id

    def create(self, file: str, owner: str = "me", endpoint: str = "/v1/completions") -> Batch:
        return self.batches.create(endpoint, file, "24h", {"a": "b"}, owner)

    async def until(self, id_: str, *states: str) -> Batch:
        await reached(lambda: self.batches.get(id_, "me").status in states)
        return self.batches.get(id_, "me")

    def answers(self, file: str | None) -> list[dict[str, Any]]:
        assert file is not None
        return [json.loads(line) for line in self.files.path(file, "me").read_text().splitlines()]


async def serving(server: Server, work: Callable[[], Any]) -> Any:
    task = asyncio.create_task(server.batches.serve())
    try:
        async with asyncio.timeout(30):
            return await work()
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def test_a_batch_becomes_two_files(tmp_path: Path) -> None:
    """Answers and failures come out apart, each line once and in order."""

    async def main() -> None:
        server = Server(tmp_path, asked := Asked())
        first = server.create(
            await server.upload(lines(10) + lines(2, "/v1/chat/completions").replace(b"id ", b"x ") + b"{")
        )
        second = server.create(await server.upload(lines(1)))
        batch = await serving(server, lambda: server.until(second.id, "completed"))
        assert batch.request_counts.completed == 1

        batch = server.batches.get(first.id, "me")
        assert batch.status == "completed"
        answers, errors = server.answers(batch.output_file_id), server.answers(batch.error_file_id)
        assert [a["custom_id"] for a in answers] == [f"id {i}" for i in range(10) if i != 3]
        assert [e["custom_id"] for e in errors] == ["id 3", "x 0", "x 1", None]
        assert "that of the batch" in errors[1]["error"]["message"]
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (13, 9, 4)
        assert len(asked.ids) == 11
        shown = batch.shown()
        assert (shown["object"], shown["metadata"], shown["errors"]) == ("batch", {"a": "b"}, None)
        async with asyncio.timeout(5):
            await reached(lambda: {path.suffix for path in (tmp_path / "batches").iterdir()} == {".json"})

    asyncio.run(main())


def test_a_batch_goes_on_in_the_next_process(tmp_path: Path) -> None:
    """The server ends in the middle; the next one answers the rest, and nothing twice."""
    asked = Asked(delay_s=0.001)

    async def first() -> str:
        server = Server(tmp_path, asked)
        batch = server.create(await server.upload(lines(3000)))

        async def some() -> None:
            await reached(lambda: len(asked.ids) >= 500)

        await serving(server, some)
        return batch.id

    async def second(id_: str) -> None:
        server = Server(tmp_path, asked)
        assert server.batches.get(id_, "me").status == "in_progress"
        batch = await serving(server, lambda: server.until(id_, "completed"))
        assert len(server.answers(batch.output_file_id)) == 2999
        assert batch.request_counts.total == 3000

    id_ = asyncio.run(first())
    assert 500 <= len(asked.ids) < 3000
    asyncio.run(second(id_))
    assert len(asked.ids) == len(set(asked.ids)) == 3000


def test_a_batch_whose_time_is_over_while_no_server_runs(tmp_path: Path) -> None:
    """The next server hands over what was answered before; nothing of it is lost."""
    asked, now = Asked(delay_s=0.001), NOW_S

    async def first() -> str:
        server = Server(tmp_path, asked, now=lambda: now)
        batch = server.create(await server.upload(lines(3000)))
        await serving(server, lambda: reached(lambda: len(asked.ids) >= 500))
        return batch.id

    async def second(id_: str) -> None:
        server = Server(tmp_path, asked, now=lambda: now)
        batch = await serving(server, lambda: server.until(id_, "expired"))
        answers = server.answers(batch.output_file_id)
        assert len(answers) == batch.request_counts.completed == len(set(asked.ids) - {"id 3"})
        assert batch.request_counts.total == 3000

    id_ = asyncio.run(first())
    now += 25 * 3600
    asyncio.run(second(id_))


def test_a_cancelled_batch_keeps_its_answers(tmp_path: Path) -> None:
    """What has been answered becomes the output; a batch that is over cannot be cancelled."""

    async def main() -> None:
        server = Server(tmp_path, asked := Asked(delay_s=0.005))
        batch = server.create(await server.upload(lines(3000)))

        async def cancel() -> Batch:
            await reached(lambda: len(asked.ids) >= 300)
            assert server.batches.cancel(batch.id, "me").status == "cancelling"
            return await server.until(batch.id, "cancelled")

        ended = await serving(server, cancel)
        assert len(server.answers(ended.output_file_id)) == len(set(asked.ids) - {"id 3"}) < 2999
        with pytest.raises(RequestError, match=r"is cancelled already"):
            server.batches.cancel(batch.id, "me")

    asyncio.run(main())


def test_time_over_and_failures(tmp_path: Path) -> None:
    """A batch that took too long has expired; one that cannot go on has failed and says why; the next one runs."""

    async def main() -> None:
        now = NOW_S
        server = Server(tmp_path, Asked(fail_at="id 7"), now=lambda: now)
        late = server.create(await server.upload(lines(3)))
        now += 25 * 3600
        lost = server.create(await server.upload(lines(10)))
        empty = server.create(await server.upload(b"\n"))
        good = server.create(await server.upload(lines(3)))
        await serving(server, lambda: server.until(good.id, "completed"))
        assert server.batches.get(late.id, "me").status == "expired"
        assert server.batches.get(lost.id, "me").errors[0]["message"] == "the front was lost"
        assert "no requests" in server.batches.get(empty.id, "me").errors[0]["message"]
        assert [batch.id for batch in server.batches.of("me")][-1] == late.id

    asyncio.run(main())


def test_files_and_batches_belong_to_who_made_them(tmp_path: Path) -> None:
    """Another key sees neither, and cannot make a batch of a file that is not its own."""

    async def main() -> None:
        server = Server(tmp_path, Asked())
        file = await server.upload(lines(1))
        batch = server.create(file)
        for ask in (
            lambda: server.create(file, owner="other"),
            lambda: server.files.path(file, "other"),
            lambda: server.files.delete(file, "other"),
            lambda: server.batches.get(batch.id, "other"),
            lambda: server.files.path("../files/" + file, "me"),
        ):
            with pytest.raises(RequestError, match=r"^no (file|batch)"):
                ask()
        assert server.files.of("other") == server.batches.of("other") == []
        with pytest.raises(RequestError, match=r"^input_file_id: .* another purpose"):
            server.create(await server.upload(lines(1), purpose="user_data"))
        with pytest.raises(RequestError, match=r"^endpoint: expected one of"):
            server.create(file, endpoint="/v1/embeddings")
        server.files.delete(file, "me")
        assert all(found.purpose == "user_data" for found in server.files.of("me"))

    asyncio.run(main())


def test_files_are_bounded_and_private(tmp_path: Path) -> None:
    """What is over the limit leaves nothing behind; a folder that others may enter is refused."""

    async def main() -> None:
        server = Server(tmp_path, Asked())
        await server.upload(b"x" * 600_000)
        with pytest.raises(CapacityError, match=r"more than 400000 bytes"):
            await server.upload(b"x" * 400_001)
        await server.upload(b"x" * 400_000)
        assert len(list((tmp_path / "files").iterdir())) == 4

    asyncio.run(main())
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"can be entered by others"):
        FileStore(tmp_path / "open", 1)


def test_batches_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the server nor a batch ends, and what was answered is kept; with room, everything goes on."""
    monkeypatch.setattr("lamina.serve.batch.service.RETRY_S", 0.01)

    async def main() -> None:
        asked = Asked()
        server = Server(tmp_path, asked)
        batches = tmp_path / "batches"
        batch = server.create(await server.upload(lines(10)))
        full = batches / f"{batch.id}.partial"
        full.mkdir()  # it cannot be written, as on a full disk
        (batches / f"{batch.id}.answers.part").symlink_to("/dev/full")  # and later, once, not be handed over

        async def make_room() -> Batch:
            await asyncio.sleep(0.1)
            assert not asked.ids
            assert server.batches.get(batch.id, "me").status != "failed"
            full.rmdir()
            return await server.until(batch.id, "completed", "failed")

        ended: Batch = await serving(server, make_room)
        assert ended.status == "completed"
        assert len(server.answers(ended.output_file_id)) == 9
        assert len(asked.ids) == 10
        kept = {ended.input_file_id, ended.output_file_id, ended.error_file_id}
        assert {file.id for file in server.files.of("me")} == kept
        assert [path.name for path in batches.iterdir()] == [f"{batch.id}.json"]

    asyncio.run(main())


def test_a_batch_that_cannot_be_noted_is_not_taken(tmp_path: Path) -> None:
    """Whoever is told that the disk is full can be sure that nothing runs."""

    async def main() -> None:
        server = Server(tmp_path, Asked())
        file = await server.upload(lines(3))
        (tmp_path / "batches").rename(tmp_path / "away")  # stands for a full disk: nothing can be written there
        with pytest.raises(StorageError, match=r"cannot be written"):
            server.create(file)
        assert server.batches.of("me") == []

    asyncio.run(main())
