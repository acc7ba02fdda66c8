"""What a batch has answered so far, in a file beside its output, so that it goes on where it was killed.

The journal is a JSON text a line: first what batch it is of, then each answer with the number of its input line, in the
order in which they came. A line is written in one piece, so that whatever ends the process leaves whole lines and at
most one torn one at the end, which the next run cuts off.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from lamina.errors import ConfigError, StorageError

_VERSION = 1


class _JournalHead(msgspec.Struct, frozen=True):
    lamina_batch: int
    digest: str
    """Tells the input from all others."""


class _JournalLine(msgspec.Struct, frozen=True):
    line: int
    answer: msgspec.Raw


class Journal:
    """Holds the answers of one batch, by the number of the input line: ``with Journal(output, digest) as journal``.

    Entering raises ConfigError if another process writes it, or if it is of another input.
    """

    def __init__(self, output: Path, digest: str) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self._digest = digest
        self._answers: dict[int, tuple[int, int]] = {}
        """Where each answer lies in the file: offset and length of its line."""
        self.was_there = False
        """Whether an earlier run has left it."""
        self._file = -1
        self._end = 0

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise self._unwritable(e) from e
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path} is in use: this batch is running already") from None
            self._load()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def __contains__(self, line: int) -> bool:
        return line in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, line: int, answer: dict[str, Any]) -> None:
        """Keep the answer to a line. StorageError says that it cannot be written; then nothing of it is kept."""
        assert line not in self._answers
        self._append(msgspec.json.encode(_JournalLine(line, msgspec.Raw(msgspec.json.encode(answer)))), line)

    def finish(self) -> None:
        """Write the output, in the order of the input, put it into its place as a whole, and remove the journal."""
        beside = self.output.with_name(f".{self.output.name}.{os.getpid()}.part")
        try:
            try:
                with beside.open("wb") as file:
                    for line in sorted(self._answers):
                        offset, nbytes = self._answers[line]
                        entry = msgspec.json.decode(os.pread(self._file, nbytes, offset), type=_JournalLine)
                        file.write(bytes(entry.answer) + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self.output)
            finally:
                beside.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        except OSError as e:
            raise self._unwritable(e) from e

    def _load(self) -> None:
        """Take in what an earlier run wrote, and cut off what it did not finish."""
        with open(self._file, "rb", closefd=False) as file:
            first = file.readline()
            if not first.endswith(b"\n"):
                self._end = 0  # a run that was killed before it wrote anything, or there was none
                self._cut()
                self._append(msgspec.json.encode(_JournalHead(_VERSION, self._digest)))
                return
            try:
                header = msgspec.json.decode(first, type=_JournalHead)
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                raise ConfigError(f"{self.path} is no journal of a batch; remove it, or name another output") from e
            if header != _JournalHead(_VERSION, self._digest):
                raise ConfigError(
                    f"{self.path} is of a batch with another input; remove it to begin anew, or name another output"
                )
            self.was_there = True
            self._end = len(first)
            while (raw := file.readline()).endswith(b"\n"):
                try:
                    entry = msgspec.json.decode(raw, type=_JournalLine)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    break
                self._answers[entry.line] = self._end, len(raw)
                self._end += len(raw)
        self._cut()

    def _cut(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as e:
            raise self._unwritable(e) from e

    def _append(self, text: bytes, line: int | None = None) -> None:
        data = text + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
        except OSError as e:
            self._cut()
            raise self._unwritable(e) from e
        if line is not None:
            self._answers[line] = self._end, len(data)
        self._end += len(data)

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{error.filename or self.path} cannot be written: {error.strerror}; "
            "what was answered before is kept, so the same command goes on"
        )
