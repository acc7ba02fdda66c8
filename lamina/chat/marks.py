"""Texts of users cannot spell special tokens: they are marked before a template puts them into a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jinja2 import nodes

from lamina.errors import RequestError
from lamina.model.tokenizer import MARK, Tokenizer, spelling


class Marks:
    """Puts `MARK` into texts so that, in whatever order a template joins them with its own text, no special token is
    spelled but where the template alone spells it.

    Three places need it: inside the spelling of a token; at the end of a text, if it may be the beginning of one; and
    at the beginning of a text that completes what the template itself has begun, as in ``<{{ key }}>``. All other texts
    stay as they are, so that a template can compare them.
    """

    def __init__(self, tokenizer: Tokenizer, template: nodes.Template) -> None:
        self._spelling = tokenizer.special_spelling
        self._tokens = tokenizer.special_tokens
        # A template may divide a text at such a token, as at </think>, and go on with a part.
        self._other = spelling(tokenizer.added_tokens.keys() - tokenizer.special_tokens)
        self._beginnings = {token[:n] for token in self._tokens for n in range(1, len(token))}
        self._longest = max(map(len, self._tokens), default=0)
        self._begun = {
            text[-n:] for text in _texts(template) for n in range(1, self._longest) if text[-n:] in self._beginnings
        }

    def marked(self, value: Any) -> Any:
        """Return a JSON value with marks in all its texts, also in the keys of objects.

        Raises RequestError for a text that has a mark already, or a special token of one character.
        """
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self._text(key): self.marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.marked(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        if MARK in text:
            raise RequestError("a text has the noncharacter U+FDD0, which Unicode keeps out of text; leave it out")
        if not text or not self._tokens:
            return text
        parts, start = [], 0
        for other in self._other.finditer(text):
            parts += [self._part(text[start : other.start()]), other[0]]
            start = other.end()
        return "".join([*parts, self._part(text[start:])])

    def _part(self, text: str) -> str:
        while self._spelling.search(text):  # spellings may overlap
            text = self._spelling.sub(_broken, text)
        end = len(text.rstrip())
        if any(text[max(end - n, 0) : end] in self._beginnings for n in range(1, self._longest)):
            text = text[:end] + MARK + text[end:]
        start = len(text) - len(text.lstrip())
        if any(self._completes(begun, text[at:]) for begun in self._begun for at in {0, start}):
            text = text[:start] + MARK + text[start:]
        return text

    def _completes(self, begun: str, text: str) -> bool:
        """Return whether a text goes on with a token that the template has begun, to its end or further."""
        text = begun + text[: self._longest]
        return text != begun and (text in self._beginnings or any(map(text.startswith, self._tokens)))


def _broken(spelled: re.Match[str]) -> str:
    token = spelled[0]
    if len(token) == 1:
        raise RequestError(f"a text has {token!r}, which is a special token of this model; leave it out")
    return token[0] + MARK + token[1:]


def _texts(template: nodes.Template) -> Iterable[str]:
    """Return the constant texts of a template, at the end of each of which it may put a user's."""
    yield from (data.data for data in template.find_all(nodes.TemplateData))
    yield from (constant.value for constant in template.find_all(nodes.Const) if isinstance(constant.value, str))
