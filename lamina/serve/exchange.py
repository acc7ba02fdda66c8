"""One HTTP request and its answer, on bare ASGI: a stream of tokens has no layer that it does not need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
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
MAX_DEPTH = 64
"""How deep values in a body may be nested."""

Headers = Sequence[tuple[bytes, bytes]]


class Exchange:
    """Reads a request and writes its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body: int) -> None:
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

    def header(self, name: bytes) -> str | None:
        """Return the value of a header, whose name is in lower case."""
        return header_of(self.scope, name)

    # -- reading

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
                        parts.append(part)
                    else:
                        parts.clear()
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
        body = await self.body()
        if not body:
            raise HttpError("the body is empty; expected a JSON object")
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
            inner += [
                v for v in (container.values() if isinstance(container, dict) else container) if type(v) in _CONTAINERS
            ]
        if not inner:
            return False
        level = inner
    return True


_CONTAINERS = frozenset((dict, list))


def _too_deep() -> HttpError:
    return HttpError(f"the body nests values more than {MAX_DEPTH} deep")
