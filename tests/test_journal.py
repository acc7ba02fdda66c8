"""The journal keeps what it was given, whatever ends its process, and goes on without a disk that is full."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import StorageError
from lamina.front import journal as journals
from lamina.front.journal import MOST_STARTS, Beginning, EndRecord, JournalEntry, RequestJournal, StepRecord
from lamina.runtime.storage import LocalLog
from lamina.runtime.workers import BackgroundWorkers
from lamina.sim.storage import SimDisk
from lamina.sim.world import World
from lamina.wire.requests import ChatForm, Failed, Regex, Request, Sampling, Score

T = TypeVar("T")
PLACE = Path("requests.journal")
MODEL = "fingerprint"
REQUEST = Request([5, 2**31, 7], 50, Sampling(temperature=1.0, seed=2**63 - 1, logit_bias={7: -1.0}), name="ä")
FORM = ChatForm("json", "think", opened=True, hidden=["</s>"])
SCORE = Score(-0.5, 2, [(3, -0.25), (4, float("-inf"))])


def run(work: Callable[[], Awaitable[T]]) -> T:
    with World(1, tracing=False) as world:
        return world.run(work())


def ticket(number: int) -> str:
    return f"{number:032x}"


class Disk(LocalLog):
    """A log file on a disk that may be full, and a record of what is done to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.room: int | None = None
        self.done: list[str] = []

    def append(self, data: bytes) -> None:
        if self.room is not None and len(data) > self.room:
            super().append(data[: self.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(data)
        self.done.append("append")

    def sync(self) -> None:
        super().sync()
        self.done.append("sync")

    def replace(self, data: bytes, *, sync: bool) -> None:
        if self.room is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().replace(data, sync=sync)
        self.done.append("replace and sync" if sync else "replace")


async def opened(
    path: Path, *, model: str = MODEL, syncs: bool = False
) -> tuple[RequestJournal, Disk, list[JournalEntry]]:
    file = Disk(path)
    journal = RequestJournal(file, node="c0", model=model, workers=BackgroundWorkers() if syncs else None)
    return journal, file, await journal.open(BackgroundWorkers())


def plain(entry: JournalEntry) -> tuple[Any, ...]:
    """All of an entry that has to last."""
    values = entry.number, entry.ticket, entry.request, entry.form, entry.beginning, entry.end
    return (*values, list(entry.tokens), list(entry.scores), list(entry.prompt_scores))


def state(journal: RequestJournal) -> list[tuple[Any, ...]]:
    return [plain(entry) for entry in journal.entries.values()]


async def kept(path: Path) -> list[tuple[Any, ...]]:
    """What the next process finds."""
    journal, _, entries = await opened(path)
    await journal.close()
    return [plain(entry) for entry in entries]


def act(journal: RequestJournal, chance: Random, number: int) -> None:
    """Do something at random that a front does; ``number`` is a new one."""
    entries = [entry for entry in journal.entries.values() if entry.end is None]
    chosen = chance.sample(entries, min(len(entries), chance.randint(1, 4)))
    acts = ("accept", "accept", "step", "step", "step", "step", "score", "end", "drop")
    match chance.choice(acts) if entries else "accept":
        case "accept":
            request = chance.choice((REQUEST, Request(list(range(chance.randint(1, 200))), constraint=Regex("a+"))))
            journal.accept(ticket(number), request, chance.choice((None, FORM)))
        case "step":
            step = StepRecord()
            for entry in chosen:
                if not entry.tokens:
                    step.begin(entry, Beginning(3, 0.5, 1.5))
                step.token(entry, chance.randrange(2**31), SCORE if entry.number % 2 else None)
                if chance.random() < 0.1:
                    step.end(entry, EndRecord("stop", 7, 2.5))
            if step:
                journal.write(step, lambda: None)
        case "score":
            step = StepRecord()
            for entry in chosen:
                step.prompt_scored(entry, [SCORE] * 3)
            if step:
                journal.write(step, lambda: None)
        case "end":
            for entry in chosen[:1]:
                journal.end(entry, EndRecord("failed", failure=Failed(kind="RequestError", message="no")))
        case "drop":
            for entry in chance.sample(sorted(journal.entries), min(1, len(journal.entries))):
                journal.drop(entry)


def found(states: list[tuple[int, list[tuple[Any, ...]]]], nbytes: int) -> list[tuple[Any, ...]]:
    """What was there when the file had so many bytes, or fewer."""
    return next(entries for length, entries in reversed(states) if length <= nbytes)


def has_all(there: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> bool:
    """Whether all that is wanted is there, and else only answers that are over."""
    return [entry for entry in there if entry in wanted] == wanted and all(e[5] for e in there if e not in wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(200, 5000))
def test_what_was_written_is_found_again(seed: int, syncs: bool, least: int) -> None:
    """Every request, token, score and end, in the order of the requests; however often the file was rewritten, and
    however often the front has started. What was done with is gone."""
    chance = Random(seed)

    async def work(path: Path) -> None:
        expected: list[tuple[Any, ...]] = []
        for life in range(4):
            journal, _, entries = await opened(path, syncs=syncs)
            assert has_all([plain(entry) for entry in entries], expected)
            assert state(journal) == [plain(entry) for entry in entries]
            for number in range(chance.randint(0, 60)):
                act(journal, chance, 1000 * life + number)
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
            expected = state(journal)
            await journal.close()

    before = journals.LEAST_BYTES
    journals.LEAST_BYTES = least
    try:
        with TemporaryDirectory() as folder:
            run(lambda: work(Path(folder) / "front.journal"))
    finally:
        journals.LEAST_BYTES = before


def written(path: Path, seed: int = 3, acts: int = 40) -> list[tuple[int, list[tuple[Any, ...]]]]:
    """Write a journal; by the length of the file after each record, what has to be found."""

    async def work() -> list[tuple[int, list[tuple[Any, ...]]]]:
        chance = Random(seed)
        journal, _, _ = await opened(path)
        states = [(0, []), (journal.bytes, [])]
        for number in range(acts):
            act(journal, chance, number)
            if journal.bytes != states[-1][0]:
                assert path.stat().st_size == journal.bytes  # noqa: ASYNC240 - nothing else runs
                states.append((journal.bytes, state(journal)))
        await journal.close()
        return states

    return run(work)


async def opened_with(data: bytes) -> tuple[RequestJournal, SimDisk, list[JournalEntry]]:
    """A journal whose file has these bytes, in memory, as that is faster."""
    disk = SimDisk()
    disk.files[PLACE] = bytearray(data)
    journal = RequestJournal(disk.open(PLACE), node="c0", model=MODEL)
    return journal, disk, await journal.open(BackgroundWorkers())


def test_a_torn_end_is_cut_wherever_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that was killed, or a machine, in the middle of a write: all whole records before are kept, the loss is
    reported, and the file can be written again."""
    path = tmp_path / "front.journal"
    states = written(path, acts=25)
    data = path.read_bytes()
    lengths = {length for length, _ in states}
    assert len(lengths) > 15

    async def work() -> None:
        for nbytes in range(len(data) + 1):
            caplog.clear()
            journal, disk, entries = await opened_with(data[:nbytes])
            assert has_all([plain(entry) for entry in entries], found(states, nbytes)), nbytes
            assert ("event=journal_cut" in caplog.text) == (nbytes not in lengths)
            assert "is torn" in caplog.text or nbytes in lengths
            journal.accept(ticket(9999), REQUEST, None)
            await journal.close()
            _, _, again = await opened_with(bytes(disk.files[PLACE]))
            assert again[-1].ticket == ticket(9999)

    run(work)


def test_a_damaged_byte_costs_what_is_behind_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is: everything before its record is kept, nothing wrong is taken in, and the loss is reported."""
    path = tmp_path / "front.journal"
    states = written(path, acts=25)
    data = path.read_bytes()
    chance = Random(5)

    async def work() -> None:
        for at in range(len(data)):
            caplog.clear()
            _, _, entries = await opened_with(data[:at] + bytes([data[at] ^ chance.randint(1, 255)]) + data[at + 1 :])
            assert has_all([plain(entry) for entry in entries], found(states, at)), at
            assert "event=journal_cut" in caplog.text

    run(work)


@pytest.mark.parametrize("data", [b"\0" * 64, b"no journal at all, but some text that is longer than a frame", b"x"])
def test_another_file_is_no_journal(data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is reported, and the front starts with nothing."""
    path = tmp_path / "front.journal"
    path.write_bytes(data)
    assert run(lambda: kept(path)) == []
    assert "event=journal_cut" in caplog.text


@pytest.mark.parametrize("syncs", [False, True])
def test_a_full_disk_stops_requests_and_nothing_else(
    syncs: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What runs goes on; a new request is refused with the reason. When there is room again, the whole is written, also
    what came meanwhile."""
    path = tmp_path / "front.journal"
    caplog.set_level(logging.INFO)

    async def work() -> None:
        journal, file, _ = await opened(path, syncs=syncs)
        entry = journal.accept(ticket(1), REQUEST, None)
        told: list[int] = []

        async def step(token: int) -> None:
            record = StepRecord()
            record.token(entry, token, None)
            journal.write(record, lambda: told.append(token))
            await asyncio.sleep(0.1)

        await step(1)
        file.room = 5
        await step(2)
        await step(3)
        assert told == [1, 2, 3]
        with pytest.raises(StorageError, match=r"front.journal cannot be written: No space left on device; make room"):
            journal.accept(ticket(2), REQUEST, None)
        await asyncio.sleep(5)
        assert caplog.text.count("event=journal_failed") == 1
        assert journal.failure is not None
        file.room = None
        await asyncio.sleep(2)
        assert journal.failure is None
        assert "event=journal_written" in caplog.text
        await step(4)
        journal.accept(ticket(3), REQUEST, None)
        await asyncio.sleep(0.1)
        await journal.close()
        assert [(e[1], e[6]) for e in await kept(path)] == [(ticket(1), [1, 2, 3, 4]), (ticket(3), [])]

    run(work)


def test_the_disk_may_be_full_at_the_start(tmp_path: Path) -> None:
    """What an earlier front has left is there all the same."""
    path = tmp_path / "front.journal"
    states = written(path)

    async def work() -> None:
        file = Disk(path)
        file.room = 0
        journal = RequestJournal(file, node="c0", model=MODEL)
        entries = await journal.open(BackgroundWorkers())
        assert has_all([plain(entry) for entry in entries], states[-1][1])
        with pytest.raises(StorageError):
            journal.accept(ticket(9999), REQUEST, None)
        await journal.close()

    run(work)
    assert has_all(run(lambda: kept(path)), states[-1][1])


def test_a_machine_s_end_loses_nothing_that_was_told(tmp_path: Path) -> None:
    """A client gets a token after the disk has it. What comes while it is written is written together."""

    async def work() -> None:
        journal, file, _ = await opened(tmp_path / "front.journal", syncs=True)
        await asyncio.sleep(0.1)
        entry = journal.accept(ticket(1), REQUEST, None)
        await asyncio.sleep(0.1)
        file.done.clear()
        for token in range(5):
            step = StepRecord()
            step.token(entry, token, None)
            journal.write(step, lambda token=token: file.done.append(f"tell {token}"))
        assert not [event for event in file.done if event.startswith("tell")]
        await asyncio.sleep(0.1)
        tokens = [event for event in file.done if event.startswith("tell")]
        assert tokens == [f"tell {token}" for token in range(5)]
        assert file.done[:2] == ["append", "sync"]
        assert len(file.done) - len(tokens) <= 4
        for i, event in enumerate(file.done):
            assert not event.startswith("tell") or "sync" in file.done[:i]
        await journal.close()

    run(work)


def test_the_file_does_not_grow_with_what_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of requests, of which a few run at a time: it stays within twice of what they need, or the least."""
    monkeypatch.setattr(journals, "LEAST_BYTES", 20_000)
    path = tmp_path / "front.journal"

    async def work() -> None:
        journal, file, _ = await opened(path)
        longest = 0
        for number in range(2000):
            entry = journal.accept(ticket(number), REQUEST, None)
            step = StepRecord()
            step.token(entry, 7, None)
            step.end(entry, EndRecord("stop"))
            journal.write(step, lambda: None)
            if number >= 5:
                journal.drop(ticket(number - 5))
            longest = max(longest, path.stat().st_size)
        await journal.close()
        assert longest < 21_000
        assert 20 < file.done.count("replace") < 200
        assert len(await kept(path)) >= 5

    run(work)


def test_one_process_at_a_time_has_it(tmp_path: Path) -> None:
    """Also when the file was replaced meanwhile; the next one may when it has closed it."""
    path = tmp_path / "folder" / "front.journal"

    async def work() -> None:
        journal, _, _ = await opened(path)
        with pytest.raises(StorageError, match="is in use by another process"):
            LocalLog(path)
        await journal.close()
        journal, _, _ = await opened(path)
        await journal.close()

    run(work)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"front.journal cannot be opened: File exists"):
        LocalLog(tmp_path / "file" / "front.journal")


def test_a_request_that_ends_the_front_again_and_again_is_given_up(tmp_path: Path) -> None:
    """After some starts without a token; with one, it goes on."""
    path = tmp_path / "front.journal"

    async def work() -> None:
        journal, _, _ = await opened(path)
        for number in (1, 2):
            journal.accept(ticket(number), REQUEST, None)
        await journal.close()
        for _ in range(MOST_STARTS):
            journal, _, (poison, good) = await opened(path)
            assert poison.end is good.end is None
            step = StepRecord()
            step.token(good, 7, None)
            journal.write(step, lambda: None)
            await journal.close()
        journal, _, (poison, good) = await opened(path)
        assert good.end is None
        assert poison.end is not None
        assert poison.end.failure is not None
        assert f"the front was lost {MOST_STARTS} times" in poison.end.failure.message
        await journal.close()

    run(work)


def test_another_model_does_not_go_on(tmp_path: Path) -> None:
    """Its answers would be no continuation: clients are told so; those that are whole can still be had."""
    path = tmp_path / "front.journal"

    async def work() -> None:
        journal, _, _ = await opened(path)
        journal.accept(ticket(1), REQUEST, None)
        whole = journal.accept(ticket(2), REQUEST, None)
        journal.end(whole, EndRecord("stop"))
        await journal.close()
        journal, _, (broken, over) = await opened(path, model="other")
        assert broken.end is not None
        assert broken.end.failure is not None
        assert "another model: other instead of fingerprint" in broken.end.failure.message
        assert over.end == EndRecord("stop")
        await journal.close()

    run(work)
