"""What is not possible is refused in the form of OpenAI's API, with a sentence that names it."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import openai
import pytest

from lamina.serve.completions import CompletionBody
from tests.serve.conftest import Server


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown parameter 'temprature', did you mean 'temperature'?"),
        ({"temperature": "hot"}, "temperature", "temperature: expected float, got 'hot'"),
        ({"temperature": -1}, "temperature", "temperature: expected float >= 0.0, got -1"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "repetition_penalty: expected float >= 0.01, got 1e-40"),
        ({"best_of": 3}, "best_of", "best_of is not supported; use n"),
        ({"suffix": "end"}, "suffix", "suffix is not supported; leave it out"),
        ({"n": 0}, "n", "n: expected int >= 1, got 0"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: expected int >= 0, got -1"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "min_tokens: expected at most max_tokens, 3, got 9"),
        ({"logprobs": 21}, "logprobs", "logprobs: expected int <= 20, got 21"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "logit_bias: expected token ids as keys, got 'hello'"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias[...]: expected float <= 100.0, got {'5': 101}"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "logit_bias: expected token ids as keys, got '05'"),
        ({"prompt": None}, "prompt", "missing key 'prompt'"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex",
         "structured_outputs.regex: expected str of length >= 1, got ''"),
        ({"structured_outputs": {"choice": [7]}}, "structured_outputs.choice[0]",
         "structured_outputs.choice[0]: expected str, got 7"),
        ({"stop": [""]}, "stop[0]", "stop[0]: expected str of length >= 1, got ''"),
        ({"prompt": []}, "prompt", "prompt: expected a text or token ids, got an empty list"),
        ({"prompt": [1, "a"]}, "prompt", "prompt: token ids stand among texts or lists; give a list of one kind"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: expected str | array, got {'a': 1}"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt", ("prompt: 600 prompts with n = 2 are more than 1024 answers; "
         "send several requests")),
        ({"stream_options": {"include_usge": True}}, "stream_options", ("stream_options: unknown key 'include_usge'; "
         "did you mean 'include_usage'?")),
        ({"guided_json": {}}, "guided_json", 'guided_json is not supported; use structured_outputs: {"json": ...}'),
        ({"response_format": {"type": "xml"}}, "response_format.type", ("response_format.type: "
         "expected one of text, json_object, json_schema; got 'xml'")),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(server: Server, body: dict[str, Any], param: str, message: str) -> None:
    """With what was expected, and what was found."""
    reply = server.complete(**{"prompt": "Once"} | body)

    assert reply.status == 400
    assert (reply.error["param"], reply.error["message"]) == (param, message)
    assert reply.error["type"] == "invalid_request_error"


def _is_number(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(map(_is_number, get_args(kind)))
    return getattr(kind, "__origin__", kind) in (int, float)


NUMBERS = [field.name for field in msgspec.structs.fields(CompletionBody) if _is_number(field.type)]


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 1 << 70])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(server: Server, name: str, value: int) -> None:
    """One that is too large or too small for the messages to the front is refused by its own name, too."""
    reply = server.complete(prompt="Once", **{name: value})

    assert reply.status == 400
    assert reply.error["param"] == name
    assert reply.error["message"].startswith(f"{name}: expected")


def test_every_unknown_parameter_is_named(server: Server) -> None:
    assert server.complete(prompt="Once", foo=1, bar=2).error["message"] == (
        "unknown parameter 'foo'; unknown parameter 'bar'"
    )


def test_what_changes_nothing_is_accepted(server: Server) -> None:
    """As many clients send such keys by default."""
    harmless = {"user": "me", "store": False, "metadata": {"a": "b"}, "best_of": 1, "suffix": "", "top_k": -1}

    assert server.complete(prompt="Once", max_tokens=1, **harmless).status == 200


def test_a_prompt_that_the_context_does_not_take_is_refused(server: Server) -> None:
    """By the front for ids, and before they are encoded for texts."""
    assert "context" in server.complete(prompt=[5] * 3000).error["message"]
    assert server.complete(prompt="x" * 1_000_000).status == 400
    assert server.complete(prompt=[10**6]).status == 400


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist here; expected one of 'checkpoint'"):
        client.completions.create(model="gpt-5", prompt="Once")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("PUT", "/health", 405)],
)
def test_there_is_no_other_endpoint_or_method(server: Server, method: str, path: str, status: int) -> None:
    reply = server.ask(method, path, None if method == "GET" else {})

    assert reply.status == status
    assert path in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; expected a JSON object"),
        (b"[1]", "the body is not a JSON object, but list"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON in UTF-8"),
        (b'{"prompt": "\\ud83d"}', "the body is not valid JSON in UTF-8"),
        (b'{"prompt": "a"', "the body is not valid JSON in UTF-8"),
        (b'{"metadata": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "the body nests values more than 64 deep"),
        (b"[" * 200_000, "the body nests values more than 64 deep"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: Server, body: bytes, message: str) -> None:
    reply = server.ask("POST", "/v1/completions", body)

    assert reply.status == 400
    assert message in reply.error["message"]


def test_another_type_of_body_is_refused(server: Server) -> None:
    reply = server.ask("POST", "/v1/completions", b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"})

    assert (reply.status, reply.error["type"]) == (415, "invalid_request_error")

    reply = server.ask("POST", "/v1/completions", b"\x1f\x8b", {"Content-Encoding": "gzip"})

    assert reply.status == 415
    assert "content-encoding: 'gzip' is not supported" in reply.error["message"]
