"""The folder that keeps compiled functions from one start to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return Lamina's folder ``name`` in the user's cache, created if it is missing. OSError if that fails.

    Only the user may write to it, because its files are executed.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (status := folder.stat()).st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users, so Lamina executes nothing from there")
    return folder
