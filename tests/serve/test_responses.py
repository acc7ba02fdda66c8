"""/v1/responses: the same answers as in chats, in the newer form of the API."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.conftest import Server
from tests.serve.test_parameters import SCHEMA

INPUT = "Once upon a time"


def test_a_response_has_the_text_of_the_chat(client: openai.OpenAI) -> None:
    """Whole and streamed."""
    chat = client.chat.completions.create(
        model="checkpoint", messages=[{"role": "user", "content": INPUT}], max_tokens=12, temperature=0
    )
    whole = client.responses.create(model="checkpoint", input=INPUT, max_output_tokens=12, temperature=0)
    events = list(
        client.responses.create(model="checkpoint", input=INPUT, max_output_tokens=12, temperature=0, stream=True)
    )

    text = chat.choices[0].message.content
    assert whole.output_text == text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert (whole.status, whole.usage and whole.usage.output_tokens) == ("incomplete", 12)
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "decide", "parameters": SCHEMA, "strict": True}]
    asked: Any = {"model": "checkpoint", "input": INPUT, "tools": tools, "tool_choice": "required"}

    whole = client.responses.create(**asked, max_output_tokens=200)

    (call,) = [item for item in whole.output if item.type == "function_call"]
    assert call.name == "decide"
    assert json.loads(call.arguments)["answer"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "a"}, "previous_response_id"),
        ({"inputs": "a"}, "inputs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
    ],
)
def test_what_needs_state_is_refused(server: Server, body: dict[str, Any], param: str) -> None:
    reply = server.ask("POST", "/v1/responses", {"input": "a"} | body)

    assert (reply.status, reply.error["param"]) == (400, param)


def test_the_events_are_named_and_complete(server: Server) -> None:
    """As clients look at either."""
    connection = server.post("/v1/responses", {"input": "a", "max_output_tokens": 2, "stream": True})
    connection.settimeout(10)
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        got += connection.recv(1 << 16)
    connection.close()

    names = [line[7:] for line in got.decode().splitlines() if line.startswith("event: ")]
    types = [json.loads(line[6:])["type"] for line in got.decode().splitlines() if line.startswith("data: ")]
    assert names == types
    assert len(names) > 5
