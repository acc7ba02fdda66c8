"""What a client asks for in a chat: the messages as templates expect them, the tools, and which of them to call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from lamina.errors import RequestError
from lamina.validation import explain

Message = dict[str, Any]
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
"""The name of a function."""

MAX_MESSAGES = 8192
MAX_PARTS = 1024
MAX_CALLS = 256
MAX_TOOLS = 512
MAX_BYTES = 1 << 24
"""The most bytes of a conversation as JSON text."""


class ContentPart(Struct, frozen=True):
    """A part of a message's content. Only text is known; other types are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Struct, frozen=True):
    """What a message called."""

    name: Name
    arguments: str | dict[str, Any] = ""
    """JSON text; some clients send the object."""


class Call(Struct, frozen=True):
    """One call of a tool in a message."""

    function: CalledFunction
    id: Annotated[str, Meta(max_length=256)] | None = None
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One of ``messages``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    tool_calls: Annotated[list[Call], Meta(max_length=MAX_CALLS)] | None = None
    """Of an assistant."""
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    """Of the result of a tool: the call that it answers."""
    reasoning_content: str | None = None
    """Of an assistant. It has two other names."""
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    """Is content, if there is no other. The next ones come with answers of the API that clients send back; nothing
    here makes use of them."""
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None
    provider_specific_fields: Any = None


class ChatFields(Struct, frozen=True, kw_only=True):
    """The parameters that make a chat of a request. ``null`` is the same as absence."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    """Functions with their parameters as JSON schemas."""
    tool_choice: str | dict[str, Any] | None = None
    """"none", "auto", "required", or {"type": "function", "function": {"name": ...}}."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; the default is that it may."""
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    """What the template is given to quote from."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, such as ``enable_thinking``."""
    reasoning_effort: Annotated[str, Meta(max_length=64)] | None = None
    """A variable of the template, too. "none" also sets ``enable_thinking`` and ``thinking`` to false."""
    include_reasoning: bool | None = None
    """Whether the answer has the model's reasoning; the default is that it has."""
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the beginning of an answer; the default is that it does, unless the last message
    is continued."""
    continue_final_message: bool | None = None
    """Whether the answer goes on with the last message."""


class _FunctionEntry(Struct, frozen=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolEntry(Struct, frozen=True):
    type: str
    function: _FunctionEntry | None = None


class _Tools(Struct, frozen=True):
    tools: list[_ToolEntry]


class _Chosen(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class _ChosenTool(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Chosen


class _Choices(Struct, frozen=True):
    tool_choice: _ChosenTool


@dataclass(frozen=True)
class ToolFunction:
    """A tool that the model may call."""

    name: str
    parameters: dict[str, Any]
    """The JSON schema of its arguments, an object."""
    strict: bool = False
    """Whether arguments have to fit the schema."""


@dataclass(frozen=True)
class ChatRequest:
    """What a prompt is made of, and what the answer may be."""

    messages: list[Message]
    """As templates expect them: arguments are objects, and what is absent has no key."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """As the client gave them; none if none may be called."""
    functions: list[ToolFunction] = field(default_factory=list)
    """The tools that may be called: all, or the one that was chosen."""
    must_call: bool = False
    """Whether the answer has to be a call."""
    parallel: bool = True
    """Whether it may be several."""
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    """Of the template."""
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def read_fields(plain: dict[str, Any]) -> ChatFields:
    """Return the parameters of a chat. A RequestError names what does not fit."""
    return _convert(plain, ChatFields)


def read_text(text: str) -> ChatRequest:
    """Return what a client asks for in JSON. RequestError if that is none, or as `read_chat` says."""
    try:
        plain = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as e:
        raise RequestError(f"the conversation is no JSON: {e}") from e
    if not isinstance(plain, dict):
        raise RequestError(f"the conversation: expected an object with messages, got {type(plain).__name__}")
    return read_chat(read_fields(plain))


_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


def read_chat(fields: ChatFields) -> ChatRequest:
    """Return what a request asks for. A RequestError begins with the place of what is wrong: "tools[0].type: ..."."""
    tools, functions, must_call = _tools_of(fields)
    variables: dict[str, Any] = {}
    if fields.reasoning_effort is not None:
        variables["reasoning_effort"] = fields.reasoning_effort
        if fields.reasoning_effort == "none":
            variables |= {"enable_thinking": False, "thinking": False}
    variables |= fields.chat_template_kwargs or {}
    if taken := _RESERVED & variables.keys():
        raise RequestError(
            f"chat_template_kwargs: {sorted(taken)[0]!r} is a parameter of its own; give it beside this one"
        )
    continued = bool(fields.continue_final_message)
    if continued and fields.messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message: the last message has to be the assistant's, "
            f"but messages[{len(fields.messages) - 1}].role is {fields.messages[-1].role!r}"
        )
    return ChatRequest(
        messages=_messages_of(fields.messages),
        tools=tools,
        functions=functions,
        must_call=must_call,
        # A tool that is chosen by name is called once: clients that choose one read one call.
        parallel=fields.parallel_tool_calls is not False and not isinstance(fields.tool_choice, dict),
        documents=fields.documents,
        variables=variables,
        include_reasoning=fields.include_reasoning is not False,
        add_generation_prompt=not continued if fields.add_generation_prompt is None else fields.add_generation_prompt,
        continue_final_message=continued,
    )


# -- messages


def _messages_of(messages: list[ChatMessage]) -> list[Message]:
    called: dict[str, str] = {}
    """The names of the functions that were called, by the ids of the calls."""
    plain = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        one: Message = {"role": message.role}
        content = _content_of(message, at)
        calls = message.tool_calls
        reasoning = message.reasoning_content or message.reasoning or message.thinking
        if calls and message.role != "assistant":
            raise RequestError(f"{at}.tool_calls: only the assistant calls tools, not the {message.role}")
        if content is not None:
            one["content"] = content
        elif message.role != "assistant":
            raise RequestError(f"{at}.content: missing; a message of the {message.role} needs a text")
        elif not calls and reasoning is None:
            raise RequestError(f"{at}: a message of the assistant needs content, tool_calls or both")
        if message.role == "assistant":
            if calls:
                one["tool_calls"] = [_call_of(call) for call in calls]
                called |= {call.id: call.function.name for call in calls if call.id is not None}
            if reasoning is not None:
                one["reasoning_content"] = reasoning
        name = message.name
        if message.role == "tool":
            if message.tool_call_id is None:
                raise RequestError(f"{at}.tool_call_id: missing; the result of a tool names the call that it answers")
            one["tool_call_id"] = message.tool_call_id
            name = name or called.get(message.tool_call_id)
        elif message.tool_call_id is not None:
            raise RequestError(
                f"{at}.tool_call_id: only messages of the role 'tool' answer a call, not {message.role!r}"
            )
        if name is not None:
            one["name"] = name
        plain.append(one)
    return plain


def _content_of(message: ChatMessage, at: str) -> str | list[dict[str, Any]] | None:
    content = message.content
    if content is None or isinstance(content, str):
        return message.refusal if content is None else content
    parts = []
    for i, part in enumerate(content):
        if part.type == "refusal" and part.refusal is not None:
            text: str | None = part.refusal
        elif part.type in ("text", "input_text", "output_text"):
            text = part.text
        else:
            raise RequestError(
                f"{at}.content[{i}].type: parts of the type {part.type!r:.100} are not supported; this server "
                "takes 'text'"
            )
        if text is None:
            raise RequestError(f"{at}.content[{i}].text: missing; a part of the type {part.type!r} has one")
        parts.append({"type": "text", "text": text})
    return parts


def _call_of(call: Call) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        # A model may have written arguments that are no object, and a client may send them back: the template gets them
        # as text then.
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
    plain: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id, **plain}


# -- tools


def _tools_of(fields: ChatFields) -> tuple[list[dict[str, Any]], list[ToolFunction], bool]:
    """Return the tools for the template, those that may be called, and whether one must be called."""
    tools = fields.tools or []
    functions = []
    for i, tool in enumerate(_convert({"tools": tools}, _Tools).tools):
        if tool.type != "function":
            raise RequestError(
                f"tools[{i}].type: tools of the type {tool.type!r:.100} are not supported; this server knows 'function'"
            )
        if tool.function is None:
            raise RequestError(f"tools[{i}].function: missing; it has the name and the parameters of the function")
        parameters = tool.function.parameters or {"type": "object", "properties": {}}
        functions.append(ToolFunction(tool.function.name, parameters, bool(tool.function.strict)))
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tools: two functions have the name {twice!r}; names have to differ")
    choice = fields.tool_choice if fields.tool_choice is not None else "auto"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise RequestError(
                'tool_choice: expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
                f"got {choice!r:.100}"
            )
        if choice == "none":
            return [], [], False
        return tools, functions, choice == "required" and bool(functions)  # some clients require one of no tools
    name = _convert({"tool_choice": choice}, _Choices).tool_choice.function.name
    chosen = [function for function in functions if function.name == name]
    if not chosen:
        raise RequestError(
            f"tool_choice: no tool has the name {name!r:.200}; the tools are {', '.join(map(repr, names)) or 'none'}"
        )
    return tools, chosen, True


S = TypeVar("S", bound=Struct)


def _convert(plain: dict[str, Any], kind: type[S]) -> S:
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as e:
        message = explain(e, plain, kind).replace("expected table", "expected object")
        raise RequestError(re.sub(r"expected str matching regex .*?, got", _NAMES, message)) from None


_NAMES = "expected a name of 1 to 128 letters, digits, '_', '.', ':' or '-', got"
