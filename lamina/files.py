"""Write a command's result into a file that the user named: as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lamina.errors import ConfigError, LaminaError


def check_target(path: Path, option: str) -> None:
    """Raise ConfigError, which names ``option``, if ``path`` cannot be written; called before the work begins."""
    if str(path) == "-":
        raise ConfigError(f"{option}: standard output is not possible here; name a file (./- if it has this name)")
    target = path.resolve()
    if target.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ConfigError(
            f"{option}: {path} cannot be written: the folder {target.parent} does not exist; make it first"
        )
    if not os.access(target if _is_special(target) else target.parent, os.W_OK):
        raise ConfigError(f"{option}: {path} cannot be written: you may not write there; name another file")


def write_whole(path: Path, contents: bytes, option: str) -> None:
    """Write a file and put it in place of an older one only when it is complete; LaminaError if that fails.

    Devices and pipes, which cannot be replaced, are written directly.
    """
    target = path.resolve()  # of a link, what it leads to is replaced
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if _is_special(target):
            target.write_bytes(contents)
            return
        try:
            beside.write_bytes(contents)
            beside.replace(target)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    except OSError as e:
        raise LaminaError(f"{option}: {path} cannot be written: {e.strerror}; name a file elsewhere") from e


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
