"""What a client asks for in JSON becomes requests to the front, or an error that names the parameter.

Unknown keys are errors, as a parameter that is ignored in silence is worse than one that is refused. ``null`` is the
same as absence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from lamina.errors import HttpError
from lamina.validation import explain, meant
from lamina.wire.codec import Count, Positive
from lamina.wire.requests import (
    Constraint,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Request,
    Sampling,
    Stop,
    Top,
)

MAX_ANSWERS = 1024
"""The most answers of one HTTP request: prompts times ``n``."""

Text = Annotated[str, Meta(max_length=1 << 24)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``stream_options``."""

    include_usage: bool = False
    """Whether the last chunk tells the usage."""
    continuous_usage_stats: bool = False
    """Whether every chunk tells the usage so far."""


class JsonSchemaFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """``response_format.json_schema``."""

    schema: dict[str, Any] = {}
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    """``structured_outputs``: what the answer has to be; one of these."""

    json: dict[str, Any] | str | None = None
    """A JSON schema, as an object or as text."""
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In the Lark dialect."""


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters that both ways to generate have."""

    model: str | None = None
    """One of the names in /v1/models."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Choices = 1
    """Answers for each prompt."""
    max_tokens: Count | None = None
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    """0 is greedy. The default is what the checkpoint recommends, else 1."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 40)] | None = None
    """0 and -1: all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed gives the same answer. Answer j of ``n`` has the seed ``seed + j``."""
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] = {}
    """By token id."""
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=1024)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: Annotated[list[Stop], Meta(max_length=256)] = []
    skip_special_tokens: bool = True
    """Whether the text of the answer leaves out special tokens."""
    prompt_logprobs: Top | None = None
    return_token_ids: bool = False
    add_special_tokens: bool | None = None
    """Whether the prompt gets the special tokens of the tokenizer, such as the one of its beginning."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """The request with the highest priority goes first."""
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    """Only requests with the same salt share keys and values."""
    salt: Annotated[str, Meta(max_length=256)] | None = None
    """Another name of ``cache_salt``."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """Accepted, and without effect, like the next ones."""
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": (),
    "function_call": (),
    "verbosity": ("medium",),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "logits_processors": (),
    "return_tokens_as_token_ids": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "mm_processor_kwargs": (),
    "chat_template": (),
    "prompt_cache_retention": (),
    "moderation": (),
}
"""Parameters that others know and this server does not, each with the values that change nothing."""

_INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "best_of": "use n",
    "guided_json": 'use structured_outputs: {"json": ...}',
    "guided_regex": 'use structured_outputs: {"regex": ...}',
    "guided_choice": 'use structured_outputs: {"choice": ...}',
    "guided_grammar": 'use structured_outputs: {"grammar": ...}',
    "allowed_token_ids": "use structured_outputs",
    "store": "nothing is stored here",
}

_NESTED = ("stream_options", "response_format", "structured_outputs")

B = TypeVar("B", bound=Struct)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`$")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,10}")


def parse(plain: dict[str, Any], kind: type[B], beside: Sequence[str] = ()) -> B:
    """Return the parameters. HttpError names every unknown one, or the first that does not fit.

    ``beside`` are parameters that are read elsewhere, and that a misspelt one may be meant to be.
    """
    known = kind.__struct_encode_fields__
    plain = {name: _without_nulls(value) if name in _NESTED else value for name, value in plain.items()}
    for name, harmless in UNSUPPORTED.items():
        if name in plain and name not in known:
            value = plain.pop(name)
            if not any(value == other and type(value) is type(other) for other in harmless):
                hint = f"; {_INSTEAD[name]}" if name in _INSTEAD else "; leave it out"
                raise HttpError(f"{name} is not supported{hint}", param=name)
    if unknown := [name for name in plain if name not in known]:
        raise HttpError(
            "; ".join(_about_unknown(name, [*known, *beside]) for name in unknown[:10]), param=unknown[0][:100]
        )
    return convert(plain, kind)


def convert(plain: dict[str, Any], kind: type[B]) -> B:
    """Return known parameters. HttpError names the first that does not fit."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as e:
        place = _PLACE.search(str(e)) or _MISSING.search(str(e))
        param = place[1].partition("[...]")[0] if place else None
        try:
            message = explain(e, plain, kind)
        except (KeyError, IndexError, TypeError):
            message = str(e).replace("`", "")
        raise HttpError(message.replace("expected table", "expected object"), param=param) from None


def _without_nulls(value: Any) -> Any:
    """Return an object without the keys whose value is null, also of the objects that it holds directly."""
    if not isinstance(value, dict):
        return value
    kept = {name: inner for name, inner in value.items() if inner is not None}
    return kept | {
        name: {n: v for n, v in inner.items() if v is not None}
        for name, inner in kept.items()
        if name == "json_schema" and isinstance(inner, dict)
    }


def _about_unknown(name: str, known: Iterable[str]) -> str:
    likely = meant(name[:100], list(known))
    return f"unknown parameter {name!r:.100}" + (f", did you mean {likely!r}?" if likely else "")


def sampling_of(body: Body, recommended: Mapping[str, float | int]) -> Sampling:
    """Return how tokens are chosen. What the request leaves open is as the checkpoint recommends."""

    def chosen(name: str, otherwise: Any) -> Any:
        given = getattr(body, name)
        return recommended.get(name, otherwise) if given is None else given

    bias: dict[int, float] = {}
    for token, value in body.logit_bias.items():
        if not _TOKEN_ID.fullmatch(token):  # two spellings of one id would be two biases
            raise HttpError(f"logit_bias: expected token ids as keys, got {token!r:.100}", param="logit_bias")
        bias[int(token)] = value
    return Sampling(
        temperature=float(chosen("temperature", 1.0)),
        top_k=max(0, int(chosen("top_k", 0))),
        top_p=float(chosen("top_p", 1.0)),
        min_p=float(chosen("min_p", 0.0)),
        repetition_penalty=float(chosen("repetition_penalty", 1.0)),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
    )


def with_seed(request: Request, seed: int | None, answer: int) -> Request:
    """Return the request for answer number ``answer`` of the same prompt."""
    if seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + answer) % 2**63))


def request_of(
    body: Body,
    prompt: list[int],
    recommended: Mapping[str, float | int],
    *,
    max_tokens: Positive | None,
    logprobs: Top | None,
    prompt_logprobs: Top | None,
    constraint: Constraint | None,
    show_special: bool,
) -> Request:
    """Return the request for one prompt."""
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise HttpError(
            f"min_tokens: expected at most max_tokens, {max_tokens}, got {body.min_tokens}", param="min_tokens"
        )
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    return Request(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling_of(body, recommended),
        priority=body.priority,
        salt=salt_of(body),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=stops,
        stop_token_ids=body.stop_token_ids,
        include_stop=body.include_stop_str_in_output,
        bad_words=list(body.bad_words),
        show_special=show_special,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
    )


def salt_of(body: Body) -> str:
    """Return the salt, which has two names."""
    if body.salt is not None and body.cache_salt is not None and body.salt != body.cache_salt:
        raise HttpError("salt and cache_salt mean the same, but differ; give one of them", param="salt")
    return body.cache_salt or body.salt or ""


def constraint_of(body: Body) -> Constraint | None:
    """Return what the answer has to be, by ``response_format`` or ``structured_outputs``."""
    form, outputs = body.response_format, body.structured_outputs
    constraint: Constraint | None = None
    if form is not None and form.type == "json_object":
        constraint = JsonObject()
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise HttpError("response_format.json_schema: missing", param="response_format.json_schema")
        constraint = _schema(form.json_schema.schema, "response_format")
    elif form is not None and form.json_schema is not None:
        raise HttpError(
            f'response_format.json_schema: only with type "json_schema", got {form.type!r}', param="response_format"
        )
    if outputs is None:
        return constraint
    given: list[Constraint] = []
    at = "structured_outputs"
    if outputs.json is not None:
        given.append(_schema(outputs.json, at))
    if outputs.json_object:
        given.append(JsonObject())
    kinds: tuple[tuple[str, Any], ...] = (("regex", Regex), ("choice", OneOf), ("grammar", Grammar))
    for name, kind in kinds:
        value = getattr(outputs, name)
        if value is not None:
            plain = {kind.__struct_fields__[0]: value, "type": kind.__name__}
            try:
                given.append(msgspec.convert(plain, kind))
            except msgspec.ValidationError as e:
                reason = explain(e, plain).removeprefix(kind.__struct_fields__[0]).removeprefix(": ")
                colon = "" if reason.startswith("[") else ": "  # it begins with an index
                raise HttpError(f"{at}.{name}{colon}{reason}", param=f"{at}.{name}") from None
    if len(given) != 1 or constraint is not None:
        raise HttpError(
            "structured_outputs: expected exactly one of json, json_object, regex, choice and grammar, and no "
            "response_format beside it",
            param=at,
        )
    return given[0]


def _schema(schema: dict[str, Any] | str, param: str) -> JsonSchema:
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    if len(text) > 1 << 18:
        raise HttpError(f"{param}: the schema has {len(text)} characters; at most {1 << 18} are allowed", param=param)
    return JsonSchema(text)
