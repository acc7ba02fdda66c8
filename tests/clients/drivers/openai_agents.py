"""openai-agents: a run of an agent over responses, its default, and over chat."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

set_tracing_disabled(True)


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


@function_tool
def paint(colour: Literal["red", "green"]) -> str:
    """Paint it."""
    return colour


def _agent(server: SimpleNamespace, kind: Any, *, model: str | None = None, settings: Any = None, **more: Any) -> Agent:
    client = AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0)
    given = {"temperature": 0, "max_tokens": server.tokens, "include_usage": True} | (settings or {})
    return Agent(
        name="painter",
        model=kind(model or server.model, openai_client=client),
        model_settings=ModelSettings(**given),
        **more,
    )


def _facts(run: Any) -> Any:
    usage = run.context_wrapper.usage
    return {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}


def _ending(server: SimpleNamespace) -> dict[str, Any]:
    """Settings with which an answer ends by itself: over responses, one that is cut is an error for this client."""
    return {"max_tokens": server.room, "extra_body": {"logit_bias": server.closing, "min_tokens": server.tokens}}


def response(server: SimpleNamespace) -> Any:
    run = Runner.run_sync(_agent(server, OpenAIResponsesModel, settings=_ending(server)), server.question)
    return {"text": run.final_output, **_facts(run)}


def plain(server: SimpleNamespace) -> Any:
    run = Runner.run_sync(_agent(server, OpenAIChatCompletionsModel), server.question)
    return {"text": run.final_output, **_facts(run)}


async def _stream(agent: Agent, question: str) -> Any:
    run = Runner.run_streamed(agent, question)
    pieces = [
        event.data.delta
        async for event in run.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    return {"pieces": pieces, **_facts(run)}


async def stream(server: SimpleNamespace) -> Any:
    return await _stream(_agent(server, OpenAIChatCompletionsModel), server.question)


async def response_stream(server: SimpleNamespace) -> Any:
    return await _stream(_agent(server, OpenAIResponsesModel, settings=_ending(server)), server.question)


def structured(server: SimpleNamespace) -> Any:
    agent = _agent(server, OpenAIChatCompletionsModel, output_type=Paint, settings={"max_tokens": server.room})
    return Runner.run_sync(agent, server.question).final_output.model_dump()


def response_structured(server: SimpleNamespace) -> Any:
    agent = _agent(server, OpenAIResponsesModel, output_type=Paint, settings={"max_tokens": server.room})
    return Runner.run_sync(agent, server.question).final_output.model_dump()


def _called(server: SimpleNamespace, kind: Any) -> Any:
    settings = {"max_tokens": server.room, "tool_choice": "required", "extra_body": {"logit_bias": server.closing}}
    agent = _agent(server, kind, tools=[paint], settings=settings, tool_use_behavior="stop_on_first_tool")
    return {"colour": Runner.run_sync(agent, server.question).final_output}


def tool_arguments(server: SimpleNamespace) -> Any:
    return _called(server, OpenAIChatCompletionsModel)


def response_tool_arguments(server: SimpleNamespace) -> Any:
    return _called(server, OpenAIResponsesModel)


def _told(server: SimpleNamespace, kind: Any) -> Any:
    """The tool's result goes back to the model, which then says something."""
    settings = _ending(server) | {"tool_choice": "required"}
    run = Runner.run_sync(_agent(server, kind, tools=[paint], settings=settings), server.question)
    assert len(run.raw_responses) == 2
    assert run.final_output
    [output] = [item.output for item in run.new_items if item.type == "tool_call_output_item"]
    return {"colour": output}


def tool_result(server: SimpleNamespace) -> Any:
    return _told(server, OpenAIChatCompletionsModel)


def response_tool_result(server: SimpleNamespace) -> Any:
    return _told(server, OpenAIResponsesModel)


def wrong_model(server: SimpleNamespace) -> Any:
    return Runner.run_sync(_agent(server, OpenAIResponsesModel, model="absent"), server.question).final_output


async def _broken(server: SimpleNamespace, kind: Any) -> Any:
    settings = {"max_tokens": server.many, "extra_body": {"ignore_eos": True}}
    run = Runner.run_streamed(_agent(server, kind, settings=settings), server.question)
    pieces = 0
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            if not pieces:
                os.kill(server.victim, signal.SIGKILL)
            pieces += 1
    return pieces


async def broken_stream(server: SimpleNamespace) -> Any:
    return await _broken(server, OpenAIChatCompletionsModel)


async def broken_response_stream(server: SimpleNamespace) -> Any:
    return await _broken(server, OpenAIResponsesModel)
