"""What clients send becomes what templates expect, or an error that names the place."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lamina.chat.request import ChatFields, ChatRequest, read_chat
from lamina.errors import RequestError

USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatRequest:
    return read_chat(msgspec.convert({"messages": [USER], **fields}, ChatFields))


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "$schema": "x"}, **more}}


def test_messages_become_what_templates_expect() -> None:
    """Arguments become objects, parts texts, results know their function, and what is null is absent."""
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief", "cache_control": None}]},
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None,
         "annotations": [], "reasoning": "Hm", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "c1"},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]  # fmt: skip

    assert chat(messages=messages).messages == [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief"}]},
        {"role": "user", "content": "Hi", "name": "ann"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}],
            "reasoning_content": "Hm",
        },
        {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "No."},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", '"a"', "[" * 100000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    """A model may have written them, and the client only sends them back."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    [message] = chat(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            r"messages\[0\]\.content\[1\]\.type: parts of the type 'image_url' are not supported",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[0\]\.content\[0\]\.text: missing"),
        ({"role": "user", "content": None}, r"messages\[0\]\.content: missing; a message of the user needs"),
        ({"role": "assistant"}, r"messages\[0\]: .* content, tool_calls or both"),
        ({"role": "tool", "content": "x"}, r"messages\[0\]\.tool_call_id: missing"),
        ({"role": "user", "content": "x", "tool_call_id": "y"}, r"messages\[0\]\.tool_call_id: only"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
            r"messages\[0\]\.tool_calls: only the assistant",
        ),
    ],
)
def test_messages_that_do_not_fit_are_named(message: dict[str, Any], error: str) -> None:
    """The error begins with the place."""
    with pytest.raises(RequestError, match=error):
        chat(messages=[message])


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "function", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "weight": 1}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [USER] * 10_000},
        {"tools": [tool("f")] * 1000},
    ],
)
def test_shapes_and_counts_are_bounded(fields: dict[str, Any]) -> None:
    """Whatever is no message, or too many, is refused."""
    with pytest.raises(msgspec.ValidationError):
        chat(**fields)


def test_tools_are_chosen() -> None:
    """All tools stay in the prompt; the choice says which may be called, and whether one must."""
    tools = [tool("f", strict=True), tool("g", description="d", strict=None)]

    auto = chat(tools=tools)
    assert auto.tools == tools
    assert [(f.name, f.strict, f.parameters) for f in auto.functions] == [
        ("f", True, {"type": "object", "$schema": "x"}),
        ("g", False, {"type": "object", "$schema": "x"}),
    ]
    assert (auto.must_call, auto.parallel) == (False, True)
    assert chat(tools=tools, tool_choice="required", parallel_tool_calls=False).must_call
    assert not chat(tools=tools, parallel_tool_calls=False).parallel
    named = chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    assert ([f.name for f in named.functions], named.must_call, named.tools) == (["g"], True, tools)
    assert not named.parallel
    none = chat(tools=tools, tool_choice="none")
    assert (none.tools, none.functions, none.must_call) == ([], [], False)


def test_a_required_call_without_tools_is_none() -> None:
    """Some clients ask for it."""
    assert chat(tool_choice="required") == chat()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type: tools of the type 'web_search' are not supported"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]\.function: missing"),
        ({"tools": [tool("a b")]}, r"tools\[0\]\.function\.name: expected a name of .* got 'a b'"),
        ({"tools": [tool("f"), tool("f")]}, "two functions have the name 'f'"),
        ({"tools": [tool("f")], "tool_choice": "any"}, 'tool_choice: expected "none"'),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools"}}, r"tool_choice\.type"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "no tool has the name 'g'; the tools are 'f'",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: 'messages' is a parameter of its own"),
        ({"continue_final_message": True}, r"continue_final_message: .* messages\[0\]\.role is 'user'"),
    ],
)
def test_tools_and_variables_that_do_not_fit_are_named(fields: dict[str, Any], error: str) -> None:
    """The error begins with the place."""
    with pytest.raises(RequestError, match=error):
        chat(**fields)


def test_effort_and_variables_go_to_the_template() -> None:
    """No effort also turns reasoning off where templates have a switch; variables go over it."""
    assert chat(reasoning_effort="low").variables == {"reasoning_effort": "low"}
    assert chat(reasoning_effort="none", chat_template_kwargs={"thinking": True}).variables == {
        "reasoning_effort": "none",
        "enable_thinking": False,
        "thinking": True,
    }
