"""haystack: the chat generator."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def _run(
    server: SimpleNamespace, *, model: str | None = None, callback: Any = None, tools: Any = None, **more: Any
) -> Any:
    generator = OpenAIChatGenerator(
        api_key=Secret.from_token(server.key),
        api_base_url=server.url,
        model=model or server.model,
        max_retries=0,
        streaming_callback=callback,
        tools=tools,
        generation_kwargs={"temperature": 0, "max_completion_tokens": server.tokens} | more,
    )
    return generator.run([ChatMessage.from_user(server.question)])["replies"][0]


def _facts(reply: Any) -> Any:
    usage = reply.meta["usage"]
    return {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}


def plain(server: SimpleNamespace) -> Any:
    reply = _run(server)
    return {"text": reply.text, "finish": reply.meta["finish_reason"], **_facts(reply)}


def stream(server: SimpleNamespace) -> Any:
    pieces = []
    reply = _run(server, callback=lambda chunk: pieces.append(chunk.content), stream_options={"include_usage": True})
    return {"pieces": [piece for piece in pieces if piece], **_facts(reply)}


def tool(server: SimpleNamespace) -> Any:
    paint = Tool(name="paint", description="Paint it.", parameters=COLOUR, function=lambda colour: colour)
    more = {"tool_choice": "required", "max_completion_tokens": server.room, "logit_bias": server.closing}
    reply = _run(server, tools=[paint], **more)
    return {"name": reply.tool_call.tool_name, "arguments": reply.tool_call.arguments}


def structured(server: SimpleNamespace) -> Any:
    import json

    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": COLOUR, "strict": True}}
    return json.loads(_run(server, response_format=form, max_completion_tokens=server.room).text)


def wrong_model(server: SimpleNamespace) -> Any:
    return _run(server, model="absent").text


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []

    def kill(chunk: Any) -> None:
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(chunk.content)

    _run(server, callback=kill, max_completion_tokens=server.many, extra_body={"ignore_eos": True})
    return len(pieces)
