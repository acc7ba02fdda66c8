"""The openai library itself: chat, completions, responses, structured output, errors."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace
from typing import Any, Literal

from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


TOOL = {"type": "function", "function": {"name": "paint", "parameters": Paint.model_json_schema()}}


def _client(server: SimpleNamespace) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


def _ask(server: SimpleNamespace, **more: Any) -> Any:
    given = {"model": server.model, "messages": [{"role": "user", "content": server.question}]}
    given |= {"temperature": 0, "max_tokens": server.tokens}
    return _client(server).chat.completions.create(**(given | more))


def models(server: SimpleNamespace) -> Any:
    return [model.id for model in _client(server).models.list()]


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
    assert chunks[-1].choices == []
    return {
        "pieces": [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content],
        "prompt_tokens": chunks[-1].usage.prompt_tokens,
        "completion_tokens": chunks[-1].usage.completion_tokens,
    }


def completion(server: SimpleNamespace) -> Any:
    answer = _client(server).completions.create(
        model=server.model, prompt=server.prompt, max_tokens=server.tokens, temperature=0
    )
    assert answer.usage is not None
    return {
        "text": answer.choices[0].text,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def response(server: SimpleNamespace) -> Any:
    answer = _client(server).responses.create(
        model=server.model, input=server.question, max_output_tokens=server.tokens, temperature=0
    )
    assert answer.usage is not None
    return {
        "text": answer.output_text,
        "prompt_tokens": answer.usage.input_tokens,
        "completion_tokens": answer.usage.output_tokens,
    }


def response_stream(server: SimpleNamespace) -> Any:
    events = list(
        _client(server).responses.create(
            model=server.model, input=server.question, max_output_tokens=server.tokens, temperature=0, stream=True
        )
    )
    usage = events[-1].response.usage
    return {
        "pieces": [event.delta for event in events if event.type == "response.output_text.delta"],
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
    }


def tool(server: SimpleNamespace) -> Any:
    forced = {"type": "function", "function": {"name": "paint"}}
    [choice] = _ask(server, tools=[TOOL], tool_choice=forced, max_tokens=server.room).choices
    assert choice.finish_reason in ("stop", "tool_calls")
    [call] = choice.message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def streamed_tool(server: SimpleNamespace) -> Any:
    with _client(server).chat.completions.stream(
        model=server.model,
        messages=[{"role": "user", "content": server.question}],
        tools=[TOOL],
        tool_choice="required",
        logit_bias=server.closing,
        temperature=0,
        max_tokens=server.room,
    ) as events:
        for _ in events:
            pass
        call = events.get_final_completion().choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def structured(server: SimpleNamespace) -> Any:
    answer = _client(server).chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": server.question}],
        response_format=Paint,
        temperature=0,
        max_tokens=server.room,
    )
    assert answer.choices[0].message.parsed is not None
    return answer.choices[0].message.parsed.model_dump()


def wrong_model(server: SimpleNamespace) -> Any:
    return str(_ask(server, model="absent"))


def wrong_parameter(server: SimpleNamespace) -> Any:
    return str(_ask(server, extra_body={"temprature": 1}))


def broken_stream(server: SimpleNamespace) -> Any:
    pieces = []
    for chunk in _ask(server, stream=True, max_tokens=server.many, extra_body={"ignore_eos": True}):
        if not pieces:
            os.kill(server.victim, signal.SIGKILL)
        pieces.append(chunk.choices[0].delta.content)
    return len(pieces)
