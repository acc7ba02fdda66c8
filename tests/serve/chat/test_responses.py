"""/v1/responses: items become messages, and answers the objects and events that the API's own client reads."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from openai import Omit
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lamina.chat.events import CallArguments, CallBegin, CallEnd, ChatEvent, ContentDelta, ReasoningDelta
from lamina.chat.request import ChatFields, read_chat
from lamina.errors import RequestError
from lamina.serve.response_events import Event, ResponseUsage, ResponseWriter
from lamina.serve.response_request import read_response

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": "d"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def messages_of(items: Any, **more: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = read_response({"input": items, **more}).chat["messages"]
    read_chat(msgspec.convert({"messages": messages}, ChatFields))
    return messages


def test_items_become_messages() -> None:
    """ReasoningDelta, text and calls between what others say are one message of the assistant."""
    items = [
        {"role": "developer", "content": "Be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "x"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "y"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "?"},
        {"role": "assistant", "content": "One"},
        {"role": "assistant", "content": "Two"},
    ]  # fmt: skip

    def call(id_: str, arguments: str) -> dict[str, Any]:
        return {"id": id_, "type": "function", "function": {"name": "f", "arguments": arguments}}

    assert messages_of(items, instructions="Obey") == [
        {"role": "system", "content": "Obey"},
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm",
            "content": [{"type": "text", "text": "I look"}],
            "tool_calls": [call("c1", '{"a": 1}'), call("c2", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "One"},
        {"role": "assistant", "content": "Two"},
    ]


def test_parameters_become_those_of_a_chat() -> None:
    """Each parameter has its counterpart; what clients send by default is accepted."""
    body = {
        "input": "Hi",
        "model": "m",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": None,
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "store": False,
        "truncation": "disabled",
        "metadata": {"a": "b"},
        "top_k": 3,
    }
    assert read_response(body).chat == {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "m",
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object"}, "strict": True, "description": "d"},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        "reasoning_effort": "low",
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 0,
        "metadata": {"a": "b"},
        "top_k": 3,
    }
    # What openai-agents and inspect-ai send beside the input.
    for more in ({"include": [], "tools": [], "instructions": "x"}, {"store": True, "stream": True}):
        assert read_response({"input": [{"role": "user", "content": "Hi"}], **more}).chat["messages"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"previous_response_id": "resp_1"}, "^previous_response_id: not supported, as this server keeps no state"),
        ({"conversation": "c"}, "^conversation: not supported"),
        ({"temprature": 1}, "^temprature: unknown key 'temprature'; did you mean 'temperature'"),
        ({"truncation": "auto"}, "^truncation: "),
        ({"background": True}, "^background: "),
        ({"input": []}, "^input: "),
        ({"input": [{"type": "reasoning", "summary": []}]}, "^input: expected a message, a call or its output"),
        ({"max_output_tokens": 10**30}, "^max_output_tokens: expected int <= "),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"^input\[0\]\.type: items of the type 'item_reference'"),
        ({"input": [{"foo": 1}]}, r"^input\[0\]\.type: missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, r"^input\[0\]\.content\[0\]\.type: "),
        ({"input": [{"role": "tool", "content": ""}]}, r"^input\[0\]\.role: expected one of user"),
        ({"input": [{"type": "function_call", "name": "f"}]}, r"^input\[0\]: missing key 'call_id'"),
        ({"tools": [{"type": "web_search"}]}, r"^tools\[0\]\.type: tools of the type 'web_search'"),
        ({"tool_choice": {"type": "file_search"}}, "^tool_choice: expected"),
        ({"text": {"format": {"type": "json_schema"}}}, r"^text\.format\.schema: missing"),
        ({"text": {"format": {"type": "xml"}}}, r"^text\.format\.type: expected one of text"),
        ({"include": ["file_search_call.results"]}, r"^include\[0\]: 'file_search_call.results' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(body: dict[str, Any], error: str) -> None:
    """The error begins with the place."""
    with pytest.raises(RequestError, match=error):
        read_response({"input": "Hi", **body})


ANSWER: list[ChatEvent] = [
    ReasoningDelta("H"),
    ReasoningDelta("m"),
    ContentDelta("I "),
    ContentDelta("look"),
    CallBegin(0, "call_1", "f"),
    CallArguments(0, '{"a"'),
    CallArguments(0, ": 1}"),
    CallEnd(0),
    CallBegin(1, "call_2", "f"),
    CallEnd(1),
    ContentDelta("Done"),
]
USAGE = ResponseUsage(prompt=7, answer=5, shared=3, reasoning=2)


def writer(**body: Any) -> ResponseWriter:
    request = read_response({"input": "Hi", **body})
    return ResponseWriter(request, id_="resp_1", created=1, model="m", temperature=1.0, top_p=1.0)


def read_by_client(events: list[Event], **text: Any) -> Response:
    """Return the response that the API's own client builds up from a stream."""
    adapter: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=Omit(), text_format=Omit())
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        adapter.validate_python(event, strict=True)
        state.handle_event(validate_type(type_=ResponseStreamEvent, value=event))  # type: ignore[arg-type]
    return Response.model_validate(events[-1]["response"], strict=True)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_client_builds_up_the_answer_from_the_stream(reason: Any) -> None:
    """All events fit the client's types in order, and their sum is the response at the end."""
    one = writer(tools=[TOOL], instructions="Obey", reasoning={"effort": "low", "summary": "auto"}, metadata={"a": "b"})
    events = [*one.begin(), *one.push(ANSWER[:5]), *one.push(ANSWER[5:]), *one.finish(reason, USAGE)]

    response = read_by_client(events)
    assert response.output_text == "I lookDone"
    assert [item.type for item in response.output] == [
        *("reasoning", "message", "function_call", "function_call", "message"),
    ]
    assert response.output[2].to_dict() == {
        "type": "function_call",
        "name": "f",
        "arguments": '{"a": 1}',
        "call_id": "call_1",
        "status": "completed",
        "id": response.output[2].id,
    }
    assert response.output[0].content[0].text == "Hm"  # type: ignore[union-attr,index]
    assert response.usage is not None
    assert (response.usage.total_tokens, response.usage.output_tokens_details.reasoning_tokens) == (12, 2)
    assert events[-1]["response"] == one.response
    assert response.status == ("completed" if reason == "stop" else "incomplete")
    last = "completed" if reason == "stop" else "incomplete"
    assert response.output[-1].status == last  # type: ignore[union-attr]
    if reason == "length":
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        last,
    ]


def test_an_empty_answer_has_a_message() -> None:
    """Clients take the text of the last message."""
    one = writer(text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"})
    response = read_by_client([*one.begin(), *one.push([ReasoningDelta("Hm")]), *one.finish("stop", USAGE)])
    assert response.output_text == ""
    assert response.output[-1].type == "message"


def test_logprobs_are_with_their_text() -> None:
    """Those of a delta are in the delta, and all are in the message."""
    about = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    one = writer(include=["message.output_text.logprobs"])
    events = [*one.begin(), *one.push([ContentDelta("a")], [about]), *one.push([ContentDelta("a")], [about])]
    response = read_by_client([*events, *one.finish("stop", USAGE)])
    assert [event["logprobs"] for event in events if event["type"].endswith("text.delta")] == [[about], [about]]
    assert len(response.output[0].content[0].logprobs) == 2  # type: ignore[union-attr,index,arg-type]


def test_a_failed_answer_says_why() -> None:
    """The last event has the error."""
    one = writer()
    response = read_by_client([*one.begin(), *one.push([ContentDelta("a")]), *one.fail("a node was lost")])
    assert response.status == "failed"
    assert response.error is not None
    assert (response.error.code, response.error.message) == ("server_error", "a node was lost")
