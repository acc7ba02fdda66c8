"""What an answer consists of, in the order in which the model says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next part of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next part of what the model thinks before."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The model calls a tool. Calls are numbered from 0, and one ends before the next begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments, which are JSON text as the model writes it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments of a call are complete, or the answer ended within them."""

    index: int


ChatEvent: TypeAlias = ContentDelta | ReasoningDelta | CallBegin | CallArguments | CallEnd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call, or one as far as it has come."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model has written it."""


class ChatAnswer:
    """A whole answer, or one as far as it has come."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallBegin, list[str]]] = []

    @property
    def content(self) -> str:
        """Return what the model says."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """Return what it has thought before."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[ToolCall]:
        """Return the tools that it calls."""
        return [ToolCall(call.id, call.name, "".join(arguments)) for call, arguments in self._calls]

    def take(self, events: Iterable[ChatEvent]) -> ChatAnswer:
        """Add what comes next, and return this answer."""
        for event in events:
            match event:
                case ContentDelta(text):
                    self._content.append(text)
                case ReasoningDelta(text):
                    self._reasoning.append(text)
                case CallBegin():
                    self._calls.append((event, []))
                case CallArguments(index, text):
                    self._calls[index][1].append(text)
        return self
