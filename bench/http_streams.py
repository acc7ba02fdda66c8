"""An HTTP client for benchmarks and load tests, which costs little: it notes when each event of an answer comes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httptools

from lamina.errors import TransportError


@dataclass
class HttpAnswer:
    """What came on one request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """By names in lower case."""
    body: bytes = b""
    """What came, if it is no stream of events, or an unfinished event."""
    events: list[bytes] = field(default_factory=list)
    """The events of a stream, without the empty lines between them."""
    times: list[float] = field(default_factory=list)
    """When they came, by `time.perf_counter`."""
    asked_s: float = 0.0
    complete: bool = False
    """Whether the end of the answer has come. One that was broken off has none."""

    def chunks(self) -> list[dict[str, Any]]:
        """Return the values of all events, without comments and the last, which only says that it is the last."""
        return [json.loads(event[6:]) for event in self.events if event.startswith(b"data: {")]


class HttpConnection(asyncio.Protocol):
    """One connection, on which one request at a time is asked."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.answer = HttpAnswer()
        self.closed = False
        self._parser: Any = httptools.HttpResponseParser(self)
        self._streams = self._is_head = False
        self._done: asyncio.Future[HttpAnswer] | None = None

    @classmethod
    async def open(cls, port: int) -> HttpConnection:
        """Connect to a server on this machine."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    def send(self, path: str, body: bytes, *, method: str = "POST", kind: str = "application/json") -> None:
        """Send a request, whose answer `end` returns."""
        self.answer = HttpAnswer(asked_s=time.perf_counter())
        self._streams, self._is_head = False, method == "HEAD"
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(_head(method, path, body, kind) + body)

    def send_part(self, path: str, body: bytes, nbytes: int) -> None:
        """Send the head of a request, and only ``nbytes`` of its body."""
        self.transport.write(_head("POST", path, body, "application/json") + body[:nbytes])

    async def end(self) -> HttpAnswer:
        """Wait for the end of the answer, and return it; it is not complete if the connection was closed before."""
        assert self._done is not None
        return await self._done

    async def ask(self, path: str, body: bytes = b"", *, method: str = "POST") -> HttpAnswer:
        """Send a request and return its whole answer. TransportError if the connection is closed before its end."""
        self.send(path, body, method=method)
        answer = await self.end()
        if not answer.complete:
            raise TransportError(f"{method} {path}: the server closed the connection before the end of its answer")
        return answer

    def drop(self) -> None:
        """End the connection at once, as a client does that was killed."""
        self.closed = True
        self.transport.abort()

    # -- from the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._finish()

    # -- from the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        self._streams = self.answer.headers.get("content-type", "").startswith("text/event-stream")
        if self._is_head:  # the parser would wait for a body
            self.on_message_complete()
            self.drop()

    def on_body(self, data: bytes) -> None:
        answer = self.answer
        answer.body += data
        if self._streams:
            now = time.perf_counter()
            *events, answer.body = answer.body.split(b"\n\n")
            answer.events += events
            answer.times += [now] * len(events)

    def on_message_complete(self) -> None:
        self.answer.complete = True
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self.answer)


def _head(method: str, path: str, body: bytes, kind: str) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body)
