"""uvicorn's HTTP protocol with bounds: a request's head has a size and a time, a reader that stalls is dropped."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lamina.errors import HttpError
from lamina.serve import problems

HEAD_BYTES = 1 << 16
"""The most bytes of request line and headers."""
HEAD_S = 15.0
"""How long they may take, from the connection or the first byte on."""
IDLE_S = 75.0
"""How long a connection stays open without a request; clients that keep one for later close it earlier."""
LINGER_S = 2.0
"""How long a connection that was refused is still read, as the answer could otherwise get lost."""
STALL_S = 60.0
"""How long a client may read nothing while there is something to read."""


_TOO_LONG = f"the request line and headers have more than {HEAD_BYTES} bytes"


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        """When the next head has to be complete."""
        self._stalled: asyncio.TimerHandle | None = None
        self._head = 0
        """The bytes of the head so far."""
        self._in_head = True
        self._fields = 0
        """The bytes of its fields, also of those behind a body in chunks."""
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self._cancel_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head += len(data)
            if self._head > HEAD_BYTES and len(data) < self._head:
                # It goes on for more than one piece, and has not ended.
                self._refuse(431, _TOO_LONG)
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._fields = True, 0
        self._expect_head(HEAD_S)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, 0
        self._expect_nothing()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head = True, 0

    def on_response_complete(self) -> None:
        waiting = bool(self.pipeline)
        super().on_response_complete()
        if not waiting and not self.transport.is_closing():
            self._expect_head(IDLE_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_stall()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the form of all errors."""
        if self._fields > HEAD_BYTES:
            self._refuse(431, _TOO_LONG)
        else:
            self._refuse(400, "the request is not valid HTTP/1.1")

    def _count(self, nbytes: int) -> None:
        """Count bytes of fields; httptools turns the error into one of its own, which `send_400_response` answers."""
        self._fields += nbytes
        if self._fields > HEAD_BYTES:
            raise ValueError("the head is too long")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing() or self._refused:
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = problems.body_of(HttpError(message, status=status))
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
                + body
            )
        self._refused = True
        self._expect_nothing()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._deadline = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _expect_head(self, seconds: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, self._too_late)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self._head:
            self._refuse(408, f"the request line and headers did not arrive within {HEAD_S:g} s")
        elif not self.transport.is_closing():
            self.transport.close()

    def _cancel_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
