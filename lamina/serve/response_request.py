"""Requests to /v1/responses become requests for chats. Nothing is stored: all state comes with the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lamina.chat.request import MAX_MESSAGES, MAX_TOOLS
from lamina.errors import RequestError
from lamina.validation import explain, unknown_key
from lamina.wire.codec import Positive


class Format(Struct, frozen=True):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``text``."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``reasoning``. The answer has the reasoning itself, whatever summary is asked for."""

    effort: Annotated[str, Meta(max_length=64)] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamingOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``stream_options``."""

    include_obfuscation: bool | None = None


class ResponseFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of /v1/responses. ``null`` is the same as absence."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    """The first message, of the system."""
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamingOptions | None = None
    store: bool | None = None
    """Accepted, as it is the default of clients; an answer says that it was not stored."""
    truncation: Literal["disabled"] | None = None
    background: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_INSTEAD = {
    "previous_response_id": "send the earlier items in input",
    "conversation": "send the earlier items in input",
    "prompt": "send its text in instructions",
    "max_tool_calls": "there are no built-in tools",
}
"""What the API has and this server has not, as it keeps no state, and what to do instead."""

_SAME = frozenset(
    (
        *("top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty", "frequency_penalty", "logit_bias"),
        *("repetition_penalty", "min_tokens", "ignore_eos", "bad_words", "priority", "cache_salt", "salt"),
        *("chat_template_kwargs", "documents"),
    )
)
"""Parameters that this server has beside the API's, with the same meaning as in a chat completion."""

_LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (_LOGPROBS, "reasoning.encrypted_content")


@dataclass(frozen=True)
class ResponseRequest:
    """A request to /v1/responses."""

    fields: ResponseFields
    chat: dict[str, Any]
    """The same as the body of a request to /v1/chat/completions."""


def read_response(body: dict[str, Any]) -> ResponseRequest:
    """Translate the body of a request. A RequestError begins with the place of what is wrong: "input[0].type: ..."."""
    body = {key: value for key, value in body.items() if value is not None}
    for name, instead in _INSTEAD.items():
        if name in body:
            raise RequestError(f"{name}: not supported, as this server keeps no state; {instead}")
    own = {key: body.pop(key) for key in _SAME & body.keys()}
    known = ResponseFields.__struct_encode_fields__
    for name in body:
        if name not in known:
            raise RequestError(f"{name[:100]}: {unknown_key(name, [*known, *_SAME])}")
    try:
        fields = msgspec.convert(body, ResponseFields)
    except msgspec.ValidationError as e:
        raise RequestError(explain(e, body, ResponseFields).replace("expected table", "expected object")) from None
    if fields.background:
        raise RequestError("background: true is not supported, as this server keeps no answers; leave it out")
    if fields.stream_options is not None and fields.stream_options.include_obfuscation:
        raise RequestError("stream_options.include_obfuscation: true is not supported; leave it out")
    if not (messages := _messages_of(fields)):
        raise RequestError("input: expected a message, a call or its output, got items without any of these")
    chat: dict[str, Any] = {
        **own,
        "messages": messages,
        "model": fields.model,
        "tools": [_tool_of(tool, f"tools[{i}]") for i, tool in enumerate(fields.tools)] if fields.tools else None,
        "tool_choice": _choice_of(fields.tool_choice),
        "parallel_tool_calls": fields.parallel_tool_calls,
        "response_format": _format_of(fields.text.format) if fields.text and fields.text.format else None,
        "verbosity": fields.text.verbosity if fields.text else None,
        "reasoning_effort": fields.reasoning.effort if fields.reasoning else None,
        "max_completion_tokens": fields.max_output_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "stream": fields.stream,
        "user": fields.user,
        "safety_identifier": fields.safety_identifier,
        "prompt_cache_key": fields.prompt_cache_key,
        "metadata": fields.metadata,
    }
    for i, include in enumerate(fields.include or ()):
        if include not in _INCLUDES:
            raise RequestError(f"include[{i}]: {include!r:.100} is not supported; known: {', '.join(_INCLUDES)}")
    if fields.top_logprobs is not None or _LOGPROBS in (fields.include or ()):
        chat |= {"logprobs": True, "top_logprobs": fields.top_logprobs or 0}
    return ResponseRequest(fields, {key: value for key, value in chat.items() if value is not None})


# -- items of the input


class _ItemPart(Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _MessageItem(Struct, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_ItemPart]


class _CallItem(Struct, frozen=True):
    call_id: str
    name: str
    arguments: str


class _OutputItem(Struct, frozen=True):
    call_id: str
    output: str | list[_ItemPart]


class _Thought(Struct, frozen=True):
    text: str


class _ReasoningItem(Struct, frozen=True):
    summary: list[_Thought] | None = None
    content: list[_Thought] | None = None


_ITEMS: dict[str, type[Struct]] = {
    "message": _MessageItem,
    "function_call": _CallItem,
    "function_call_output": _OutputItem,
    "reasoning": _ReasoningItem,
}


def _messages_of(fields: ResponseFields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if fields.instructions is not None:
        messages.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        return [*messages, {"role": "user", "content": fields.input}]
    turn: dict[str, Any] | None = None
    """The assistant's message to which items belong: one message has reasoning, content and calls."""
    for i, plain in enumerate(fields.input):
        at = f"input[{i}]"
        item = _item_of(plain, at)
        if isinstance(item, _MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _content_of(item.content, f"{at}.content")})
            turn = None
            continue
        if isinstance(item, _OutputItem):
            content = _content_of(item.output, f"{at}.output")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            turn = None
            continue
        # A message has one reasoning, then one content, then calls.
        later = {
            _ReasoningItem: {"reasoning_content", "content", "tool_calls"},
            _MessageItem: {"content", "tool_calls"},
        }
        if turn is None or later.get(type(item), set()) & turn.keys():
            turn = {"role": "assistant"}
            messages.append(turn)
        match item:
            case _MessageItem(_, text):
                turn["content"] = _content_of(text, f"{at}.content")
            case _CallItem(call_id, name, arguments):
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                turn.setdefault("tool_calls", []).append(call)
            case _ReasoningItem(summary, thoughts):
                if reasoning := "\n".join(thought.text for thought in thoughts or summary or ()):
                    turn["reasoning_content"] = reasoning
    return [message for message in messages if message.keys() != {"role"}]  # of encrypted reasoning there is nothing


def _item_of(plain: dict[str, Any], at: str) -> Struct:
    kind = plain.get("type", "message" if "role" in plain else None)
    if kind is None:
        raise RequestError(f"{at}.type: missing; an item is a message with role and content, or has a type")
    if kind not in _ITEMS:
        raise RequestError(
            f"{at}.type: items of the type {kind!r:.100} are not supported; this server takes {', '.join(_ITEMS)}"
        )
    try:
        return msgspec.convert(plain, _ITEMS[kind])
    except msgspec.ValidationError as e:
        message = explain(e, plain, _ITEMS[kind]).replace("expected table", "expected object")
        place = "." if message[:1].isalpha() and ": " in message else ": "
        raise RequestError(f"{at}{place}{message}") from None


def _content_of(content: str | list[_ItemPart], at: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("input_text", "output_text", "text", "refusal"):
            raise RequestError(
                f"{at}[{i}].type: parts of the type {part.type!r:.100} are not supported; this server takes "
                "'input_text' and 'output_text'"
            )
        if text is None:
            raise RequestError(f"{at}[{i}].text: missing; a part of the type {part.type!r} has one")
        parts.append({"type": "text", "text": text})
    return parts


# -- tools and formats


def _tool_of(tool: dict[str, Any], at: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"{at}.type: tools of the type {tool.get('type')!r:.100} are not supported; this server knows 'function'"
        )
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _choice_of(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise RequestError(
            'tool_choice: expected "none", "auto", "required" or {"type": "function", "name": ...}, '
            f"got {choice!r:.200}"
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def _format_of(form: Format) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema is None:
        raise RequestError('text.format.schema: missing; the type "json_schema" needs one')
    about = {"name": form.name, "strict": form.strict, "description": form.description}
    schema = {"schema": form.schema, **{key: value for key, value in about.items() if value is not None}}
    return {"type": "json_schema", "json_schema": schema}
