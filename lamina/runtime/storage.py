"""A log file grows at its end, and is now and then rewritten as a whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Protocol

from lamina.errors import StorageError


class LogFile(Protocol):
    """Holds bytes that outlive the process. All methods but `close` raise OSError, such as that of a full disk.

    It belongs to whoever opened it, who makes one call at a time, from any thread.
    """

    @property
    def name(self) -> str:
        """How messages call it."""

    def read(self) -> bytes:
        """Return all that is there."""

    def append(self, data: bytes) -> None:
        """Add to the end. After an error, a part of ``data`` may be there."""

    def sync(self) -> None:
        """Return when what is there also outlives the machine's power."""

    def replace(self, data: bytes, *, sync: bool) -> None:
        """Have ``data`` there instead of what was. Whatever happens meanwhile, one of both is there as a whole."""

    def close(self) -> None:
        """Let another process open it."""


class LocalLog:
    """The log file at ``path``, which only its owner may read, and which one process at a time has open.

    The folder is made if it is not there. StorageError says that it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The log itself is replaced, and a lock with it would be another one.
            self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise StorageError(f"{path} cannot be opened: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = _open(path)
        except BlockingIOError:
            os.close(self._lock)
            raise StorageError(f"{path} is in use by another process") from None
        except OSError as e:
            os.close(self._lock)
            raise StorageError(f"{path} cannot be opened: {e.strerror}") from e

    def read(self) -> bytes:
        """See `LogFile`, as for all others."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def append(self, data: bytes) -> None:
        _write(self._file, data)

    def sync(self) -> None:
        os.fdatasync(self._file)

    def replace(self, data: bytes, *, sync: bool) -> None:
        beside = self._path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        file = _open(beside)
        try:
            _write(file, data)
            if sync:
                os.fsync(file)
            beside.replace(self._path)
            if sync:
                _sync_folder(self._path.parent)
        except BaseException:
            os.close(file)
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        before, self._file = self._file, file
        os.close(before)

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
