"""The files that clients upload and batches make: in one private folder, each with its description beside it."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from lamina.errors import CapacityError, ConfigError, RequestError, StorageError

_ID = re.compile(r"file-[0-9a-f]{32}")


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a file, as the API shows it, and whose it is."""

    id: str
    bytes: int
    created_at: int
    """Seconds since 1970."""
    filename: str
    purpose: str
    owner: str
    """Who may see it: what stands for the API key that came with it."""

    def shown(self) -> dict[str, Any]:
        """Return the file as the API shows it."""
        plain = {key: getattr(self, key) for key in ("id", "bytes", "created_at", "filename", "purpose")}
        return plain | {"object": "file", "status": "processed", "expires_at": None}


class FileStore:
    """Keeps files in ``folder``, at most ``limit`` bytes in all.

    The folder is made with access for this user alone; ConfigError refuses one that others may enter.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = private_folder(folder)
        self._limit = limit
        for torn in self.folder.glob("*.part"):
            torn.unlink(missing_ok=True)

    async def add(
        self, chunks: AsyncIterator[bytes], *, filename: str, purpose: str, owner: str, now_s: float
    ) -> StoredFile:
        """Keep what comes in ``chunks``.

        CapacityError says that there is no room for it, StorageError that it cannot be written; then nothing is kept.
        """
        id_ = f"file-{secrets.token_hex(16)}"
        part = self.folder / f"{id_}.part"
        room, nbytes = self._limit - sum(file.bytes for file in self._all()), 0
        try:
            with part.open("wb") as file:
                async for chunk in chunks:
                    nbytes += len(chunk)
                    if nbytes > room:
                        raise CapacityError(
                            f"the file has more than {room} bytes, and no more are left of the {self._limit} for all "
                            "files; delete files that are no longer needed"
                        )
                    file.write(chunk)
            return self._keep(part, id_, nbytes, filename, purpose, owner, now_s)
        except OSError as e:
            raise unwritable(part, e) from e
        finally:
            part.unlink(missing_ok=True)

    def take(self, path: Path, *, filename: str, purpose: str, owner: str, now_s: float) -> StoredFile:
        """Move the file at ``path``, which is on the same disk, into the store. StorageError if that fails."""
        id_ = f"file-{secrets.token_hex(16)}"
        try:
            return self._keep(path, id_, path.stat().st_size, filename, purpose, owner, now_s)
        except OSError as e:
            raise unwritable(path, e) from e

    def path(self, id_: str, owner: str) -> Path:
        """Return where the contents of a file are. RequestError if there is none."""
        self.get(id_, owner)
        return self.folder / id_

    def get(self, id_: str, owner: str) -> StoredFile:
        """Return the description of a file. RequestError if there is none, also if it is somebody else's."""
        if _ID.fullmatch(id_):
            with suppress(OSError, msgspec.DecodeError):
                found = self._read(self.folder / f"{id_}.json")
                if found.owner == owner:
                    return found
        raise RequestError(f"no file {id_!r:.100}; GET /v1/files lists those that are there")

    def of(self, owner: str) -> list[StoredFile]:
        """Return the descriptions of all files of one owner, the newest first."""
        found = [file for file in self._all() if file.owner == owner]
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def delete(self, id_: str, owner: str) -> None:
        """Remove a file. RequestError if there is none."""
        self.get(id_, owner)
        (self.folder / f"{id_}.json").unlink(missing_ok=True)
        (self.folder / id_).unlink(missing_ok=True)

    def _keep(
        self, path: Path, id_: str, nbytes: int, filename: str, purpose: str, owner: str, now_s: float
    ) -> StoredFile:
        found = StoredFile(id=id_, bytes=nbytes, created_at=int(now_s), filename=filename, purpose=purpose, owner=owner)
        path.replace(self.folder / id_)
        try:
            write_json(self.folder / f"{id_}.json", found)
        except StorageError:
            (self.folder / id_).unlink()  # without a description, nobody could delete it
            raise
        return found

    def _all(self) -> list[StoredFile]:
        found = []
        for path in self.folder.glob("file-*.json"):
            with suppress(OSError, msgspec.DecodeError):
                found.append(self._read(path))
        return found

    def _read(self, path: Path) -> StoredFile:
        return msgspec.json.decode(path.read_bytes(), type=StoredFile)


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user may enter, or check that one is so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as e:
        raise ConfigError(f"{folder} cannot be made: {e.strerror}; name another folder") from e
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder} can be entered by others; run `chmod 700` on it, or name another folder")
    return folder


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Write a description and put it into its place as a whole. StorageError if that fails."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(msgspec.json.encode(value))
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise unwritable(path, e) from e


def unwritable(path: Path, error: OSError) -> StorageError:
    """Return the error that says why a file cannot be written."""
    return StorageError(f"{path} cannot be written: {error.strerror}")
