"""``/v1/files`` and ``/v1/batches``."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast
from urllib.parse import parse_qsl

from msgspec import Meta, Struct
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lamina.errors import CapacityError, HttpError, RequestError
from lamina.serve.batch.files import FileStore
from lamina.serve.batch.offline import Offline
from lamina.serve.batch.service import BatchService
from lamina.serve.exchange import Exchange
from lamina.serve.parameters import parse
from lamina.serve.service import Service

MAX_FILE = 512 << 20
"""The most bytes of one upload."""
PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
"""What a file may be for. Only batches are run here."""
_PAGE = 20, 10_000
"""The entries of a list: by default, and at most."""
_CHUNK = 1 << 20


class BatchBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a batch."""

    input_file_id: str
    endpoint: str
    """The path that all lines name."""
    completion_window: str
    """"24h"."""
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None


# -- files


async def upload(service: Service, exchange: Exchange) -> None:
    """Keep a file that comes as a form with ``file`` and ``purpose``."""
    files = _offline(service).files
    kind = exchange.header(b"content-type") or ""
    if not kind.lower().startswith("multipart/form-data"):
        raise HttpError(f"content-type: expected multipart/form-data, got {kind!r:.100}", status=415)
    # Starlette keeps what is larger than a megabyte in a file without a name.
    parser = MultiPartParser(
        Headers({"content-type": kind}), exchange.chunks(MAX_FILE + _CHUNK), max_files=1, max_fields=8
    )
    try:
        form = await parser.parse()
    except MultiPartException as e:
        raise HttpError(f"the form cannot be read: {e.message}") from None
    try:
        fields = dict(form)
        file, purpose = fields.pop("file", None), fields.pop("purpose", None)
        if not isinstance(file, UploadFile):
            raise HttpError("file: missing; expected a file in the form", param="file")
        if not isinstance(purpose, str) or purpose not in PURPOSES:
            raise HttpError(f"purpose: expected one of {', '.join(PURPOSES)}; got {purpose!r:.100}", param="purpose")
        if fields:
            raise HttpError(f"{min(fields)!r:.100} is not supported; leave it out", param=min(fields)[:100])
        name = (file.filename or "file")[:255]
        stored = await files.add(_read(file), filename=name, purpose=purpose, owner=exchange.owner, now_s=time.time())
    except CapacityError as e:
        raise HttpError(str(e), status=413) from e
    finally:
        await form.close()
    await exchange.reply_json(stored.shown())


async def list_files(service: Service, exchange: Exchange) -> None:
    """List the files of this key."""
    query = _query(exchange, "limit", "after", "order", "purpose")
    found = [
        file
        for file in _offline(service).files.of(exchange.owner)
        if query.get("purpose", file.purpose) == file.purpose
    ]
    await exchange.reply_json(_page(found, query))


async def describe_file(service: Service, exchange: Exchange) -> None:
    """Describe one file."""
    await exchange.reply_json(_found(lambda: _offline(service).files.get(_id(exchange), exchange.owner)).shown())


async def file_content(service: Service, exchange: Exchange) -> None:
    """Send the bytes of one file."""
    files: FileStore = _offline(service).files
    path: Path = _found(lambda: files.path(_id(exchange), exchange.owner))
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        await exchange.start(200, [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % length)])
        while chunk := file.read(_CHUNK):
            await exchange.write(chunk)
    await exchange.finish()


async def delete_file(service: Service, exchange: Exchange) -> None:
    """Remove one file."""
    id_ = _id(exchange)
    _found(lambda: _offline(service).files.delete(id_, exchange.owner))
    await exchange.reply_json({"id": id_, "object": "file", "deleted": True})


# -- batches


async def create_batch(service: Service, exchange: Exchange) -> None:
    """Take a batch of an uploaded file."""
    body = parse(await exchange.json(), BatchBody)
    batches = _offline(service).batches
    batch = batches.create(body.endpoint, body.input_file_id, body.completion_window, body.metadata, exchange.owner)
    await exchange.reply_json(batch.shown())


async def list_batches(service: Service, exchange: Exchange) -> None:
    """List the batches of this key."""
    query = _query(exchange, "limit", "after")
    await exchange.reply_json(_page(_offline(service).batches.of(exchange.owner), query))


async def describe_batch(service: Service, exchange: Exchange) -> None:
    """Describe one batch."""
    await exchange.reply_json(_found(lambda: _offline(service).batches.get(_id(exchange), exchange.owner)).shown())


async def cancel_batch(service: Service, exchange: Exchange) -> None:
    """Stop one batch."""
    batches: BatchService = _offline(service).batches
    id_ = _id(exchange)
    _found(lambda: batches.get(id_, exchange.owner))
    await exchange.reply_json(batches.cancel(id_, exchange.owner).shown())


# -- inside


class _Shown(Protocol):
    @property
    def id(self) -> str: ...

    def shown(self) -> dict[str, Any]: ...


R = TypeVar("R")


def _offline(service: Service) -> Offline:
    if service.offline is None:
        raise HttpError(f"this server keeps no files: {service.offline_failure}", status=501, kind="server_error")
    return cast(Offline, service.offline)


def _id(exchange: Exchange) -> str:
    id_: str = exchange.scope["path_params"]["id"]
    return id_


def _found(look: Any) -> Any:
    """Return what ``look`` finds; a RequestError says that it is not there."""
    try:
        return look()
    except RequestError as e:
        raise HttpError(str(e), status=404, kind="not_found_error") from e


def _query(exchange: Exchange, *known: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for name, value in parse_qsl(exchange.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name not in known:
            raise HttpError(f"unknown parameter {name!r:.100}; expected some of {', '.join(known)}", param=name[:100])
        if name in query:
            raise HttpError(f"{name}: given twice; give one value", param=name)
        query[name] = value
    return query


def _page(found: Sequence[_Shown], query: dict[str, str]) -> dict[str, Any]:
    """Return a page of a list, which begins behind the id ``after``."""
    default, most = _PAGE
    limit = query.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 5 and 1 <= int(limit) <= most):
        raise HttpError(f"limit: expected a number from 1 to {most}, got {limit!r:.100}", param="limit")
    if query.get("order", "desc") not in ("asc", "desc"):
        raise HttpError(f"order: expected asc or desc, got {query['order']!r:.100}", param="order")
    ordered = list(found)[:: -1 if query.get("order") == "asc" else 1]
    if after := query.get("after"):
        ids = [entry.id for entry in ordered]
        if after not in ids:
            raise HttpError(f"after: no entry {after!r:.100}", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    page = [entry.shown() for entry in ordered[: int(limit)]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > len(page),
    }


async def _read(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(_CHUNK):
        yield chunk
