"""GET /v1/models: the names that requests may use."""

from __future__ import annotations

from typing import Any

from lamina.serve.exchange import Exchange
from lamina.serve.service import Service


async def models(service: Service, exchange: Exchange) -> None:
    """List the models."""
    await exchange.reply_json({"object": "list", "data": [_about(service, name) for name in service.names]})


async def model(service: Service, exchange: Exchange) -> None:
    """Describe one model."""
    name = service.require_name(exchange.scope["path_params"]["name"])
    await exchange.reply_json(_about(service, name))


def _about(service: Service, name: str) -> dict[str, Any]:
    context = service.read.context if service.read is not None else None
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "lamina",
        "root": service.names[0],
        "parent": None,
        "max_model_len": context,
    }
