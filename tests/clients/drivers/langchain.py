"""langchain-openai: `ChatOpenAI`, and the older `OpenAI` for completions."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any, Literal

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


def _chat(server: SimpleNamespace, **more: Any) -> ChatOpenAI:
    given = {"base_url": server.url, "api_key": server.key, "model": server.model, "temperature": 0}
    return ChatOpenAI(**(given | {"max_tokens": server.tokens, "max_retries": 0} | more))


def plain(server: SimpleNamespace) -> Any:
    answer = _chat(server).invoke(server.question)
    assert answer.usage_metadata is not None
    return {
        "text": answer.content,
        "prompt_tokens": answer.usage_metadata["input_tokens"],
        "completion_tokens": answer.usage_metadata["output_tokens"],
        "finish": answer.response_metadata["finish_reason"],
    }


def stream(server: SimpleNamespace) -> Any:
    chunks = list(_chat(server, stream_usage=True).stream(server.question))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None
    return {
        "pieces": [chunk.content for chunk in chunks if chunk.content],
        "prompt_tokens": whole.usage_metadata["input_tokens"],
        "completion_tokens": whole.usage_metadata["output_tokens"],
    }


def completion(server: SimpleNamespace) -> Any:
    given = {"base_url": server.url, "api_key": server.key, "model": server.model, "temperature": 0}
    answer = OpenAI(**given, max_tokens=server.tokens).generate([server.prompt])
    assert answer.llm_output is not None
    usage = answer.llm_output["token_usage"]
    return {
        "text": answer.generations[0][0].text,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


def tool(server: SimpleNamespace) -> Any:
    bound = _chat(server, max_tokens=server.room).bind_tools([Paint], tool_choice="Paint")
    call = bound.invoke(server.question).tool_calls[0]
    return {"name": call["name"], "arguments": call["args"]}


def structured(server: SimpleNamespace) -> Any:
    return _chat(server, max_tokens=server.room).with_structured_output(Paint).invoke(server.question).model_dump()


def structured_by_tool(server: SimpleNamespace) -> Any:
    model = _chat(server, max_tokens=server.room).with_structured_output(Paint, method="function_calling")
    return model.invoke(server.question).model_dump()


def wrong_model(server: SimpleNamespace) -> Any:
    return str(_chat(server, model="absent").invoke(server.question))


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []
    model = _chat(server, max_tokens=server.many, extra_body={"ignore_eos": True})
    for chunk in model.stream(server.question):
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(chunk.content)
    return len(pieces)
