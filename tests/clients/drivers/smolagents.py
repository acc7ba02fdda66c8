"""smolagents: the model class that its agents use, with messages of parts, stops and required tools."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace
from typing import Any

from smolagents import ChatMessage, MessageRole, OpenAIModel, tool


@tool
def paint(colour: str) -> str:
    """Paint it.

    Args:
        colour: The colour.
    """
    return colour


paint.inputs["colour"]["enum"] = ["red", "green"]


def _model(server: SimpleNamespace, **more: Any) -> OpenAIModel:
    given = {"model_id": server.model, "api_base": server.url, "api_key": server.key, "temperature": 0}
    given |= {"max_tokens": server.tokens, "client_kwargs": {"max_retries": 0}, "retry": False}
    return OpenAIModel(**(given | more))


def _messages(server: SimpleNamespace) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": server.question}])]


def plain(server: SimpleNamespace) -> Any:
    answer = _model(server)(_messages(server), stop_sequences=["Observation:", "Calling tools:", "</code>"])
    assert answer.token_usage is not None
    return {
        "text": answer.content,
        "prompt_tokens": answer.token_usage.input_tokens,
        "completion_tokens": answer.token_usage.output_tokens,
    }


def stream(server: SimpleNamespace) -> Any:
    deltas = list(_model(server).generate_stream(_messages(server)))
    usage = next(delta.token_usage for delta in deltas if delta.token_usage)
    return {
        "pieces": [delta.content for delta in deltas if delta.content],
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
    }


def tool_call(server: SimpleNamespace) -> Any:
    """The agents' way: any of the tools, but one of them."""
    answer = _model(server, max_tokens=server.room, logit_bias=server.closing)(
        _messages(server), tools_to_call_from=[paint]
    )
    assert answer.tool_calls is not None
    call = answer.tool_calls[0].function
    return {"name": call.name, "arguments": json.loads(call.arguments)}


def wrong_model(server: SimpleNamespace) -> Any:
    return _model(server, model_id="absent")(_messages(server)).content


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []
    model = _model(server, max_tokens=server.many, extra_body={"ignore_eos": True})
    for delta in model.generate_stream(_messages(server)):
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(delta.content)
    return len(pieces)
