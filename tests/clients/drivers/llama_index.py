"""llama-index: `OpenAILike`, as a completion, which is its default, and as a chat."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


def _llm(server: SimpleNamespace, **more: Any) -> OpenAILike:
    given = {"model": server.model, "api_base": server.url, "api_key": server.key, "temperature": 0.0}
    given |= {"max_tokens": server.tokens, "max_retries": 0, "is_chat_model": True}
    return OpenAILike(**(given | more))


def _facts(raw: Any) -> Any:
    usage = raw.usage
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}


def _messages(server: SimpleNamespace) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=server.question)]


def plain(server: SimpleNamespace) -> Any:
    answer = _llm(server).chat(_messages(server))
    return {"text": answer.message.content, **_facts(answer.raw)}


def completion(server: SimpleNamespace) -> Any:
    answer = _llm(server, is_chat_model=False).complete(server.prompt)
    return {"text": answer.text, **_facts(answer.raw)}


def stream(server: SimpleNamespace) -> Any:
    more = {"stream_options": {"include_usage": True}}
    chunks = list(_llm(server, additional_kwargs=more).stream_chat(_messages(server)))
    return {"pieces": [chunk.delta for chunk in chunks if chunk.delta], **_facts(chunks[-1].raw)}


def tool_arguments(server: SimpleNamespace) -> Any:
    llm = _llm(server, is_function_calling_model=True, max_tokens=server.room).as_structured_llm(Paint)
    return llm.chat(_messages(server)).raw.model_dump()


def required_without_tools(server: SimpleNamespace) -> Any:
    """What it sends for structured output with a model that calls no functions."""
    answer = _llm(server, additional_kwargs={"tool_choice": "required"}).chat(_messages(server))
    return {"text": answer.message.content, **_facts(answer.raw)}


def wrong_model(server: SimpleNamespace) -> Any:
    return str(_llm(server, model="absent").chat(_messages(server)))


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []
    more = {"extra_body": {"ignore_eos": True}}
    for chunk in _llm(server, max_tokens=server.many, additional_kwargs=more).stream_chat(_messages(server)):
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(chunk.delta)
    return len(pieces)
