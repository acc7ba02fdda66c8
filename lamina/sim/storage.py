"""Files that outlive the processes of a simulation, in memory."""

from __future__ import annotations

import errno
from pathlib import Path

from lamina.errors import StorageError


class SimDisk:
    """Holds the log files of one machine, by path. When ``is_full``, nothing can be written."""

    def __init__(self) -> None:
        self.files: dict[Path, bytearray] = {}
        self.is_full = False
        self._open: dict[Path, _SimLog] = {}

    def open(self, path: Path, process: str = "") -> _SimLog:
        """Open a log file, which may be there already, in a process. StorageError if another one has it open."""
        if path in self._open:
            raise StorageError(f"{path} is in use by another process")
        log = self._open[path] = _SimLog(self, path, process)
        self.files.setdefault(path, bytearray())
        return log

    def kill(self, process: str) -> None:
        """A process is gone, with the files that it has open."""
        for log in list(self._open.values()):
            if log.process == process:
                log.close()

    def _close(self, log: _SimLog) -> None:
        if self._open.get(log.path) is log:
            del self._open[log.path]


class _SimLog:
    """See `lamina.runtime.storage.LogFile`."""

    def __init__(self, disk: SimDisk, path: Path, process: str) -> None:
        self.path = path
        self.process = process
        self.name = str(path)
        self._disk = disk
        self._is_open = True

    def read(self) -> bytes:
        return bytes(self._disk.files[self.path])

    def append(self, data: bytes) -> None:
        if self._may_write():
            self._disk.files[self.path] += data

    def sync(self) -> None:
        pass

    def replace(self, data: bytes, *, sync: bool) -> None:
        if self._may_write():
            self._disk.files[self.path][:] = data

    def close(self) -> None:
        self._is_open = False
        self._disk._close(self)

    def _may_write(self) -> bool:
        if self._is_open and self._disk.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._is_open  # what is left of a process that was killed does nothing any more
