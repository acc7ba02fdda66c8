"""Lamina: large-language-model decoding, split at attention.

Compute nodes hold the weights and run everything but attention; memory nodes hold the KV cache and attend over it.
``connect`` (with asyncio) and ``Client`` (without) give a client of a running cluster; everything else is started by
the ``lamina`` command.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.client import (
        AsyncChatStream,
        AsyncClient,
        AsyncStream,
        CallArguments,
        CallBegin,
        CallEnd,
        ChatCompletion,
        ChatEvent,
        ChatSettings,
        ChatStream,
        Client,
        Completion,
        ContentDelta,
        Grammar,
        JsonObject,
        JsonSchema,
        OneOf,
        ReasoningDelta,
        Regex,
        Score,
        Settings,
        Stream,
        Timings,
        Token,
        ToolCall,
        connect,
    )
    from lamina.errors import LaminaError

# A library is silent unless the program that uses it wants its log; the daemons do.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"
__all__ = [
    "AsyncChatStream",
    "AsyncClient",
    "AsyncStream",
    "CallArguments",
    "CallBegin",
    "CallEnd",
    "ChatCompletion",
    "ChatEvent",
    "ChatSettings",
    "ChatStream",
    "Client",
    "Completion",
    "ContentDelta",
    "Grammar",
    "JsonObject",
    "JsonSchema",
    "LaminaError",
    "OneOf",
    "ReasoningDelta",
    "Regex",
    "Score",
    "Settings",
    "Stream",
    "Timings",
    "Token",
    "ToolCall",
    "connect",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("lamina.errors" if name == "LaminaError" else "lamina.client")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
