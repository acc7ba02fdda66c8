"""litellm: `completion` with the prefix of any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import litellm

COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": COLOUR}}


def _ask(server: SimpleNamespace, **more: Any) -> Any:
    given = {"model": f"openai/{server.model}", "messages": [{"role": "user", "content": server.question}]}
    given |= {"temperature": 0, "max_tokens": server.tokens, "num_retries": 0}
    return litellm.completion(api_base=server.url, api_key=server.key, **(given | more))


def plain(server: SimpleNamespace) -> Any:
    answer = _ask(server)
    return {
        "text": answer.choices[0].message.content,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "finish": answer.choices[0].finish_reason,
    }


def stream(server: SimpleNamespace) -> Any:
    chunks = list(_ask(server, stream=True, stream_options={"include_usage": True}))
    usage = next(chunk.usage for chunk in chunks if getattr(chunk, "usage", None))
    return {
        "pieces": [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content],
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def passed_on(server: SimpleNamespace) -> Any:
    """Keys that are no part of OpenAI's API reach the server."""
    answer = _ask(server, top_k=1, temperature=1.0, min_tokens=server.tokens)
    return {
        "text": answer.choices[0].message.content,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def tool(server: SimpleNamespace) -> Any:
    forced = {"type": "function", "function": {"name": "paint"}}
    answer = _ask(server, tools=[TOOL], tool_choice=forced, max_tokens=server.room)
    call = answer.choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def structured(server: SimpleNamespace) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": COLOUR, "strict": True}}
    return json.loads(_ask(server, response_format=form, max_tokens=server.room).choices[0].message.content)


def wrong_model(server: SimpleNamespace) -> Any:
    return str(_ask(server, model="openai/absent"))


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []
    for chunk in _ask(server, stream=True, max_tokens=server.many, extra_body={"ignore_eos": True}):
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(chunk.choices[0].delta.content)
    return len(pieces)
