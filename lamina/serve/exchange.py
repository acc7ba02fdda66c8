"""One HTTP request and its answer, on bare ASGI: a stream of tokens has no layer that it does not need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from lamina.errors import HttpError
from lamina.serve import problems

log = logging.getLogger("lamina.serve")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

BODY_S = 60.0
"""How long a body may take to arrive."""
DISCARD = 8
"""Of a body that is too long, so many times the limit are read and dropped: a client that still sends would otherwise
see a broken connection instead of the answer."""
SLOWEST = 1 << 14
"""The least bytes a second with which a file has to arrive, once it has had ``BODY_S``."""
MAX_BODIES = 256 << 20
"""The most bytes that the bodies of all requests in progress may have together, or twice the longest body."""
RETRY_S = 1.0
"""After how many seconds there may be room for another body."""
MAX_DEPTH = 64
"""How deep values in a body may be nested."""
MAX_BRACKETS = 1 << 18
"""The most opening brackets of a body, of which each may be a list or a table: millions of them take seconds to read,
and a text that has so many is longer than the context of most models."""

Headers = Sequence[tuple[bytes, bytes]]


class BodyRoom:
    """Bounds what the bodies of all requests take together: many clients may send long ones, and slowly."""

    def __init__(self, max_body: int) -> None:
        """``max_body`` is the most bytes of one body."""
        self._most = self._left = max(MAX_BODIES, 2 * max_body)

    def take(self, nbytes: int) -> None:
        """Take room for so many bytes. HttpError if there is none."""
        if nbytes > self._left:
            raise HttpError(
                f"the bodies of the requests in progress have {self._most} bytes, which is the limit; retry in a "
                "moment",
                status=503,
                kind="server_error",
                retry_after_s=RETRY_S,
            )
        self._left -= nbytes

    def give(self, nbytes: int) -> None:
        """Give room back."""
        self._left += nbytes


class Exchange:
    """Reads a request and writes its answer. Its body counts in ``room`` until `end` is called."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, max_body: int, room: BodyRoom | None = None
    ) -> None:
        self.scope = scope
        self.started = False
        """Whether the status of the answer has been sent."""
        self.begun_s = asyncio.get_running_loop().time()
        """When the request came, by the loop's clock."""
        self.id: str = scope["lamina.id"]
        """The request id, as the client gave it or as it was made up."""
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._room = room or BodyRoom(max_body)
        self._held = 0
        """The bytes of the body that count in the room."""

    def end(self) -> None:
        """Let others have the room of the body."""
        self._room.give(self._held)
        self._held = 0

    def header(self, name: bytes) -> str | None:
        """Return the value of a header, whose name is in lower case."""
        return header_of(self.scope, name)

    @property
    def owner(self) -> str:
        """What stands for the API key of the request; nothing if the server has no keys."""
        owner: str = self.scope.get("lamina.owner", "")
        return owner

    # -- reading

    async def chunks(self, limit: int) -> AsyncGenerator[bytes, None]:
        """Give the body as it arrives. HttpError if it has more than ``limit`` bytes, pauses for too long, or comes
        too slowly."""
        arrived = 0
        now = asyncio.get_running_loop().time
        begun_s = now()
        while True:
            try:
                async with asyncio.timeout_at(min(now(), begun_s + arrived / SLOWEST) + BODY_S):
                    message = await self._receive()
            except TimeoutError:
                raise HttpError(
                    f"{arrived} bytes of the body arrived within {now() - begun_s:.0f} s; send at least {SLOWEST} "
                    f"bytes a second, without a pause of {BODY_S:g} s",
                    status=408,
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            arrived += len(part)
            if arrived > limit:
                raise HttpError(f"the body has more than {limit} bytes; shorten it", status=413)
            if part:
                yield part
            if not message.get("more_body", False):
                return

    async def body(self) -> bytes:
        """Return the body. HttpError if it is too long or too slow."""
        too_long = HttpError(
            f"the body has more than {self._max_body} bytes; shorten it, or start the server with a larger --max-body",
            status=413,
        )
        length = self.header(b"content-length")
        expects = (self.header(b"expect") or "").lower() == "100-continue"
        if length is not None and length.isdecimal() and int(length) > self._max_body and expects:
            raise too_long  # the client waits for a word before it sends
        parts: list[bytes] = []
        arrived = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    arrived += len(part)
                    if arrived <= self._max_body:
                        self._room.take(len(part))
                        self._held += len(part)
                        parts.append(part)
                    else:
                        parts.clear()
                        self.end()
                        if arrived > self._max_body * DISCARD:
                            raise too_long
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            if arrived > self._max_body:
                raise too_long from None
            raise HttpError(f"the body did not arrive within {BODY_S:g} s", status=408) from None
        if arrived > self._max_body:
            raise too_long
        return b"".join(parts)

    async def json(self) -> dict[str, Any]:
        """Return the JSON object in the body, without keys whose value is null. HttpError if it is none."""
        kind = (self.header(b"content-type") or "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise HttpError(f"content-type: expected application/json, got {kind!r:.100}", status=415)
        if (coding := self.header(b"content-encoding") or "identity").lower() != "identity":
            raise HttpError(f"content-encoding: {coding!r:.100} is not supported; send the body as it is", status=415)
        body = await self.body()
        if not body:
            raise HttpError("the body is empty; expected a JSON object")
        if (brackets := body.count(b"[") + body.count(b"{")) > MAX_BRACKETS:
            raise HttpError(f"the body has {brackets} opening brackets; the limit is {MAX_BRACKETS}")
        try:
            plain = msgspec.json.decode(body)
        except RecursionError:
            raise _too_deep() from None
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise HttpError(f"the body is not valid JSON in UTF-8: {e}") from None
        if not isinstance(plain, dict):
            raise HttpError(f"the body is not a JSON object, but {type(plain).__name__}")
        if is_deeper(plain, MAX_DEPTH):
            raise _too_deep()
        return {key: value for key, value in plain.items() if value is not None}

    async def gone(self) -> None:
        """Return when the client has closed the connection, or the answer is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- writing

    async def reply(
        self, body: bytes, *, status: int = 200, kind: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        """Send a whole answer."""
        await self.start(status, [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def reply_json(self, value: Any, *, status: int = 200) -> None:
        """Send a whole answer in JSON."""
        await self.reply(msgspec.json.encode(value), status=status)

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status and the headers of an answer."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def start_events(self) -> None:
        """Begin a stream of server-sent events, which neither caches nor proxies should hold up."""
        await self.start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def write(self, data: bytes) -> None:
        """Send a part of a stream. This waits where the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """End a stream as one that is complete."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: HttpError) -> None:
        """Tell the client of an error.

        In a stream it is the last event, and the stream is left incomplete, so that the server breaks the connection:
        most clients take a stream that ends well for a success, whatever was in it.
        """
        body = problems.body_of(error)
        if self.started:
            with suppress(ClientGoneError):
                await self.write(b"data: " + body + b"\n\n")
            return
        headers = problems.headers_of(error)
        if error.status in (408, 413):
            headers.append((b"connection", b"close"))
        await self.reply(body, status=error.status, headers=headers)


class ClientGoneError(Exception):
    """The client has closed the connection, so nobody needs an answer any more."""


def header_of(scope: Scope, name: bytes) -> str | None:
    """Return the value of a header, whose name is in lower case; None if the request has none."""
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return None


def is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and tables are nested more than ``limit`` deep."""
    level = [value]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for container in level:
            values = container.values() if isinstance(container, dict) else container
            if not _CONTAINERS.isdisjoint(map(type, values)):  # a list may have millions of numbers
                inner += [value for value in values if type(value) in _CONTAINERS]
        if not inner:
            return False
        level = inner
    return True


_CONTAINERS = frozenset((dict, list))


def _too_deep() -> HttpError:
    return HttpError(f"the body nests values more than {MAX_DEPTH} deep")
