"""Formats of calls in which function and arguments are one JSON object: Hermes and Qwen, Llama 3, Mistral."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lamina.chat.feed import Feed, Marker, Steps
from lamina.chat.request import ToolFunction

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
_COMMON_HEADS = ('{"name":"', '{"type":"function","name":"')
_CLOSED = re.compile(r"\s*\}")

_TOOL_CALL = Marker(["<tool_call>"])
_TOOL_CALL_END = Marker(["</tool_call>"])
_PYTHON_TAG = "<|python_tag|>"
_TOOL_CALLS = Marker(["[TOOL_CALLS]"])
_MISTRAL_NAME = Marker(["[ARGS]", "[CALL_ID]", "{", "[TOOL_CALLS]"])
_ARGS = Marker(["[ARGS]", "[TOOL_CALLS]"])


def hermes(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them."""
    while (yield from feed.say(_TOOL_CALL)) is not None:
        yield from _one(feed)


def _one(feed: Feed) -> Steps[None]:
    """Read a call behind its mark."""
    while True:
        head, end = _HEAD.match(feed.text), _TOOL_CALL_END.pattern.search(feed.text)
        if head is not None and (end is None or head.end() <= end.start()):
            yield from _from_head(feed, head)
            rest, _ = yield from feed.collect(_TOOL_CALL_END)
            if rest.strip():
                feed.content(rest)
            return
        if end is not None or feed.closed:
            body = feed.text if end is None else feed.text[: end.start()]
            feed.text = "" if end is None else feed.text[end.end() :]
            if end is None or not _whole(feed, body):
                feed.content("<tool_call>" + body + (end[0] if end is not None else ""))
            return
        yield


def _from_head(feed: Feed, head: re.Match[str]) -> Steps[None]:
    """Read a call of which name and the beginning of the arguments are known, to the end of its object."""
    feed.text = feed.text[head.end() :]
    feed.begin_call(_text_of(head[1]))
    yield from feed.json_value(feed.arguments)
    rest: list[str] = []
    yield from feed.json_value(rest.append, 1)
    feed.end_call()
    tail = "".join(rest)
    if tail.strip() and not _CLOSED.fullmatch(tail) and not _is_json("{" + tail.lstrip().removeprefix(",")):
        feed.content(tail)


def _whole(feed: Feed, body: str) -> bool:
    """Take a complete text as a call, whatever the order of its keys. Returns whether it is one."""
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str):
        return False
    arguments = plain.get("arguments", plain.get("parameters", {}))
    feed.call(plain["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
    return True


def _text_of(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return quoted[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def llama(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read ``{"name": ..., "parameters": {...}}``, with nothing but ``<|python_tag|>`` before, and ``;`` between."""
    tagged = yield from feed.starts(_PYTHON_TAG)
    while True:
        taken = yield from _object(feed)
        if not taken:
            break
        tagged = False
        yield from feed.skip("; \n")
    if tagged:
        feed.content(_PYTHON_TAG)
    yield from feed.say()


def _object(feed: Feed) -> Steps[bool]:
    """Read a call without marks. Returns whether there was one; if not, its text is still there."""
    while True:
        if (head := _HEAD.match(feed.text)) is not None:
            yield from _from_head(feed, head)
            return True
        start = "".join(feed.text.split())
        if feed.closed or not any(start.startswith(common) or common.startswith(start) for common in _COMMON_HEADS):
            return False
        yield


def mistral(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` repeatedly."""
    marker = yield from feed.say(_TOOL_CALLS)
    while marker is not None:
        yield from feed.skip(" \n")
        if feed.text.startswith("["):
            marker = yield from _list(feed)
        else:
            marker = yield from _named(feed)
        if marker is None:
            marker = yield from feed.say(_TOOL_CALLS)


def _list(feed: Feed) -> Steps[str | None]:
    feed.text = feed.text[1:]
    before = "[TOOL_CALLS]["
    while True:
        taken = yield from _object(feed)
        if not taken:
            break
        before = ""
        yield from feed.skip(" \n")
        if not feed.text.startswith(","):
            break
        feed.text, before = feed.text[1:], ","
    yield from feed.skip(" \n")
    if feed.text.startswith("]") and before != ",":
        feed.text = feed.text[1:]
    elif before:
        feed.content(before)
    return None


def _named(feed: Feed) -> Steps[str | None]:
    name, found = yield from feed.collect(_MISTRAL_NAME)
    if found == "[CALL_ID]":
        _, found = yield from feed.collect(_ARGS)
    if found == "{":
        feed.text = "{" + feed.text
        if not name.strip() and (yield from _object(feed)):
            return None
    if found not in ("[ARGS]", "{") or len(name.split()) != 1:
        feed.content("[TOOL_CALLS]" + name + ("[ARGS]" if found == "[ARGS]" else ""))
        return found if found == "[TOOL_CALLS]" else None
    yield from feed.skip(" \n")
    feed.begin_call(name.strip())
    yield from feed.json_value(feed.arguments)
    feed.end_call()
    return None
