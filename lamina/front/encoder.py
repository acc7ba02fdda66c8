"""What clients send as text becomes tokens: prompts, conversations, and words that answers do not have."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from msgspec.structs import replace

from lamina.chat.chat import Chat
from lamina.chat.request import MAX_BYTES, read_text
from lamina.errors import RequestError
from lamina.model.tokenizer import LONG_TEXT, Tokenizer
from lamina.wire.requests import ChatForm, Request, length_of


class Encoded(NamedTuple):
    """A request of which the engine needs nothing as text."""

    request: Request
    """Its prompt is token ids. That of a conversation constrains the whole answer, with reasoning and calls."""
    form: ChatForm | None = None
    """How the answer to a conversation is to be read."""


class Encoder:
    """Encodes the requests to one checkpoint. Any thread may call `encode`, which may take long."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _chat(self) -> Chat:
        """How the checkpoint chats, which is found out when it is first asked to."""
        return Chat.of(self.tokenizer)

    def require_fit(self, request: Request, nbytes: int) -> None:
        """Raise RequestError if a prompt of so many bytes of text cannot be one."""
        if not request.chat:
            self.tokenizer.require_fit(nbytes)
            return
        self.tokenizer.require_text("chat")
        if request.parse_special:
            raise RequestError("parse_special: a chat template writes the special tokens itself; leave it out")
        if nbytes > MAX_BYTES:
            raise RequestError(f"the conversation has {nbytes} bytes as JSON, {MAX_BYTES} are allowed; shorten it")

    def takes_long(self, request: Request) -> bool:
        """Return whether others should not have to wait for a request to be encoded."""
        return request.chat or sum(map(length_of, texts_of(request))) > LONG_TEXT

    def encode(self, request: Request) -> Encoded:
        """Return the request with tokens instead of text. RequestError for texts, or a conversation, that cannot be."""
        form = None
        if request.chat:
            request, form = self._rendered(request)
        prompt, special = request.prompt, request.parse_special
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, special)
        bad_words: list[str | list[int]] = []
        for word in request.bad_words:
            bad_words += self.tokenizer.spellings(word, special) if isinstance(word, str) else [word]
        return Encoded(replace(request, prompt=prompt, bad_words=bad_words), form)

    def _rendered(self, request: Request) -> Encoded:
        if not isinstance(request.prompt, str):
            raise RequestError("chat: expected a conversation as JSON text, got token ids")
        asked, chat = read_text(request.prompt), self._chat
        prompt = chat.prompt(asked)
        rendered = replace(
            request,
            prompt=prompt.ids,
            chat=False,
            constraint=chat.constraint(asked, prompt, request.constraint),
            show_special=request.show_special or chat.show_special,
        )
        return Encoded(rendered, chat.form(asked, prompt, hide_special=not request.show_special))


def texts_of(request: Request) -> list[str]:
    """Return the texts of a request that the engine needs as tokens."""
    return [text for text in (request.prompt, *request.bad_words) if isinstance(text, str)]
