"""inspect-ai: models over responses with its probe, over chat, and as a server of vLLM's kind."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, Literal

from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.tool import ToolFunction, ToolInfo, ToolParam, ToolParams
from inspect_ai.util import json_schema
from pydantic import BaseModel, ConfigDict


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green"]


async def _generate(
    server: SimpleNamespace, model: str, *, tools: Any = (), tool_choice: Any = None, **more: Any
) -> Any:
    given = {"temperature": 0, "max_tokens": server.tokens, "max_retries": 0} | more
    os.environ |= {"LAMINA_API_KEY": server.key, "OPENAI_API_KEY": server.key}
    chosen = get_model(model, base_url=server.url, api_key=server.key, memoize=False, config=GenerateConfig(**given))
    return await chosen.generate(server.question, tools=list(tools), tool_choice=tool_choice)


def _facts(answer: Any) -> Any:
    return {
        "text": answer.completion,
        # It keeps those that the server has found in its cache apart.
        "prompt_tokens": answer.usage.input_tokens + (answer.usage.input_tokens_cache_read or 0),
        "completion_tokens": answer.usage.output_tokens,
    }


async def plain(server: SimpleNamespace) -> Any:
    return _facts(await _generate(server, f"openai-api/lamina/{server.model}"))


async def response(server: SimpleNamespace) -> Any:
    return _facts(await _generate(server, f"openai/{server.model}"))


async def vllm(server: SimpleNamespace) -> Any:
    return _facts(await _generate(server, f"vllm/{server.model}"))


async def tool(server: SimpleNamespace) -> Any:
    colour = ToolParam(type="string", enum=["red", "green"])
    info = ToolInfo(
        name="paint", description="Paint it.", parameters=ToolParams(properties={"colour": colour}, required=["colour"])
    )
    answer = await _generate(
        server,
        f"openai-api/lamina/{server.model}",
        tools=[info],
        tool_choice=ToolFunction("paint"),
        max_tokens=server.room,
    )
    call = answer.message.tool_calls[0]
    return {"name": call.function, "arguments": call.arguments}


async def structured(server: SimpleNamespace) -> Any:
    import json

    form = ResponseSchema(name="paint", json_schema=json_schema(Paint))
    answer = await _generate(server, f"openai-api/lamina/{server.model}", response_schema=form, max_tokens=server.room)
    return json.loads(answer.completion)


async def wrong_model(server: SimpleNamespace) -> Any:
    return _facts(await _generate(server, "openai-api/lamina/absent"))
