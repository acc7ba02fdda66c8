"""The standby, a compute node that is to take the front's part, keeps a copy of the front's journal."""

from __future__ import annotations

import asyncio
import logging

from lamina.runtime.storage import LogFile
from lamina.runtime.workers import BackgroundWorkers
from lamina.wire.orders import Records

log = logging.getLogger("lamina.front")

CLOSE_S = 5.0
"""How long the end of a copy waits for what is being written."""


class JournalCopy:
    """Keeps what the front writes into its journal, on the node's loop of the standby.

    It is in memory; with a ``file``, it is on the disk as well, soon after it has come, and a thread of ``workers``
    waits for that. The front waits for none of it.
    """

    def __init__(self, file: LogFile | None, workers: BackgroundWorkers) -> None:
        self.data = bytearray()
        """All records, as they stand in the front's file."""
        self._file = file
        self._workers = workers
        self._new = bytearray()
        """What is not in the file yet."""
        self._is_whole = False
        """Whether the file has all that came before ``_new``."""
        self._writing: asyncio.Task[None] | None = None

    def take(self, records: Records) -> None:
        """Take what the front tells."""
        if records.kind != "more":
            self.data.clear()
            self._is_whole = False
        self.data += records.data
        self._new += records.data
        if self._file is not None and self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(self._file))

    async def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=CLOSE_S)
        if self._file is not None:
            self._file.close()

    async def _write(self, file: LogFile) -> None:
        try:
            while self._new or not self._is_whole:
                new, whole = bytes(self._new), None if self._is_whole else bytes(self.data)
                self._new.clear()
                self._is_whole = True
                try:
                    await self._workers.run(_written, file, new, whole)
                except OSError as e:  # what comes next is written with all that there is
                    log.error("event=journal_failed file=%s reason=%r", file.name, e.strerror)
                    self._is_whole = False
                    return
        finally:
            self._writing = None


def _written(file: LogFile, new: bytes, whole: bytes | None) -> None:
    """Write to the disk what is new, or all."""
    if whole is not None:
        file.replace(whole, sync=True)
    else:
        file.append(new)
        file.sync()
