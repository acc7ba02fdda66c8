"""What /v1/completions answers, and how a stream of it looks."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from lamina.config import ClusterConfig
from tests import harness
from tests.serve.conftest import Server

PROMPT = "Once upon a time"


async def _native(config: ClusterConfig, prompt: str, max_tokens: int) -> Any:
    async with harness.client(config) as client:
        return await client.generate(prompt, max_tokens=max_tokens)


def test_the_text_is_that_of_the_native_client(server: Server, cluster: ClusterConfig) -> None:
    """Whole and streamed."""
    expected = asyncio.run(_native(cluster, PROMPT, 40))

    whole = server.complete(prompt=PROMPT, max_tokens=40, return_token_ids=True).json["choices"][0]
    events = server.complete(prompt=PROMPT, max_tokens=40, stream=True).events

    assert (whole["text"], whole["token_ids"]) == (expected.text, expected.tokens)
    assert "".join(event["choices"][0]["text"] for event in events) == expected.text


def test_a_stream_has_one_token_a_chunk_then_the_reason_then_the_usage(server: Server) -> None:
    """And the usage only if it was asked for."""
    events = server.complete(
        prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True}, return_token_ids=True
    ).events

    *chunks, last, usage = events
    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [1] * 8
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert all("usage" not in event for event in (*chunks, last))
    for event in events:
        assert event["object"] == "text_completion"
        assert isinstance(event["created"], int)
        assert (event["id"], event["model"]) == (events[0]["id"], "checkpoint")
    plain = server.complete(prompt=PROMPT, max_tokens=2, stream=True).events
    assert all(event["choices"] and "usage" not in event for event in plain)


def test_running_totals_come_with_every_chunk_if_asked(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.complete(prompt=PROMPT, max_tokens=3, stream=True, stream_options=options).events

    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (PROMPT, 1),
        ([PROMPT, "The quiet girl"], 2),
        ([0, 974, 815, 260, 472], 1),
        ([[0, 974, 815, 260, 472], [0, 974]], 2),
    ],
)
def test_prompts_are_texts_or_ids_and_several_are_answered_by_index(server: Server, prompt: Any, texts: int) -> None:
    reply = server.complete(prompt=prompt, max_tokens=4, n=2).json

    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * texts))
    first = server.complete(prompt=PROMPT, max_tokens=4).json["choices"][0]["text"]
    assert reply["choices"][0]["text"] == reply["choices"][1]["text"] == first
    assert reply["usage"]["completion_tokens"] == 8 * texts


def test_the_default_length_of_a_completion_is_16(server: Server) -> None:
    assert server.complete(prompt=PROMPT).json["usage"]["completion_tokens"] == 16


def test_null_is_absence(server: Server) -> None:
    """As some clients send every key."""
    nothing = dict.fromkeys(("max_tokens", "seed", "stop", "logprobs", "user", "suffix", "best_of", "stream_options"))

    assert server.complete(prompt=PROMPT, **nothing).status == 200


def test_a_seed_gives_the_same_answer_again(server: Server) -> None:
    def sampled(**more: Any) -> list[str]:
        reply = server.complete(prompt=PROMPT, max_tokens=12, temperature=1.0, seed=7, **more)
        return [choice["text"] for choice in reply.json["choices"]]

    first, second = sampled(n=2)
    assert first != second
    assert sampled() == [first]


def test_the_python_client_reads_it(client: openai.OpenAI) -> None:
    """Streaming and not."""
    whole = client.completions.create(model="checkpoint", prompt=PROMPT, max_tokens=5, temperature=0)
    chunks = list(
        client.completions.create(model="checkpoint", prompt=PROMPT, max_tokens=5, temperature=0, stream=True)
    )

    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == ["checkpoint"]
