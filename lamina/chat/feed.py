"""Reads text that comes in pieces, as if it were there as a whole.

A reader is a generator. It calls the methods of its `Feed`, with ``yield from`` where they may have to wait for more
text. What it does depends only on the text so far and its end, never on where the pieces end. So any division of an
answer gives the same events, but for where their texts are divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeAlias, TypeVar

from lamina.chat.events import CallArguments, CallBegin, CallEnd, ChatEvent, ContentDelta, ReasoningDelta
from lamina.model.tokenizer import spelling

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Yields where it needs more text, and returns T."""

_STRUCTURE = re.compile(r'["{}\[\]<]')
_STRING_END = re.compile(r'["\\]')


class Marker:
    """Finds any of a few spellings in text. None of them is at the beginning of another, or within it."""

    def __init__(self, spellings: Collection[str]) -> None:
        self.spellings = frozenset(spellings)
        self.pattern = spelling(self.spellings)
        self._beginnings = {text[:n] for text in self.spellings for n in range(1, len(text))}
        self._longest = max(map(len, self.spellings), default=1)

    def held(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a spelling."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0


NOTHING = Marker(())


class Feed:
    """Holds the text that has come and not been read, and the events that were made of the rest."""

    def __init__(self, new_id: Callable[[], str], *, hidden: Collection[str] = (), single: bool = False) -> None:
        """``hidden`` spellings are left out of what the model says. With ``single``, it ends after its first call."""
        self.text = ""
        self.closed = False
        """Whether no more text will come."""
        self.over = False
        """Whether nothing that comes will be part of the answer."""
        self.events: list[ChatEvent] = []
        self.calls = 0
        self._new_id = new_id
        self._hidden = frozenset(hidden)
        self._with_hidden: dict[Marker, Marker] = {}
        self._single = single
        self._space = ""
        """White space that is left out if a call or the end of the reasoning follows."""

    # -- reading

    def until(self, marker: Marker, emit: Callable[[str], None]) -> Steps[str | None]:
        """Give text to ``emit`` as it comes, up to a marker, which is taken and returned; None at the end."""
        while True:
            if found := marker.pattern.search(self.text):
                emit(self.text[: found.start()])
                self.text = self.text[found.end() :]
                return found[0]
            held = 0 if self.closed else marker.held(self.text)
            if ready := self.text[: len(self.text) - held]:
                self.text = self.text[len(ready) :]
                emit(ready)
            if self.closed:
                return None
            yield

    def collect(self, marker: Marker) -> Steps[tuple[str, str | None]]:
        """Return the text up to a marker, which is taken, and the marker; None at the end."""
        parts: list[str] = []
        found = yield from self.until(marker, parts.append)
        return "".join(parts), found

    def skip(self, characters: str) -> Steps[None]:
        """Take all of these characters that come next."""
        while True:
            self.text = self.text.lstrip(characters)
            if self.text or self.closed:
                return
            yield

    def starts(self, spelled: str) -> Steps[bool]:
        """Return whether a spelling comes next, behind white space, and take both if it does."""
        while True:
            text = self.text.lstrip()
            if text.startswith(spelled):
                self.text = text[len(spelled) :]
                return True
            if self.closed or not spelled.startswith(text):
                return False
            yield

    def json_value(self, emit: Callable[[str], None], depth: int = 0) -> Steps[None]:
        """Give an object or array to ``emit`` as it comes, as far as its brackets say; or the rest of one in which so
        many brackets are open. What is no JSON ends at the first ``<`` that is not in a string."""
        in_string = False
        while True:
            at = 0
            while found := (_STRING_END if in_string else _STRUCTURE).search(self.text, at):
                sign, at = found[0], found.end()
                if sign == "\\":
                    if at == len(self.text):
                        at -= 1
                        break
                    at += 1
                elif sign == '"':
                    in_string = not in_string
                elif sign == "<":
                    self._emit_to(at - 1, emit)
                    return
                else:
                    depth += 1 if sign in "{[" else -1
                    if depth <= 0:
                        self._emit_to(at, emit)
                        return
            else:
                at = len(self.text)
            self._emit_to(len(self.text) if self.closed else at, emit)
            if self.closed:
                return
            yield

    def _emit_to(self, end: int, emit: Callable[[str], None]) -> None:
        if end:
            emit(self.text[:end])
            self.text = self.text[end:]

    def say(self, marker: Marker = NOTHING) -> Steps[str | None]:
        """Take the text up to a marker as what the model says; return the marker, or None at the end."""
        if marker not in self._with_hidden:
            self._with_hidden[marker] = Marker(marker.spellings | self._hidden)
        while True:
            found = yield from self.until(self._with_hidden[marker], self.content)
            if found is None or found in marker.spellings:
                return found

    # -- events

    def _add(self, event: ChatEvent) -> None:
        if not self.over:
            self.events.append(event)

    def content(self, text: str) -> None:
        """The model says ``text``. White space at its end is held back until it says more."""
        stripped = text.rstrip()
        if not stripped:
            self._space += text
            return
        self._add(ContentDelta(self._space + text[: len(stripped)]))
        self._space = text[len(stripped) :]

    def reasoning(self, text: str) -> None:
        """The model thinks ``text``. Line breaks at its end are held back until it thinks more."""
        stripped = text.rstrip("\n")
        if not stripped:
            self._space += text
            return
        self._add(ReasoningDelta(self._space + text[: len(stripped)]))
        self._space = text[len(stripped) :]

    def end_reasoning(self) -> None:
        """Leave out what has been held back."""
        self._space = ""

    def begin_call(self, name: str) -> None:
        """The model calls a function."""
        self._space = ""
        self._add(CallBegin(self.calls, self._new_id(), name))

    def arguments(self, text: str) -> None:
        """The arguments of the call go on."""
        if text:
            self._add(CallArguments(self.calls, text))

    def end_call(self) -> None:
        """The call is complete."""
        self._add(CallEnd(self.calls))
        self.calls += 1
        self.over = self.over or self._single

    def call(self, name: str, arguments: str) -> None:
        """The model has called a function, of which all is known."""
        self.begin_call(name)
        self.arguments(arguments)
        self.end_call()

    def finish(self, *, reasoning: bool = False) -> None:
        """Give out what has been held back, unless it only followed the calls."""
        if self._space and (reasoning or not self.calls):
            self._add(ReasoningDelta(self._space) if reasoning else ContentDelta(self._space))
        self._space = ""
