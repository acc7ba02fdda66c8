"""Python programs use these clients: `connect` with asyncio, and `Client` without it.

async with lamina.connect("tcp://127.0.0.1:7070") as client:
    answer = await client.generate("Once upon a time", max_tokens=100)

with lamina.Client("tcp://127.0.0.1:7070") as client:
    answer = client.generate("Once upon a time", max_tokens=100)
"""

from __future__ import annotations

from lamina.chat.events import CallArguments, CallBegin, CallEnd, ChatEvent, ContentDelta, ReasoningDelta, ToolCall
from lamina.client.asynchronous import AsyncClient, connect
from lamina.client.chat import AsyncChatStream
from lamina.client.results import ChatCompletion, Completion, Timings, Token
from lamina.client.settings import ChatSettings, Prompt, Settings
from lamina.client.stream import AsyncStream
from lamina.client.synchronous import ChatStream, Client, Stream
from lamina.wire.requests import Grammar, JsonObject, JsonSchema, OneOf, Regex, Score

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
    "OneOf",
    "Prompt",
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
