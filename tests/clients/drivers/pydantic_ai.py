"""pydantic-ai: agents over responses, which model strings use, and over chat."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any, Literal

from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


def _chat(server: SimpleNamespace, model: str | None = None) -> OpenAIChatModel:
    client = AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0)
    return OpenAIChatModel(model or server.model, provider=OpenAIProvider(openai_client=client))


def _settings(server: SimpleNamespace, **more: Any) -> Any:
    return {"temperature": 0, "max_tokens": server.tokens} | more


def _facts(answer: Any) -> Any:
    usage = answer.usage() if callable(answer.usage) else answer.usage
    return {"text": answer.output, "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}


def plain(server: SimpleNamespace) -> Any:
    return _facts(Agent(_chat(server)).run_sync(server.question, model_settings=_settings(server)))


def response(server: SimpleNamespace) -> Any:
    os.environ |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": server.key}
    agent = Agent(f"openai:{server.model}")
    return _facts(agent.run_sync(server.question, model_settings=_settings(server)))


async def stream(server: SimpleNamespace) -> Any:
    async with Agent(_chat(server)).run_stream(server.question, model_settings=_settings(server)) as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
        usage = answer.usage() if callable(answer.usage) else answer.usage
    return {"pieces": pieces, "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}


async def response_stream(server: SimpleNamespace) -> Any:
    os.environ |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": server.key}
    agent = Agent(f"openai:{server.model}")
    async with agent.run_stream(server.question, model_settings=_settings(server)) as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
        usage = answer.usage() if callable(answer.usage) else answer.usage
    return {"pieces": pieces, "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}


def tool_arguments(server: SimpleNamespace) -> Any:
    agent = Agent(_chat(server), output_type=Paint, retries=0)
    settings = _settings(server, max_tokens=server.room, logit_bias=server.closing)
    return agent.run_sync(server.question, model_settings=settings).output.model_dump()


def structured(server: SimpleNamespace) -> Any:
    agent = Agent(_chat(server), output_type=NativeOutput(Paint), retries=0)
    return agent.run_sync(server.question, model_settings=_settings(server, max_tokens=server.room)).output.model_dump()


def response_tool_arguments(server: SimpleNamespace) -> Any:
    os.environ |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": server.key}
    agent = Agent(f"openai:{server.model}", output_type=Paint, retries=0)
    settings = _settings(server, max_tokens=server.room, extra_body={"logit_bias": server.closing})
    return agent.run_sync(server.question, model_settings=settings).output.model_dump()


def wrong_model(server: SimpleNamespace) -> Any:
    return Agent(_chat(server, "absent")).run_sync(server.question).output


async def broken_stream(server: SimpleNamespace) -> Any:
    settings = _settings(server, max_tokens=server.many, extra_body={"ignore_eos": True})
    pieces = []
    async with Agent(_chat(server)).run_stream(server.question, model_settings=settings) as answer:
        async for piece in answer.stream_text(delta=True, debounce_by=None):
            if not pieces:
                os.kill(server.victim, signal.SIGKILL)
            pieces.append(piece)
    return len(pieces)
