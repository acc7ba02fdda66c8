"""The format of gpt-oss: each message of an answer has a channel, and a recipient if it is a call."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lamina.chat.feed import Feed, Marker, Steps
from lamina.chat.request import ToolFunction

_HEAD = Marker(["<|channel|>", "<|start|>"])
_MESSAGE = Marker(["<|message|>", "<|end|>", "<|return|>", "<|call|>"])
_END = Marker(["<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"])
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")

SPELLINGS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


def harmony(feed: Feed, functions: Sequence[ToolFunction]) -> Steps[None]:
    """Read messages ``<|channel|>CHANNEL to=functions.NAME<|message|>TEXT<|end|>``. What comes in the channel
    "analysis" is reasoning, what has a recipient is a call, and all else is content, as is text outside of messages."""
    # The prompt ends with the beginning of a message, whose recipient may come before its channel.
    found = "to=" if (yield from feed.starts("to=")) else (yield from feed.say(_HEAD))
    while found is not None:
        head, end = yield from feed.collect(_MESSAGE)
        head = found + head
        if end != "<|message|>":
            if _CHANNEL.search(head) or head.removeprefix("<|start|>").strip() != "assistant":
                feed.content(head + (end or ""))
            found = yield from feed.say(_HEAD)
            continue
        channel, recipient = _CHANNEL.search(head), _RECIPIENT.search(head)
        if recipient is not None:
            feed.begin_call(recipient[1])
            found = yield from feed.until(_END, feed.arguments)
            feed.end_call()
        elif channel is not None and channel[1] == "analysis":
            found = yield from feed.until(_END, feed.reasoning)
            if found is None:
                feed.finish(reasoning=True)
            feed.end_reasoning()
        else:
            found = yield from feed.until(_END, feed.content)
        if found is not None and found not in _HEAD.spellings:
            found = yield from feed.say(_HEAD)
