"""What every request passes: it gets an id, a key is asked for, it is counted and logged."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lamina.errors import HttpError
from lamina.serve import page, problems
from lamina.serve.exchange import Receive, Scope, Send, header_of
from lamina.serve.metrics import Metrics

log = logging.getLogger("lamina.serve.access")

App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset(("/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json", *page.PATHS))
"""What needs no key: it is for monitors and for people who look at the interface. The page asks for the key."""

_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")


class Gate:
    """Wraps the application. A request id that a client gives is taken if it is short and plain."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header_of(scope, b"x-request-id")
        id_ = given if given is not None and _ID.fullmatch(given) else secrets.token_hex(16)
        scope["lamina.id"] = id_
        status = 0
        mark = (b"x-request-id", id_.encode())

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), mark]
            await send(message)

        now = asyncio.get_running_loop().time
        begun = now()
        self._metrics.running.inc()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.running.dec()
            endpoint = scope.get("lamina.endpoint", "other")
            self._metrics.requests.labels(endpoint, str(status or 499)).inc()
            client = scope.get("client") or ("?", 0)
            log.info(
                "event=request id=%s client=%s method=%s path=%s status=%d seconds=%.3f%s",
                id_,
                client[0],
                scope["method"],
                json.dumps(scope["path"][:200]),
                status or 499,
                now() - begun,
                scope.get("lamina.end", ""),
            )


class Keys:
    """Lets requests through that have one of the keys; all of them if there are none."""

    def __init__(self, app: App, keys: Sequence[bytes]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and scope["path"] not in OPEN and (error := self._refusal(scope)):
            body = problems.body_of(error)
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            headers += problems.headers_of(error)
            await send({"type": "http.response.start", "status": error.status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        scheme, _, given = (header_of(scope, b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            return problems.of_status(401, 'this server needs an API key, in the header "Authorization: Bearer KEY"')
        key = given.strip().encode("latin-1")
        # All keys are compared, each in constant time, so that the time tells nothing of any of them.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if any(matches):
            scope["lamina.owner"] = hashlib.sha256(key).hexdigest()[:16]
        return None if any(matches) else problems.of_status(401, "the API key is not one of this server's")
