"""Formats of calls in which marks stand between function and arguments: DeepSeek, and Qwen's for coders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lamina.chat.feed import Feed, Marker, Steps
from lamina.chat.request import ToolFunction

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_CALLS = Marker([_BEGIN])
_NAME = Marker([_SEP, _CALL_END, _END])
_ARGUMENTS = Marker(["{", _CALL_END, _END])
_ENDS = Marker([_CALL, _CALL_END, _END])

_XML = Marker(["<tool_call>", "<function="])
_XML_ENDS = {"<tool_call>": Marker(["</tool_call>"]), "<function=": Marker(["</function>"])}
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>", re.DOTALL)


def deepseek(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read calls between the marks of all calls and of each. A call is a type, a mark, a name and arguments in a block
    of code (V3, R1), or a name, a mark and arguments (V3.1)."""
    while (yield from feed.say(_CALLS)) is not None:
        prefix = _BEGIN
        while (yield from feed.starts(_CALL)):
            yield from _one(feed, prefix + _CALL)
            prefix = ""
        if not (yield from feed.starts(_END)) and prefix:
            feed.content(prefix)


def _one(feed: Feed, prefix: str) -> Steps[None]:
    head, found = yield from feed.collect(_NAME)
    if found != _SEP:
        feed.content(prefix + head + (found or ""))
        return
    before, found = yield from feed.collect(_ARGUMENTS)
    name = before.split("\n", 1)[0].strip() if head.strip() == "function" else head.strip()
    if found != "{" or len(name.split()) != 1:
        feed.content(prefix + head + _SEP + before + (found or ""))
        return
    feed.text = "{" + feed.text
    feed.begin_call(name)
    yield from feed.json_value(feed.arguments)
    feed.end_call()
    rest, found = yield from feed.collect(_ENDS)
    if rest.strip("` \n"):
        feed.content(rest)
    if found != _CALL_END and found is not None:
        feed.text = found + feed.text


def qwen_coder(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read ``<tool_call><function=NAME><parameter=NAME>VALUE</parameter>...</function></tool_call>``. The schema says
    which values are texts and which JSON."""
    while (begin := (yield from feed.say(_XML))) is not None:
        body, end = yield from feed.collect(_XML_ENDS[begin])
        found = _FUNCTION.fullmatch(body if begin == "<tool_call>" else begin + body)
        arguments = _arguments(found[1], found[2], functions) if found is not None and end is not None else None
        if found is None or arguments is None:
            feed.content(begin + body + (end or ""))
        else:
            feed.call(found[1], json.dumps(arguments, ensure_ascii=False))


def _arguments(name: str, text: str, functions: Sequence[ToolFunction]) -> dict[str, Any] | None:
    """Return the arguments in a text, or None if there is something else in it."""
    schema = next((function.parameters for function in functions if function.name == name), {})
    properties = schema.get("properties")
    arguments: dict[str, Any] = {}
    at = 0
    while found := _PARAMETER.match(text, at):
        key, value, at = found[1], found[2], found.end()
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = _value(value, properties.get(key) if isinstance(properties, dict) else None)
    return None if text[at:].strip() else arguments


def _value(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (kind is None and not isinstance(schema, dict)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
