"""Ask an endpoint from within the server's own process, so that a batch gets just what a client would."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from lamina.errors import CapacityError, LaminaError, NodeError
from lamina.serve import problems
from lamina.serve.batch.lines import InputLine
from lamina.serve.batch.run import AnsweredLine
from lamina.serve.exchange import Exchange
from lamina.serve.service import Service

Handler = Callable[[Service, Exchange], Awaitable[None]]

_AGAIN = (429, 503)
"""These say that the same request may be answered later."""


class Inside:
    """Asks the endpoints in ``handlers``, by path.

    While the front is away or full, a line is asked again; after ``patience_s`` seconds without a front, NodeError ends
    the batch. ``priority`` is that of lines that name none.
    """

    def __init__(
        self, service: Service, handlers: Mapping[str, Handler], *, patience_s: float | None, priority: int = 0
    ) -> None:
        self._service = service
        self._handlers = handlers
        self._patience_s = patience_s
        self._priority = priority
        self._numbers = itertools.count(1)
        self._away_since: float | None = None

    async def __call__(self, line: InputLine) -> AnsweredLine:
        """Answer a line. See `lamina.serve.batch.run.Answer`."""
        body = {"priority": self._priority, **line.body} if self._priority else line.body
        asked = _NoConnection(msgspec.json.encode(body))
        scope = {"type": "http", "headers": [], "lamina.id": f"batch-{next(self._numbers)}"}
        exchange = Exchange(scope, asked.receive, asked.send, max_body=self._service.max_body)
        try:
            await self._handlers[line.url](self._service, exchange)
        except Exception as e:
            if not isinstance(e, LaminaError):
                raise
            error = problems.as_http(e)
            if error.status in _AGAIN:
                self._be_patient(str(error), away=error.status == 503)
                raise CapacityError(str(error), retry_after_s=error.retry_after_s or 1.0) from e
            return AnsweredLine(error.status, msgspec.json.decode(problems.body_of(error)))
        self._away_since = None
        answer: dict[str, Any] = msgspec.json.decode(b"".join(asked.parts))
        usage = answer.get("usage") or {}
        return AnsweredLine(asked.status, answer, usage.get("completion_tokens") or usage.get("output_tokens") or 0)

    def _be_patient(self, reason: str, *, away: bool) -> None:
        """Raise NodeError if the front has been away for too long."""
        now = asyncio.get_running_loop().time()
        if not away:
            self._away_since = None
            return
        if self._away_since is None:
            self._away_since = now
        if self._patience_s is not None and now - self._away_since >= self._patience_s:
            raise NodeError(reason, node="front")


class _NoConnection:
    """Stands in for the connection: gives the body, and keeps the answer."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self.parts: list[bytes] = []
        self._body: bytes | None = body

    async def receive(self) -> dict[str, Any]:
        if self._body is None:
            await asyncio.Event().wait()  # there is no client that could go away
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message["body"])
