"""What a program asks for becomes a request, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias, TypedDict, TypeVar, get_args

import msgspec

from lamina.chat.request import ChatRequest, read_chat, read_fields
from lamina.errors import RequestError
from lamina.validation import explain, meant
from lamina.wire.requests import Constraint, JsonSchema, Request, Sampling

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
    min_tokens: int
    """The fewest tokens of the answer, by default 0: nothing stops it earlier."""
    temperature: float
    """0, the default, is greedy."""
    top_k: int
    """Only the k likeliest tokens; 0, the default, is all."""
    top_p: float
    """Only the likeliest tokens that together have this probability, by default 1."""
    min_p: float
    """Only tokens with at least this part of the probability of the likeliest one, by default 0."""
    seed: int | None
    """With a seed, the same request gets the same tokens. None, the default, is a random one."""
    repetition_penalty: float | None
    """Makes tokens of prompt and answer less likely, if it is more than 1. None, the default, is what
    generation_config.json of the checkpoint says, else 1."""
    presence_penalty: float
    """Is subtracted from the logits of the tokens of the answer so far, by default 0."""
    frequency_penalty: float
    """Is subtracted from the logit of a token as often as the answer has it so far, by default 0."""
    logit_bias: Mapping[int, float]
    """Is added to the logits of these tokens; from -100 to 100."""
    stop: str | Sequence[str]
    """The answer ends where its text has this, or one of these. Nothing of it is given out."""
    stop_token_ids: Sequence[int]
    """The answer ends with one of these tokens."""
    include_stop: bool
    """Whether the text of the answer includes what stopped it: the text of ``stop``, or that of a token, unless it is a
    special one. The default is false."""
    ignore_eos: bool
    """Whether the answer goes on behind the tokens that end sequences. The default is false."""
    bad_words: Sequence[str | Sequence[int]]
    """Texts, or their token ids, that the answer does not have. A text stands for the tokens that it has at the
    beginning of a text, and for those that it has behind a space."""
    constraint: Constraint | Mapping[str, Any] | None
    """What the answer has to be: `JsonSchema`, `JsonObject`, `Regex`, `OneOf` or `Grammar`. A dict is a JSON schema."""
    show_special: bool
    """Whether the text of the answer has special tokens, such as ``</s>``. The default is false."""
    logprobs: int | None
    """Give the `Score` of each token, with so many of the likeliest tokens, of 0 to 20. None, the default, is none."""
    prompt_logprobs: int | None
    """The same for the tokens of the prompt, which then uses no keys and values that the cluster holds."""
    priority: int
    """The waiting request with the highest priority, of -100 to 100, is admitted next. The default is 0."""
    share_prefix: bool
    """Whether the request may use keys and values that the cluster still holds of another prompt with the same
    beginning, as by default."""
    name: str
    """How logs and traces call the request, in at most 256 characters. The front logs how one with a name ends."""
    traceparent: str
    """The span of the program that the trace of the request hangs on, as in the HTTP header of this name."""
    salt: str
    """Only requests with the same salt, of at most 256 characters, share anything. The default is empty."""
    parse_special: bool
    """Whether the text of a special token in the prompt, such as ``</s>``, becomes that token. By default, text is
    text: much of it comes from others, who could end a turn or begin one in another role. A program that builds a
    prompt of trusted text can set this, or give the ids of special tokens."""
    deadline_s: float | None
    """The seconds that the whole answer may take, from the moment when it is asked for. Then the request is cancelled,
    and DeadlineError raised. None, the default, is any number."""


class ChatSettings(Settings, total=False):
    """Lists the settings of a chat: what its prompt is made of beside messages, and those of any request. Of these,
    ``parse_special`` is refused, as the chat template alone writes special tokens."""

    tools: Sequence[Mapping[str, Any]] | None
    """Functions that the model may call, each as ``{"type": "function", "function": {"name": ..., "parameters": ...}}``
    with the JSON schema of its arguments."""
    tool_choice: str | Mapping[str, Any] | None
    """"auto", the default; "required", "none", or ``{"type": "function", "function": {"name": ...}}``."""
    parallel_tool_calls: bool | None
    """Whether the answer may have several calls, as by default; else it ends after its first."""
    documents: Sequence[Mapping[str, Any]] | None
    """What the template is given to quote from."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the template, such as ``enable_thinking``."""
    reasoning_effort: str | None
    """A variable of the template, too. "none" also sets ``enable_thinking`` and ``thinking`` to false."""
    add_generation_prompt: bool | None
    """Whether the prompt ends with the beginning of an answer, as by default unless the last message is continued."""
    continue_final_message: bool | None
    """Whether the answer goes on with the last message, which is then the assistant's. The default is false."""


class Wanted(NamedTuple):
    """Holds what a program asks for."""

    request: Request
    deadline_s: float | None


class _OwnSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds the settings that concern the client alone."""

    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None


def asked_for(prompt: Prompt, settings: Settings) -> Wanted:
    """Return what is asked for. RequestError says which setting or part of the prompt is wrong, and what is
    expected."""
    _require_known(settings, Settings)
    return _wanted({"prompt": _plain_prompt(prompt)}, settings)


def asked_in_chat(messages: Sequence[Mapping[str, Any]], settings: ChatSettings) -> tuple[Wanted, ChatRequest]:
    """Return what is asked for by messages, also as the answer has to be read. RequestError says which setting, or
    which part of a message, is wrong."""
    _require_known(settings, ChatSettings)
    given: dict[str, Any] = dict(settings)
    chat = {"messages": messages, **{name: given.pop(name) for name in _OF_CHAT if name in given}}
    try:
        plain = {name: _plain_value(name, value) for name, value in chat.items()}
        asked = read_chat(read_fields(plain))
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise RequestError(f"messages: they, or the tools, cannot be written as JSON: {e}") from e
    return _wanted({"prompt": text, "chat": True}, given), asked


_OF_CHAT = [name for name in ChatSettings.__annotations__ if name not in Settings.__annotations__]


def _require_known(settings: Mapping[str, Any], kind: type[Settings]) -> None:
    known = list(kind.__annotations__)
    for name in settings:
        if name not in known:
            likely = meant(name, known)
            hint = f"did you mean {likely!r}?" if likely else f"expected some of {', '.join(known)}"
            raise RequestError(f"unknown setting {name!r}; {hint}")


def _wanted(prompt: dict[str, Any], settings: Mapping[str, Any]) -> Wanted:
    values = {name: _plain(name, value) for name, value in settings.items()}
    sampling = _convert(_take(values, Sampling), Sampling)
    own = _convert(_take(values, _OwnSettings), _OwnSettings)
    request = _convert({**prompt, "sampling": sampling, **values}, Request)
    return Wanted(request, own.deadline_s)


def _take(values: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Take the values out that are fields of a struct."""
    return {name: values.pop(name) for name in kind.__struct_fields__ if name in values}


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


def _plain(name: str, value: Any) -> Any:
    """Return the value of a setting as numbers, texts, lists and maps of Python's own."""
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "constraint":
        value = _plain_constraint(value)
    return _plain_value(name, value)


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return _require_characters(name, value)
    if hasattr(value, "tolist"):  # also a number of NumPy or torch
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain_value(name, key): _plain_value(f"{name}.{key}", one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain_value(f"{name}[{i}]", one) for i, one in enumerate(value)]
    return value


def _plain_constraint(value: Any) -> Any:
    """Return a constraint as a map; one that is a map is a JSON schema."""
    schema = value.schema if isinstance(value, JsonSchema) else value
    if isinstance(schema, Mapping):
        try:
            value = JsonSchema(json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as e:
            raise RequestError(f"constraint: this is no JSON schema, as it cannot be written as JSON: {e}") from e
    if value is not None and not isinstance(value, Constraint):
        kinds = ", ".join(kind.__name__ for kind in get_args(Constraint))
        raise RequestError(f"constraint: expected {kinds}, or a dict with a JSON schema, got {value!r:.200}")
    return msgspec.to_builtins(value)


def _convert(plain: dict[str, Any], kind: type[S]) -> S:
    """Return the values as a struct. A RequestError names the one that does not fit."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as e:
        raise RequestError(explain(e, plain)) from e


def _name(value: object) -> str:
    return "None" if value is None else type(value).__name__
