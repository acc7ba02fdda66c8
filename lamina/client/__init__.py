"""Python programs use these clients: `connect` with asyncio, and `Client` without it.

async with lamina.connect("tcp://127.0.0.1:7070") as client:
    answer = await client.generate("Once upon a time", max_tokens=100)

with lamina.Client("tcp://127.0.0.1:7070") as client:
    answer = client.generate("Once upon a time", max_tokens=100)
"""

from __future__ import annotations

from lamina.client.asynchronous import AsyncClient, AsyncStream, Completion, Token, connect
from lamina.client.settings import Prompt, Settings
from lamina.client.synchronous import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Client", "Completion", "Prompt", "Settings", "Stream", "Token", "connect"]
