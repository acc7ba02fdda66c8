"""What an answer consists of, in the order in which the model says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    """The next part of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
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


ChatEvent: TypeAlias = Content | Reasoning | CallBegin | CallArguments | CallEnd


@dataclass
class ToolCall:
    """A whole call."""

    id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass
class ChatAnswer:
    """A whole answer, or one as far as it has come."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def take(self, events: Iterable[ChatEvent]) -> ChatAnswer:
        """Add what comes next, and return this answer."""
        for event in events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallBegin(_, id_, name):
                    self.calls.append(ToolCall(id_, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
        return self
