"""GET /health, /ready, /version and /metrics: whether the server lives, and what it does."""

from __future__ import annotations

import lamina
from lamina.serve import problems
from lamina.serve.exchange import Exchange
from lamina.serve.service import Service


async def health(service: Service, exchange: Exchange) -> None:
    """Say whether the front can be reached."""
    if not service.front.is_reachable:
        raise problems.unavailable(f"the front cannot be reached: {service.front.reason}")
    await exchange.reply_json({"status": "ok", "front": service.front.state})


async def ready(service: Service, exchange: Exchange) -> None:
    """Say whether requests are taken: not while anything starts or drains."""
    if service.draining.is_set():
        raise problems.unavailable("the server is draining")
    _ = service.model
    service.front.link()
    await exchange.reply_json({"status": "ready"})


async def version(service: Service, exchange: Exchange) -> None:
    """Return the version."""
    await exchange.reply_json({"version": lamina.__version__})


async def metrics(service: Service, exchange: Exchange) -> None:
    """Return the counters of this server."""
    text, kind = service.metrics.exposition(exchange.header(b"accept") or "")
    await exchange.reply(text, kind=kind.encode())
