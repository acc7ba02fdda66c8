"""The table of endpoints, and the application that uvicorn runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.routing import Route

from lamina.chat.request import ChatFields
from lamina.errors import LaminaError
from lamina.serve import chat_completions, completions, health, models, page, problems, responses, tokens
from lamina.serve.batch import endpoints
from lamina.serve.batch.lines import URLS
from lamina.serve.cluster_view import ClusterView
from lamina.serve.docs import Documentation
from lamina.serve.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from lamina.serve.gate import App, Gate, Keys
from lamina.serve.response_request import ResponseFields
from lamina.serve.service import Service

log = logging.getLogger("lamina.serve")

Handler: TypeAlias = Callable[[Service, Exchange], Awaitable[None]]


class Entry(NamedTuple):
    """One endpoint. GET also means HEAD."""

    method: str
    path: str
    handler: Handler
    bodies: tuple[type[Struct], ...] = ()
    """What the body is read into."""


ENDPOINTS = (
    Entry("POST", "/v1/completions", completions.completions, (completions.CompletionBody,)),
    Entry(
        "POST",
        "/v1/chat/completions",
        chat_completions.chat_completions,
        (chat_completions.ChatBody, ChatFields),
    ),
    Entry("POST", "/v1/responses", responses.responses, (ResponseFields,)),
    Entry("GET", "/v1/models", models.models),
    Entry("GET", "/v1/models/{name:path}", models.model),
    Entry("POST", "/tokenize", tokens.tokenize, (tokens.TokenizeBody,)),
    Entry("POST", "/detokenize", tokens.detokenize, (tokens.DetokenizeBody,)),
    Entry("GET", "/tokenizer_info", tokens.tokenizer_info),
    Entry("POST", "/v1/files", endpoints.upload),
    Entry("GET", "/v1/files", endpoints.list_files),
    Entry("GET", "/v1/files/{id}", endpoints.describe_file),
    Entry("DELETE", "/v1/files/{id}", endpoints.delete_file),
    Entry("GET", "/v1/files/{id}/content", endpoints.file_content),
    Entry("POST", "/v1/batches", endpoints.create_batch, (endpoints.BatchBody,)),
    Entry("GET", "/v1/batches", endpoints.list_batches),
    Entry("GET", "/v1/batches/{id}", endpoints.describe_batch),
    Entry("POST", "/v1/batches/{id}/cancel", endpoints.cancel_batch),
    Entry("GET", "/health", health.health),
    Entry("GET", "/ready", health.ready),
    Entry("GET", "/version", health.version),
    Entry("GET", "/metrics", health.metrics),
)


BATCHED = {entry.path: entry.handler for entry in ENDPOINTS if entry.path in URLS}
"""The endpoints that lines of batches may ask, by path."""


def make_app(
    service: Service, view: ClusterView | None = None, *, keys: Sequence[bytes] = (), origins: Sequence[str] = ()
) -> App:
    """Return the application, with a page that shows ``view``.

    Without ``keys`` everybody may use it; pages of ``origins`` may, in browsers.
    """
    documentation = Documentation(ENDPOINTS)
    entries = (
        *ENDPOINTS,
        Entry("GET", "/openapi.json", documentation.openapi),
        Entry("GET", "/docs", documentation.page),
    )
    routes = [Route(entry.path, _EndpointApp(service, entry), methods=[entry.method]) for entry in entries]
    routes += page.routes() + (view.routes() if view else [])
    app: Any = Starlette(routes=routes, exception_handlers={HTTPException: _refuse})
    app.router.redirect_slashes = False
    app = Keys(app, keys)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Gate(app, service.metrics)


class _EndpointApp:
    """Runs the handler of one endpoint as an ASGI application, and answers with its error if it raises one."""

    def __init__(self, service: Service, entry: Entry) -> None:
        self._service = service
        self._entry = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        scope["lamina.endpoint"] = self._entry.path
        exchange = Exchange(scope, receive, send, max_body=service.max_body, room=service.bodies)
        try:
            await self._entry.handler(service, exchange)
        except ClientGoneError:
            scope["lamina.end"] = " end=client_gone"
        except Exception as e:
            if not isinstance(e, LaminaError):
                log.exception("event=internal_error id=%s", exchange.id)
            error = problems.as_http(e)
            scope["lamina.end"] = f" end=error reason={str(error)[:300]!r}"
            await exchange.fail(error)
        finally:
            exchange.end()


async def _refuse(request: StarletteRequest, error: Exception) -> Response:
    """Say in the form of all errors that there is no such endpoint, or not with this method."""
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = (
            f"{path} does not take {method}; use {allowed.replace('GET, HEAD', 'GET').replace('HEAD, GET', 'GET')}"
        )
    elif error.status_code == 404:
        message = f"{method} {path} does not exist here; /docs lists what does"
    else:
        message = str(error.detail)
    answer = problems.of_status(error.status_code, message)
    return Response(problems.body_of(answer), error.status_code, error.headers, media_type="application/json")
