"""Chats with one checkpoint: requests become prompts, and texts become answers."""

from __future__ import annotations

import hashlib
from typing import Any

from lamina.chat.formats import reasoning_format, tool_format
from lamina.chat.grammar import Grammars
from lamina.chat.reader import LETTERS, AnswerReader, answer_reader
from lamina.chat.request import ChatRequest, Message
from lamina.chat.template import ChatPrompt, ChatTemplate
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import ChatForm, Constraint

_PROBE = "lamina-probe"


class Chat:
    """Knows how a checkpoint chats. Any thread may call it, and `prompt` belongs into one.

    ``tools`` and ``reasoning`` name formats of `lamina.chat.formats`; None: those that the template shows. Raises
    ConfigError for unknown ones.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, tools: str | None = None, reasoning: str | None = None
    ) -> None:
        self._template = template
        source = "\n".join(template.sources.values())
        self.tools = tool_format(tools, source, tokenizer)
        self.reasoning = reasoning_format(reasoning, source, tokenizer)
        self._grammars = Grammars(tokenizer, self.tools, self.reasoning)
        self._knows_developer = "developer" in source
        self._takes_parts = self._accepts([{"type": "text", "text": _PROBE}])
        self._takes_text = self._accepts(_PROBE) or not self._takes_parts
        special = tokenizer.special_tokens.keys()
        shown = {*self.tools.marks, self.reasoning.begin, self.reasoning.end} & special
        self.show_special = bool(shown)
        """Whether requests have to ask for the text of special tokens, as some mark calls or reasoning."""
        self._hidden = special - shown if shown else frozenset()

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        tools: str | None = None,
        reasoning: str | None = None,
    ) -> Chat:
        """Return that of a checkpoint, with its own template or another. CheckpointError if that cannot be read."""
        source = template or tokenizer.chat_template
        return cls(tokenizer, ChatTemplate(tokenizer, source, tokenizer.named_tokens), tools=tools, reasoning=reasoning)

    def prompt(self, request: ChatRequest) -> ChatPrompt:
        """Return the prompt for a request. RequestError if the template refuses it."""
        return self._template.render(
            [self._adapted(message) for message in request.messages],
            request.tools or None,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=request.variables,
        )

    def constraint(self, request: ChatRequest, prompt: ChatPrompt, answer: Constraint | None) -> Constraint | None:
        """Return what the model's whole answer has to be, if ``answer`` was asked of its content; None if anything."""
        return self._grammars.constraint(
            request, answer, opened=self._opens_reasoning(prompt), closed=self._ends_reasoning(request, prompt)
        )

    def form(self, request: ChatRequest, prompt: ChatPrompt, *, hide_special: bool = True) -> ChatForm:
        """Return how the answer to a prompt is read. ``hide_special``: special tokens are no part of the content."""
        return ChatForm(
            tools=self.tools.name,
            reasoning=self.reasoning.name,
            opened=self._opens_reasoning(prompt),
            closed=self._ends_reasoning(request, prompt),
            hidden=sorted(self._hidden) if hide_special else [],
        )

    def reader(self, request: ChatRequest, prompt: ChatPrompt) -> AnswerReader:
        """Return what reads the answer to a prompt."""
        return answer_reader(self.form(request, prompt), request)

    def _opens_reasoning(self, prompt: ChatPrompt) -> bool:
        begin = self.reasoning.begin
        return bool(begin) and prompt.text.rstrip().endswith(begin)

    def _ends_reasoning(self, request: ChatRequest, prompt: ChatPrompt) -> bool:
        end = self.reasoning.end
        return bool(end) and (request.continue_final_message or prompt.text.rstrip().endswith(end))

    # -- what templates differ in

    def _accepts(self, content: Any) -> bool:
        """Return whether the template writes this content as its text alone."""
        try:
            text = self._template.text([{"role": "user", "content": content}])
        except RequestError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    def _adapted(self, message: Message) -> Message:
        adapted = dict(message)
        if message["role"] == "developer" and not self._knows_developer:
            adapted["role"] = "system"
        content = message.get("content")
        if isinstance(content, list) and not self._takes_parts:
            adapted["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and not self._takes_text:
            adapted["content"] = [{"type": "text", "text": content}]
        if self.tools.short_ids:
            if "tool_call_id" in message:
                adapted["tool_call_id"] = _shortened(message["tool_call_id"])
            if "tool_calls" in message:
                adapted["tool_calls"] = [
                    {**call, "id": _shortened(call.get("id", ""))} for call in message["tool_calls"]
                ]
        return adapted


def _shortened(id_: str) -> str:
    """Return an id of 9 letters and digits, the same for the same id."""
    if len(id_) == 9 and id_.isascii() and id_.isalnum():
        return id_
    number = int.from_bytes(hashlib.sha256(id_.encode()).digest())
    return "".join(LETTERS[number // len(LETTERS) ** n % len(LETTERS)] for n in range(9))
