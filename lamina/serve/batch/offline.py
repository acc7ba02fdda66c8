"""The files and batches of one server: where they lie, and which process works on them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path

from lamina.errors import ConfigError
from lamina.serve.batch.files import FileStore, private_folder
from lamina.serve.batch.inside import Handler, Inside
from lamina.serve.batch.service import BatchService
from lamina.serve.service import Service

PRIORITY = -10
"""That of lines that name none: whoever waits for an answer goes first."""
LIMIT = 8 << 30
"""The most bytes of all files."""


def default_folder() -> Path:
    """Return where the files of a user's server lie. ConfigError for a user without a home."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as e:
        raise ConfigError("--files: this user has no home folder; name a folder") from e
    return state / "lamina" / "files"


class Offline:
    """Keeps files and runs batches in ``folder``. ConfigError if another server does so already."""

    def __init__(self, folder: Path, service: Service, handlers: Mapping[str, Handler]) -> None:
        private_folder(folder)
        try:
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be written: {e.strerror}; name another folder") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"{folder} is in use by another server; name another folder with --files") from None
        inside = Inside(service, handlers, patience_s=None, priority=PRIORITY)
        self.files = FileStore(folder / "files", LIMIT)
        self.batches = BatchService(folder / "batches", self.files, lambda owner: inside, now=time.time)

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock)
