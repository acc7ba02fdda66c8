"""What a program asks for becomes a request, or an error that says what is wrong with it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, TypeVar

import msgspec

from lamina.errors import RequestError
from lamina.validation import explain, meant
from lamina.wire.requests import Constraint, Request, Sampling

S = TypeVar("S", bound=msgspec.Struct)


class IdArray(Protocol):
    """A one-dimensional array of integers, such as those of NumPy and torch."""

    def tolist(self) -> Any:
        """Return the integers as a list."""


Prompt: TypeAlias = str | Sequence[int] | IdArray
"""Text, or token ids, which go to the model as they are."""


class Settings(TypedDict, total=False):
    """Lists the settings of a request, all of which may be left out."""

    max_tokens: int | None
    """The most tokens of the answer. None, the default, is as many as the context has room for."""
    temperature: float
    """0, the default, is greedy."""
    top_k: int
    """Only the k likeliest tokens; 0, the default, is all."""
    top_p: float
    """Only the likeliest tokens that together have this probability, by default 1."""
    seed: int | None
    """With a seed, the same request gets the same tokens. None, the default, is a random one."""
    priority: int
    """The waiting request with the highest priority, of -100 to 100, is admitted next. The default is 0."""
    share_prefix: bool
    """Whether the request may use keys and values that the cluster still holds of another prompt with the same
    beginning, as by default."""
    salt: str
    """Only requests with the same salt, of at most 256 characters, share anything. The default is empty."""
    parse_special: bool
    """Whether the text of a special token in the prompt, such as ``</s>``, becomes that token. By default, text is
    text: much of it comes from others, who could end a turn or begin one in another role. A program that builds a
    prompt of trusted text can set this, or give the ids of special tokens."""
    constraint: Constraint | None
    """What the answer has to be, such as ``OneOf(["yes", "no"])``; see docs/constraints.md."""


def request_for(prompt: Prompt, settings: Settings) -> Request:
    """Return the request. RequestError says which setting or part of the prompt is wrong, and what is expected."""
    known = list(Settings.__annotations__)
    for name in settings:
        if name not in known:
            likely = meant(name, known)
            hint = f"did you mean {likely!r}?" if likely else f"expected some of {', '.join(known)}"
            raise RequestError(f"unknown setting {name!r}; {hint}")
    values = {name: _plain_number(value) for name, value in settings.items()}
    sampling = _convert({name: values.pop(name) for name in Sampling.__struct_fields__ if name in values}, Sampling)
    if isinstance(salt := values.get("salt"), str):
        _require_characters("salt", salt)
    return _convert({"prompt": _plain_prompt(prompt), "sampling": sampling, **values}, Request)


def _plain_prompt(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, str):
        return _require_characters("prompt", prompt)
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError("prompt: expected text or token ids, got bytes; text in UTF-8 needs a decode() first")
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(ids, Sequence):
        raise RequestError(f"prompt: expected text or a sequence of token ids, got {_name(prompt)}")
    if all(type(token) is int for token in ids):
        return list(ids)
    return [_plain_id(token, position) for position, token in enumerate(ids)]


def _plain_id(token: object, position: int) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)  # type: ignore[arg-type] # whether it is one is the question
    except TypeError:
        pass
    raise RequestError(f"prompt[{position}]: expected a token id, got {token!r:.200}")


def _require_characters(name: str, text: str) -> str:
    """Return the text; raise RequestError if it cannot be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"{name}: {text[e.start]!a} at position {e.start} is half of a surrogate pair and no character; decode the "
            'text with its right encoding, or with errors="replace"'
        ) from None
    return text


def _plain_number(value: Any) -> Any:
    """Return a number of NumPy or torch as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _convert(plain: dict[str, Any], kind: type[S]) -> S:
    """Return the values as a struct. A RequestError names the one that does not fit."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as e:
        raise RequestError(explain(e, plain)) from e


def _name(value: object) -> str:
    return "None" if value is None else type(value).__name__
