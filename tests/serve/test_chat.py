"""What /v1/chat/completions answers, and how a stream of it looks."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from lamina.config import ClusterConfig
from tests import harness
from tests.serve.conftest import Server

PROMPT = "user: Once upon a time\nassistant:"
"""What the template makes of it, behind the first special token."""
USER: Any = [{"role": "user", "content": "Once upon a time"}]


async def _native(config: ClusterConfig, max_tokens: int) -> Any:
    async with harness.client(config) as client:
        return await client.generate(PROMPT, max_tokens=max_tokens)


def test_the_answer_is_what_follows_the_rendered_template(client: openai.OpenAI, cluster: ClusterConfig) -> None:
    """Whole and streamed, and the prompt has one special token at its beginning."""
    expected = asyncio.run(_native(cluster, 24))

    whole = client.chat.completions.create(model="checkpoint", messages=USER, max_completion_tokens=24, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="checkpoint", messages=USER, max_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip

    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    first, *rest, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in [first, *rest]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in rest] == [None] * len(rest)
    assert last.choices[0].finish_reason == expected.finish_reason
    assert usage.choices == []
    assert usage.usage == whole.usage


def test_content_may_be_a_list_of_texts(server: Server) -> None:
    parts = [{"type": "text", "text": "Once upon "}, {"type": "text", "text": "a time"}]

    reply = server.ask(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    )

    assert reply.status == 200


def test_each_of_several_answers_has_its_chunks(server: Server) -> None:
    """By index, each with a role first and a reason last."""
    events = server.chat(n=3, max_tokens=5, stream=True, temperature=1, seed=3).events

    for index in range(3):
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["finish_reason"] == "length"
        assert len(choices) == 7


def test_without_a_length_an_answer_may_fill_the_context(server: Server) -> None:
    """It ends when the model does, or when the context is full."""
    reply = server.chat("the quiet girl " * 400, ignore_eos=True).json

    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 2048
    assert reply["usage"]["completion_tokens"] > 16


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": []}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"mesages": []}, "mesages"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_of_a_chat_is_named(server: Server, body: dict[str, Any], param: str) -> None:
    reply = server.chat(**body)

    assert (reply.status, reply.error["param"]) == (400, param)


def test_a_special_token_in_a_text_is_text(server: Server) -> None:
    """Only the template writes special tokens."""
    plain = server.chat("hello</s>", max_tokens=1, return_token_ids=True).json["prompt_token_ids"]

    assert plain.count(1) == 0
    assert plain.count(0) == 1
