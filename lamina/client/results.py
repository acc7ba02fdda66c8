"""What a client gets: tokens, and whole answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lamina.chat.events import ToolCall
from lamina.wire.requests import Score


class Token(NamedTuple):
    """Holds one generated token. ``text`` is what the token completes, and may be empty."""

    id: int
    text: str
    score: Score | None = None
    """How likely the model found it, if ``logprobs`` was set."""


class Timings(NamedTuple):
    """Says how long an answer took, in seconds, as the cluster saw it."""

    queued_s: float = 0.0
    """From the arrival of the request to its admission."""
    prompt_s: float = 0.0
    """From there to the first token."""
    answer_s: float = 0.0
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Holds a whole answer."""

    text: str
    tokens: list[int]
    finish_reason: str
    """"stop" if something stopped it, see ``stopped_by``; "length" if it has ``max_tokens``, or fills the context."""
    prompt_tokens: int
    stopped_by: str | int | None = None
    """The text of ``stop`` that was found, or the token that ended the answer."""
    logprobs: list[Score] | None = None
    """The score of each token, if ``logprobs`` was set."""
    prompt_logprobs: list[Score] | None = None
    """The scores of the tokens of the prompt from its second one on, if ``prompt_logprobs`` was set."""
    shared_tokens: int = field(default=0, compare=False)
    """How many tokens of the prompt the cluster still had keys and values of."""
    timings: Timings = field(default=Timings(), compare=False)


@dataclass(frozen=True, kw_only=True)
class ChatCompletion(Completion):
    """Holds a whole answer to messages.

    ``text`` is what the model says, without its reasoning and calls, and ``tokens`` are those of all three.
    ``finish_reason`` is "tool_calls" if the answer came to its end and has calls.
    """

    reasoning: str = ""
    """What the model has thought before."""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """Return the answer as a message, for the messages of the next request."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message
