"""The cluster secret, in a file that only its owner may read, or a group that root has chosen."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from lamina.errors import ConfigError
from lamina.transport.options import MAX_SECRET_BYTES, MIN_SECRET_BYTES


def read_secret(path: Path) -> bytes:
    """The cluster secret in a file; one newline at its end does not count.

    Its owner alone may read it: see `read_private`.
    """
    try:
        secret = read_private(path, MAX_SECRET_BYTES + 2)
    except FileNotFoundError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}; `lamina secret {path}` makes a new one") from e
    secret = secret.removesuffix(b"\n")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        size = f"{len(secret)} bytes" if len(secret) <= MAX_SECRET_BYTES else "more"
        raise ConfigError(f"{path}: expected a secret of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, got {size}")
    return secret


def read_private(path: Path, most: int) -> bytes:
    """At most so many bytes of a file that its owner alone may read; where that is root, a group of this process may
    as well: so Kubernetes mounts secrets. ConfigError if it cannot be read, or FileNotFoundError.
    """
    try:
        # Opening a pipe would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            mode = status.st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is not a regular file")
            chosen = status.st_uid == 0 and status.st_gid in (os.getegid(), *os.getgroups())
            if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~(stat.S_IRGRP if chosen else 0):
                raise ConfigError(
                    f"{path} is open to others (mode {stat.S_IMODE(mode):04o}); let its owner alone read it: "
                    f"chmod 600 {path}"
                )
            return file.read(most)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError as e:  # a name that no file can have
        raise ConfigError(f"{str(path)!r} cannot be read: {e}") from e


def write_secret(path: Path) -> None:
    """Make a file with a new random secret that only its owner may read. ConfigError if there is one already."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file to make, such as {path / 'cluster.key'}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as e:
        raise ConfigError(
            f"{path} exists already and is not overwritten: nodes that know the old secret need it"
        ) from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except OSError as e:  # such as a full disk
        path.unlink()
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
