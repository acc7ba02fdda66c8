"""The folders that keep compiled functions from one start to the next, which only this user may reach."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

from lamina.errors import ConfigError

log = logging.getLogger("lamina.model")


def cache_folder(name: str) -> Path:
    """Return Lamina's folder ``name`` in the user's cache, made if it is missing.

    Lamina executes what it keeps there. So other users can neither read nor write the folder, and a ConfigError refuses
    one that they own or could write to. Where this user has no home, the folder is a temporary one of this process.
    """
    root = _root()
    for folder in (root, root / name):
        _claim(folder)
    return root / name


def keep_inductor_private() -> None:
    """Have Inductor keep its files in `cache_folder`; by default it would be a folder of /tmp with a known name, which
    another user could make first.

    This is called before anything of torch that compiles is imported, as that makes the folder. Errors are those of
    `cache_folder`.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))


def _root() -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not base.is_absolute():
            return _temporary(f"{base} is no absolute path")
        root = base / "lamina"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: neither $HOME nor an entry in the password file
        return _temporary(str(e))
    return root


def _claim(folder: Path) -> None:
    """Make ``folder`` and close it to other users. ConfigError if it is not this user's, or was open to writers."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be a cache folder: {e.strerror}; remove what is in its place") from e
    if status.st_uid != os.geteuid():
        raise _refused(folder, f"belongs to another user, {status.st_uid}")
    if status.st_mode & 0o022:
        raise _refused(folder, f"can be written to by other users, as its mode is {status.st_mode & 0o777:o}")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder}: {reason}, and Lamina executes what it keeps there; remove the folder, or set XDG_CACHE_HOME to a "
        "folder of your own"
    )


@functools.cache
def _temporary(reason: str) -> Path:
    """Return a new folder of this process, which removes it when it ends."""
    folder, process = Path(tempfile.mkdtemp(prefix="lamina-cache-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    log.warning("event=no_cache folder=%s reason=%r; every start compiles anew; set XDG_CACHE_HOME", folder, reason)
    return folder
