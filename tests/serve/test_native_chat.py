"""Chats in the Python clients, which get what the HTTP server answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from transformers import AutoTokenizer

import lamina
from lamina.chat.events import ChatAnswer
from lamina.chat.request import MAX_BYTES
from lamina.config import ClusterConfig
from lamina.errors import RequestError
from lamina.wire.requests import PART
from tests import harness
from tests.serve.conftest import Server

R = TypeVar("R")

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Tell a story."},
    {"role": "user", "content": "Once upon a time"},
    {"role": "assistant", "content": "there was a girl."},
    {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "boolean"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def asked(config: ClusterConfig, work: Callable[[lamina.AsyncClient], Coroutine[Any, Any, R]]) -> R:
    """What ``work`` returns with a client of the cluster."""

    async def run() -> R:
        async with harness.client(config) as client:
            return await work(client)

    return asyncio.run(run())


async def prompt_of(client: lamina.AsyncClient, ids: list[int]) -> Any:
    """How likely the model finds the tokens of a prompt, which only those of the same prompt are."""
    return (await client.generate(ids, max_tokens=1, prompt_logprobs=3)).prompt_logprobs


def test_the_prompt_is_that_of_the_transformers_library(cluster: ClusterConfig, checkpoint: Path) -> None:
    messages = [*MESSAGES[:3], {"role": "user", "content": "Go on, “你好”."}]
    library = AutoTokenizer.from_pretrained(checkpoint)
    ids = library.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    async def work(client: lamina.AsyncClient) -> None:
        answer = await client.chat(messages, max_tokens=9, prompt_logprobs=3)
        same = await client.generate(ids, max_tokens=9)

        assert (answer.tokens, answer.text, answer.prompt_tokens) == (same.tokens, same.text, len(ids))
        assert answer.prompt_logprobs == await prompt_of(client, ids)

    asked(cluster, work)


def test_the_answer_is_that_of_the_server(cluster: ClusterConfig, server: Server) -> None:
    """Whole and streamed, with asyncio and without."""
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    reply = server.ask("POST", "/v1/chat/completions", body).json
    choice = reply["choices"][0]

    async def streamed(client: lamina.AsyncClient) -> tuple[list[lamina.ChatEvent], lamina.ChatCompletion]:
        async with client.chat_stream(MESSAGES, max_tokens=24) as stream:
            events = [event async for event in stream]
            assert stream.finish_reason == choice["finish_reason"]
            return events, await stream.completion()

    events, whole = asked(cluster, streamed)
    with lamina.Client(str(cluster.front.address)) as client:
        same = client.chat(MESSAGES, max_tokens=24)
        with client.chat_stream(MESSAGES, max_tokens=24) as stream:
            first = next(stream)
            rest = stream.completion()

    assert whole.text == choice["message"]["content"]
    assert whole.tokens == choice["token_ids"]
    assert (whole.finish_reason, whole.prompt_tokens) == (choice["finish_reason"], reply["usage"]["prompt_tokens"])
    assert ChatAnswer().take(events).content == whole.text
    assert len(events) > 9
    assert events[0] == first
    assert whole == same == rest
    assert whole.timings.answer_s > 0


def test_a_call_that_is_required_is_one(cluster: ClusterConfig) -> None:
    """Whole and in a stream; its result goes back with the answer's message."""

    async def work(client: lamina.AsyncClient) -> None:
        choice: Any = {"type": "function", "function": {"name": "weather"}}
        answer = await client.chat(MESSAGES, tools=[WEATHER], tool_choice="required", max_tokens=200)
        stream = client.chat_stream(
            MESSAGES, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=200
        )
        events = [event async for event in stream]

        (call,) = answer.tool_calls
        assert call.name == "weather"
        assert json.loads(call.arguments).keys() == {"city", "days"}
        assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "", "tool_calls")
        assert answer.stopped_by is not None
        (streamed,) = ChatAnswer().take(events).calls
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        assert stream.finish_reason == "tool_calls"
        assert (await stream.completion()).prompt_tokens == answer.prompt_tokens
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        assert (await client.chat([*MESSAGES, answer.message, result], max_tokens=3)).tokens
        assert (await client.status()).requests_running == 0

    asked(cluster, work)


def test_the_content_may_be_constrained(cluster: ClusterConfig) -> None:
    async def work(client: lamina.AsyncClient) -> str:
        return (await client.chat(MESSAGES, constraint=lamina.OneOf(["yes", "no"]), max_tokens=20)).text

    assert asked(cluster, work) in ("yes", "no")


def test_a_special_token_in_a_message_is_text(cluster: ClusterConfig, server: Server) -> None:
    """The prompt is that of the server, which has the one special token of the template."""
    messages = [{"role": "user", "content": "hello</s><s>"}]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    ids = server.ask("POST", "/v1/chat/completions", body).json["prompt_token_ids"]

    async def work(client: lamina.AsyncClient) -> None:
        answer = await client.chat(messages, max_tokens=1, prompt_logprobs=3)
        assert answer.prompt_tokens == len(ids)
        assert answer.prompt_logprobs == await prompt_of(client, ids)

    asked(cluster, work)


def test_a_long_conversation_comes_in_parts(cluster: ClusterConfig) -> None:
    """What counts is how long a prompt the template makes of it."""

    async def work(client: lamina.AsyncClient) -> None:
        turn = {"role": "user", "content": "the quiet girl " * 90}
        answer = await client.chat([turn] * 4, max_tokens=2)
        unused = await client.chat([turn] * 4, max_tokens=2, chat_template_kwargs={"unused": "a“" * 3 * PART})
        assert answer.prompt_tokens > 1500
        assert unused == answer
        with pytest.raises(RequestError, match="the context is 2048"):
            await client.chat([turn] * 8, max_tokens=2)
        with pytest.raises(RequestError, match="the chat template makes more than"):
            await client.chat([turn] * 400, max_tokens=2)
        with pytest.raises(RequestError, match="bytes as JSON, 16777216 are allowed"):
            await client.chat([turn], max_tokens=2, chat_template_kwargs={"unused": "a" * MAX_BYTES})

    asked(cluster, work)


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([], {}, "messages: expected array of length >= 1, got []"),
        ("Hello", {}, "messages: expected array, got 'Hello'"),
        ([{"role": "robot", "content": "a"}], {}, "messages[0].role: "),
        ([{"role": "user", "content": "\udc80"}], {}, "messages[0].content: '\\udc80' at position 0 is half of a"),
        ([{"role": "user"}], {}, "messages[0].content: missing; a message of the user needs a text"),
        (MESSAGES, {"tools": [{"type": "function"}]}, "tools[0].function: missing"),
        (MESSAGES, {"tools": [WEATHER], "tool_choice": "any"}, "tool_choice: expected "),
        (MESSAGES, {"chat_template_kwargs": {"a": {1}}}, "cannot be written as JSON"),
        (MESSAGES, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs: 'messages' is a parameter of its"),
        (MESSAGES, {"tool": []}, "unknown setting 'tool'; did you mean 'tools'?"),
        (MESSAGES, {"temperature": "1"}, "temperature: expected float, got '1'"),
        (MESSAGES, {"parse_special": True}, "parse_special: a chat template writes the special tokens itself"),
        ([*MESSAGES, {"role": "user", "content": "\ufdd0"}], {}, "the noncharacter U+FDD0"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(cluster: ClusterConfig, messages: Any, settings: Any, message: str) -> None:
    """By the client where it can tell, else by the front; the place is named."""

    async def work(client: lamina.AsyncClient) -> None:
        with pytest.raises(RequestError) as caught:
            await client.chat(messages, max_tokens=1, **settings)
        assert message in str(caught.value)

    asked(cluster, work)


def test_a_stream_that_is_left_ends_its_request(cluster: ClusterConfig) -> None:
    async def work(client: lamina.AsyncClient) -> None:
        async with client.chat_stream(MESSAGES, ignore_eos=True) as stream:
            await anext(stream)
        answer = await stream.completion()
        assert answer.finish_reason == "cancelled"
        assert answer.text

        async def idle() -> bool:
            return (await client.status()).requests_running == 0

        await harness.eventually(idle)

    asked(cluster, work)
