"""instructor: structured answers by forced tools, by JSON objects and by schemas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


def _ask(server: SimpleNamespace, mode: instructor.Mode, **more: Any) -> Any:
    client = instructor.from_openai(OpenAI(base_url=server.url, api_key=server.key, max_retries=0), mode=mode)
    given = {"model": server.model, "messages": [{"role": "user", "content": server.question}]}
    given |= {"temperature": 0, "max_tokens": server.room, "max_retries": 0, "response_model": Paint}
    return client, given | more


def tool_arguments(server: SimpleNamespace) -> Any:
    client, given = _ask(server, instructor.Mode.TOOLS)
    return client.chat.completions.create(**given).model_dump()


def structured(server: SimpleNamespace) -> Any:
    client, given = _ask(server, instructor.Mode.JSON_SCHEMA)
    return client.chat.completions.create(**given).model_dump()


class AnyPaint(BaseModel):
    """Paint it."""

    colour: Literal["red", "green"] = "red"


def json_object(server: SimpleNamespace) -> Any:
    """The schema is only in the prompt, so the least object has to fit it."""
    more = {"response_model": AnyPaint, "logit_bias": server.closing}
    client, given = _ask(server, instructor.Mode.JSON, **more)
    return client.chat.completions.create(**given).model_dump()


def usage(server: SimpleNamespace) -> Any:
    client, given = _ask(server, instructor.Mode.TOOLS)
    _, raw = client.chat.completions.create_with_completion(**given)
    return {"prompt_tokens": raw.usage.prompt_tokens, "completion_tokens": raw.usage.completion_tokens}


def streamed_tool_arguments(server: SimpleNamespace) -> Any:
    client, given = _ask(server, instructor.Mode.TOOLS)
    return list(client.chat.completions.create_partial(**given))[-1].model_dump()


def wrong_model(server: SimpleNamespace) -> Any:
    client, given = _ask(server, instructor.Mode.TOOLS, model="absent")
    return client.chat.completions.create(**given).model_dump()
