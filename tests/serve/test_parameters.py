"""Every parameter that is accepted works."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lamina.config import ClusterConfig
from tests import harness
from tests.serve.conftest import Server

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def greedy(server: Server) -> dict[str, Any]:
    """The 16 likeliest tokens."""
    choice: dict[str, Any] = server.complete(prompt=PROMPT, return_token_ids=True).json["choices"][0]
    return choice


def test_a_text_of_stop_ends_the_answer_and_never_shows(server: Server, greedy: dict[str, Any]) -> None:
    """Not even in part, in a stream."""
    stop = greedy["text"][7:12]

    whole = server.complete(prompt=PROMPT, stop=[stop]).json["choices"][0]
    events = server.complete(prompt=PROMPT, stop=stop, stream=True).events
    kept = server.complete(prompt=PROMPT, stop=[stop], include_stop_str_in_output=True).json["choices"][0]

    expected = greedy["text"][: greedy["text"].index(stop)]
    assert (whole["text"], whole["finish_reason"], whole["stop_reason"]) == (expected, "stop", stop)
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert kept["text"] == expected + stop


def test_a_stop_token_ends_the_answer(server: Server, greedy: dict[str, Any]) -> None:
    token = greedy["token_ids"][4]

    choice = server.complete(prompt=PROMPT, stop_token_ids=[token]).json["choices"][0]

    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    assert greedy["text"].startswith(choice["text"])
    later = server.complete(prompt=PROMPT, stop_token_ids=[token], min_tokens=10).json
    assert later["usage"]["completion_tokens"] >= 10


def test_a_bias_and_bad_words_keep_tokens_out(server: Server, greedy: dict[str, Any]) -> None:
    first = greedy["token_ids"][0]

    biased = server.complete(prompt=PROMPT, logit_bias={str(first): -100}, return_token_ids=True).json["choices"][0]
    banned = server.complete(prompt=PROMPT, bad_words=["quiet"]).json["choices"][0]

    assert first not in biased["token_ids"]
    assert "quiet" not in banned["text"]


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2.0}])
def test_penalties_make_fewer_repetitions(server: Server, penalty: dict[str, float]) -> None:
    def repeated(**more: Any) -> int:
        ids = server.complete(prompt=PROMPT, max_tokens=60, return_token_ids=True, **more).json["choices"][0][
            "token_ids"
        ]
        return len(ids) - len(set(ids))

    assert repeated(**penalty) < repeated()


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_narrow_choice_is_greedy(server: Server, greedy: dict[str, Any], narrow: dict[str, float]) -> None:
    assert server.complete(prompt=PROMPT, temperature=1.5, **narrow).json["choices"][0]["text"] == greedy["text"]


def test_the_end_of_sequence_is_ignored_if_asked(server: Server) -> None:
    """By its token, which a bias makes the likeliest."""
    bias = {"logit_bias": {"1": 100}, "max_tokens": 5}

    assert server.complete(prompt=PROMPT, **bias).json["choices"][0]["finish_reason"] == "stop"
    assert server.complete(prompt=PROMPT, ignore_eos=True, **bias).json["choices"][0]["finish_reason"] == "length"
    shown = server.complete(prompt=PROMPT, ignore_eos=True, skip_special_tokens=False, **bias).json["choices"][0]
    assert shown["text"] == "</s>" * 5


def test_logprobs_of_a_completion_are_those_of_the_native_client(server: Server, cluster: ClusterConfig) -> None:
    """In the dialect of completions, where offsets point into the text."""

    async def native() -> Any:
        async with harness.client(cluster) as client:
            return await client.generate(PROMPT, max_tokens=6, logprobs=3)

    expected = asyncio.run(native())
    choice = server.complete(prompt=PROMPT, max_tokens=6, logprobs=3).json["choices"][0]
    events = server.complete(prompt=PROMPT, max_tokens=6, logprobs=3, stream=True).events

    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx([score.logprob for score in expected.logprobs], abs=1e-4)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert all(len(top) == 3 for top in found["top_logprobs"])
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    for key in found:
        assert [value for logprobs in streamed for value in logprobs[key]] == found[key]


def test_echo_with_logprobs_gives_loglikelihoods(server: Server) -> None:
    """As lm-eval reads them: prompt and one token, the first of which has none."""
    ids = [0, 974, 815, 260, 472]
    asked = {"prompt": [ids, ids[:3]], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    first, second = server.complete(**asked).json["choices"]

    logprobs = first["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == 6
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["tokens"][:2] == ["<s>", "Once"]
    assert second["logprobs"]["token_logprobs"][1:3] == pytest.approx(logprobs["token_logprobs"][1:3], abs=1e-3)
    assert first["text"].endswith(logprobs["tokens"][-1])
    none = server.complete(**asked | {"max_tokens": 0, "prompt": ids}).json
    assert none["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"][:5]
    assert "Once upon a time" in none["choices"][0]["text"]
    streamed = server.complete(**asked | {"prompt": ids, "stream": True}).events
    parts = [event["choices"][0]["logprobs"] for event in streamed if event["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == logprobs["tokens"]
    assert "".join(event["choices"][0]["text"] for event in streamed) == first["text"]


def test_prompt_logprobs_are_by_token_id(server: Server) -> None:
    choice = server.complete(prompt=PROMPT, max_tokens=1, prompt_logprobs=2).json["choices"][0]
    chat = server.chat(max_tokens=1, prompt_logprobs=0, return_token_ids=True).json

    nothing, *scores = choice["prompt_logprobs"]
    assert nothing is None
    assert len(scores) == 4
    for score, token in zip(scores, (974, 815, 260, 472), strict=True):
        assert score[str(token)]["logprob"] <= 0
        assert len(score) in (2, 3)
    assert " upon" in scores[1]["815"].values()
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])


def test_logprobs_of_a_chat_are_a_list_of_contents(client: openai.OpenAI) -> None:
    """With the bytes of each token, whole and streamed."""
    asked: dict[str, Any] = {
        "model": "checkpoint", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5,
        "temperature": 0, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))

    assert whole.choices[0].logprobs is not None
    contents = whole.choices[0].logprobs.content
    assert contents is not None
    text = b"".join(bytes(content.bytes or ()) for content in contents).decode()
    assert text == whole.choices[0].message.content
    for content in contents:
        assert len(content.top_logprobs) == 2
        assert content.logprob == pytest.approx(content.top_logprobs[0].logprob)
        assert math.exp(content.logprob) <= 1
    streamed = [
        content for chunk in chunks if chunk.choices[0].logprobs for content in chunk.choices[0].logprobs.content or ()
    ]
    assert [content.token for content in streamed] == [content.token for content in contents]


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}},
         lambda text: json.loads(text)["answer"] in ("yes", "no")),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: json.loads(text)["answer"] in ("yes", "no")),
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, lambda text: len(text) == 4 and set(text) <= set("abc")),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        ({"structured_outputs": {"grammar": 'start: "x" "y"+ "."'}}, lambda text: text[0] == "x" and text[-1] == "."),
        ({"response_format": {"type": "text"}}, bool),
    ],
)  # fmt: skip
def test_an_answer_is_what_it_has_to_be(server: Server, asked: dict[str, Any], fits: Any) -> None:
    """In completions and in chats."""
    text = server.complete(prompt=PROMPT, max_tokens=200, temperature=1.0, seed=5, **asked).json["choices"][0]["text"]
    chat = server.chat(max_tokens=200, temperature=1.0, seed=5, **asked).json["choices"][0]["message"]["content"]

    assert fits(text), text
    assert fits(chat), chat


def test_a_tool_is_called_if_it_must_be(client: openai.OpenAI) -> None:
    """By name, whole and streamed, with arguments that fit its schema."""
    tools: Any = [{"type": "function", "function": {"name": "decide", "parameters": SCHEMA, "strict": True}}]
    asked: dict[str, Any] = {
        "model": "checkpoint", "messages": [{"role": "user", "content": PROMPT}], "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "decide"}}, "max_tokens": 300, "seed": 1,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]

    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "decide"
    assert json.loads(call.function.arguments)["answer"] in ("yes", "no")
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert deltas[0].function is not None
    assert deltas[0].function.name == "decide"
    assert "".join((delta.function and delta.function.arguments) or "" for delta in deltas) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def test_lm_eval_finds_a_tokenizer(server: Server) -> None:
    """As it asks for one."""
    info = server.get("/tokenizer_info").json

    def encoded(text: str) -> list[int]:
        ids: list[int] = server.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
        return ids

    assert (encoded(info["eos_token"]), encoded(info["bos_token"])) == ([1], [0])
    assert info["chat_template"]
    ids = encoded("Once upon a time")
    assert server.ask("POST", "/detokenize", {"tokens": ids}).json == {"prompt": "Once upon a time"}
    assert server.ask("POST", "/detokenize", {"tokens": [10**6]}).error["param"] == "tokens"
    assert server.ask("POST", "/tokenize", {"prompt": "a"}).json["tokens"][0] == 0


def test_the_interface_describes_itself(server: Server) -> None:
    """Every parameter is in the document and on the page, which loads nothing from elsewhere."""
    document = server.get("/openapi.json").json
    page = server.get("/docs").body.decode()

    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "tools", "temperature", "max_completion_tokens"} <= set(schema["properties"])
    assert schema["required"] == ["messages"]
    for path in document["paths"]:
        assert path in page
    assert "http" not in page.replace("https://here", "")
    assert _references(document) <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def _references(value: Any) -> set[str]:
    def walk(inner: Any) -> Iterator[str]:
        if isinstance(inner, dict):
            if isinstance(inner.get("$ref"), str):
                yield inner["$ref"]
            for item in inner.values():
                yield from walk(item)
        elif isinstance(inner, list):
            for item in inner:
                yield from walk(item)

    return set(walk(value))


def test_counters_count(server: Server) -> None:
    """Requests by endpoint and status, and tokens."""
    before = _counters(server)
    server.complete(prompt=PROMPT, max_tokens=3)
    server.complete(prompt=PROMPT, max_tokens=-3)
    after = _counters(server)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown('lamina_http_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert grown('lamina_http_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert grown("lamina_http_generated_tokens_total") == 3
    assert grown("lamina_http_time_to_first_token_seconds_count") == 1
    assert grown("lamina_http_inter_token_latency_seconds_count") == 2


def _counters(server: Server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
