"""Libraries that send requests get from the endpoint what Lamina's own client gets, in their own types and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import ROOM, TOKENS, drive
from tests.clients.server import PROMPT, QUESTION, Server

CASES: dict[str, dict[str, str]] = {
    "openai": {
        **dict.fromkeys(("plain", "stream", "response", "response_stream"), "chat"),
        **dict.fromkeys(("tool", "streamed_tool"), "tool"),
        "completion": "completion",
        "structured": "arguments",
        "wrong_model": "NotFoundError",
        "wrong_parameter": "BadRequestError",
        "broken_stream": "APIError",
    },
    "litellm": {
        **dict.fromkeys(("plain", "stream", "passed_on"), "chat"),
        "tool": "tool",
        "structured": "arguments",
        "wrong_model": "NotFoundError",
        "broken_stream": "APIError",
    },
    "langchain": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        "completion": "completion",
        "tool": "tool",
        **dict.fromkeys(("structured", "structured_by_tool"), "arguments"),
        "wrong_model": "NotFoundError",
        "broken_stream": "APIError",
    },
    "llm": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        "completion": "completion",
        "structured": "arguments",
        "wrong_model": "RuntimeError",
        "broken_stream": "RuntimeError",
    },
    "instructor": {
        **dict.fromkeys(("tool_arguments", "structured", "streamed_tool_arguments", "json_object"), "arguments"),
        "wrong_model": "InstructorRetryException",
    },
    "pydantic-ai": {
        **dict.fromkeys(("plain", "stream", "response", "response_stream"), "chat"),
        **dict.fromkeys(("tool_arguments", "structured", "response_tool_arguments"), "arguments"),
        "wrong_model": "ModelHTTPError",
        "broken_stream": "ModelAPIError",
    },
    "dspy": {"plain": "chat", "structured": "arguments", "wrong_model": "LMUnsupportedModelError"},
    "smolagents": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        "tool_call": "tool",
        "wrong_model": "NotFoundError",
        "broken_stream": "APIError",
    },
    "openai-agents": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        **dict.fromkeys(("response", "response_stream"), "ending chat"),
        **dict.fromkeys(
            ("structured", "response_structured", "tool_arguments", "response_tool_arguments"), "arguments"
        ),
        **dict.fromkeys(("tool_result", "response_tool_result"), "arguments"),
        "wrong_model": "NotFoundError",
        **dict.fromkeys(("broken_stream", "broken_response_stream"), "APIError"),
    },
    "llama-index": {
        **dict.fromkeys(("plain", "stream", "required_without_tools"), "chat"),
        "completion": "completion",
        "tool_arguments": "arguments",
        "wrong_model": "NotFoundError",
        "broken_stream": "APIError",
    },
    "haystack": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        "tool": "tool",
        "structured": "arguments",
        "wrong_model": "NotFoundError",
        "broken_stream": "APIError",
    },
    "inspect-ai": {
        **dict.fromkeys(("plain", "response", "vllm"), "chat"),
        "tool": "tool",
        "structured": "arguments",
        "wrong_model": "NotFoundError",
    },
    "ai-sdk": {
        **dict.fromkeys(("plain", "stream"), "chat"),
        **dict.fromkeys(("tool", "streamed_tool"), "tool"),
        "structured": "arguments",
        "json_object": "object",
        "wrong_model": "AI_APICallError",
        "broken_stream": "Error",
    },
}
"""What each case of ``drivers/`` has to give: an answer that is compared, valid arguments, or the name of an error."""


def _parameters() -> list[Any]:
    slow = (pytest.mark.slow, pytest.mark.timeout(2400))  # an environment may have to be made first
    return [pytest.param(client, id=client, marks=() if client == "openai" else slow) for client in CASES]


@pytest.mark.parametrize("client", _parameters())
def test_a_client_gets_what_it_asks_for(client: str, server: Server, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """The text and the counts of Lamina's own client; JSON that fits the schema; or the client's own error."""
    cases = CASES[client]
    calm = [case for case in cases if not case.startswith("broken")]
    results = drive(client, calm, server, tmp_path)  # in one process, as importing a client takes seconds
    for case in cases.keys() - set(calm):
        try:
            results |= drive(client, [case], server, tmp_path)
        finally:
            server.restart_front()
    for case, expected in cases.items():
        with subtests.test(case):
            _check(results[case], expected, server)
            if case == "wrong_model":
                assert "absent" in results[case]["message"]


def _check(result: dict[str, Any], expected: str, server: Server) -> None:
    if expected[0].isupper():
        assert expected in result.get("raised", ()), result
        return
    assert "value" in result, result["traceback"]
    value = result["value"]
    if expected == "arguments":
        assert value in ({"colour": "red"}, {"colour": "green"})
    elif expected == "object":
        assert isinstance(value, dict)
    elif expected == "tool":
        assert value["name"].lower() == "paint"
        assert value["arguments"] in ({"colour": "red"}, {"colour": "green"})
    else:
        _compare(value, server, expected)


def _compare(value: dict[str, Any], server: Server, kind: str) -> None:
    prompt = server.tokenizer(PROMPT)["input_ids"] if kind == "completion" else server.chat_ids(QUESTION)
    settings = {"min_tokens": TOKENS, "logit_bias": server.closing} if kind == "ending chat" else {}
    own = server.answer(prompt, ROOM if settings else TOKENS, **settings)
    if "pieces" in value:
        assert len(value["pieces"]) >= 1
    text = value["text"] if "text" in value else "".join(value["pieces"])
    assert text.strip() == own.text.strip()  # some clients strip what they show
    assert value["prompt_tokens"] in (len(prompt), None)
    if value["completion_tokens"] is not None:  # llm shows no usage of completions
        assert value["completion_tokens"] == len(own.tokens)
    assert value.get("finish", own.finish_reason) == own.finish_reason
