"""Where compiled functions are kept from one start to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder ``name`` of Lamina in the user's cache, made if need be. OSError where it cannot be.

    Only the user may enter it: what lies there is executed.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (status := folder.stat()).st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others, so nothing is executed from there")
    return folder
