"""What a model says becomes content, reasoning and calls. Servers and clients alike read answers with this."""

from __future__ import annotations

import secrets
import string

from lamina.chat.events import ChatEvent
from lamina.chat.feed import Feed, Steps
from lamina.chat.formats import REASONING_FORMATS, TOOL_FORMATS
from lamina.chat.request import ChatRequest
from lamina.errors import ProtocolError
from lamina.wire.requests import ChatForm

LETTERS = string.ascii_letters + string.digits


def answer_reader(form: ChatForm, request: ChatRequest) -> AnswerReader:
    """Return what reads the answer to a request. ProtocolError for a format that is not known here."""
    tools, reasoning = TOOL_FORMATS.get(form.tools), REASONING_FORMATS.get(form.reasoning)
    if tools is None or reasoning is None:
        raise ProtocolError(
            f"the front has formats of calls and reasoning, {form.tools!r:.100} and {form.reasoning!r:.100}, that this "
            "version does not know; use the version of the cluster"
        )
    feed = Feed(_short_id if tools.short_ids else _long_id, hidden=form.hidden, single=not request.parallel)

    def steps() -> Steps[None]:
        if not form.closed:
            yield from reasoning.read(feed, opened=form.opened)
        if request.functions or tools.name == "harmony":
            yield from tools.read(feed, request.functions)
        else:
            yield from feed.say()
        feed.finish()

    return AnswerReader(feed, steps())


class AnswerReader:
    """Makes events of the text of one answer, piece by piece.

    Nothing of a mark ever comes out in part. What looks like a call and is none comes out as content.
    """

    def __init__(self, feed: Feed, steps: Steps[None]) -> None:
        self._feed = feed
        self._steps = steps
        next(steps)

    @property
    def over(self) -> bool:
        """Return whether the answer is complete, whatever the model still says: it was to have one call, and has it."""
        return self._feed.over

    def push(self, text: str) -> list[ChatEvent]:
        """Return what the next piece of the answer's text completes."""
        feed = self._feed
        if feed.over or not text:
            return []
        feed.text += text
        next(self._steps)
        return self._taken()

    def finish(self) -> list[ChatEvent]:
        """Return what is left, now that the text is complete."""
        if self._feed.closed:
            return []
        self._feed.closed = True
        if not self._feed.over:
            for _ in self._steps:
                raise AssertionError("a reader waits for text that will never come")
        return self._taken()

    def _taken(self) -> list[ChatEvent]:
        events, self._feed.events = self._feed.events, []
        return events


def _long_id() -> str:
    return "call_" + secrets.token_hex(12)


def _short_id() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(9))
