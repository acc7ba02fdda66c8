"""Word all messages about values that do not fit a schema alike: the place, what was expected, what was found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from msgspec import Struct

from lamina.errors import ConfigError

Value = TypeVar("Value")

_STEP = re.compile(r"(\w+)|\[(\d+)\]")


def explain(error: Exception, value: Any, schema: Any = None) -> str:
    """Reword what a validation error of msgspec says about ``value``: ``node[1].memory: expected str, got 3``.

    With ``schema``, the type that ``value`` does not fit, the message also lists the choices where there are some.
    """
    message, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    message = message.replace("`", "")
    where = f"{place}: " if place else ""
    if match := re.fullmatch(r"Object contains unknown field (.+)", message, re.DOTALL):
        return f"{where}{unknown_key(match[1], _keys_at(schema, value, place))}"
    if match := re.fullmatch(r"Object missing required field (.+)", message):
        choices = _choices_at(schema, f"{place}.{match[1]}")
        expected = f"; expected one of {', '.join(choices)}" if choices else ""
        return f"{where}missing key {match[1]!r}{expected}"
    found = _value_at(value, place)
    if choices := _choices_at(schema, place):
        return f"{where}expected one of {', '.join(choices)}; got {found!r:.200}"
    message = re.sub(r", got \w+$", "", message[0].lower() + message[1:])
    message = message.replace(" | null", "").replace("expected object", "expected table")  # TOML has no null
    return f"{where}{message}, got {found!r:.200}"


def unknown_key(key: str, known: Collection[str]) -> str:
    """Say that ``key`` is unknown, and which of the known ones may be meant: the one like it, or any."""
    if likely := meant(key, known):
        return f"unknown key {key!r:.200}; did you mean {likely!r}?"
    return f"unknown key {key!r:.200}" + (f"; known: {', '.join(known)}" if known else "")


def meant(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a misspelt one is like, or None if it is like none."""
    near = difflib.get_close_matches(name, known)
    # Of names that are equally like it, the one with the same letters in another order is meant.
    return next((other for other in near if sorted(other) == sorted(name)), near[0] if near else None)


def _keys_at(schema: Any, value: Any, place: str) -> list[str]:
    """Return the keys of the table at ``place``; of several kinds of table, those of the kind that its tag names."""
    tables = [kind for kind in _kinds_at(schema, place) if isinstance(kind, type) and issubclass(kind, Struct)]
    found = _value_at(value, place)
    chosen = [kind for kind in tables if found.get(kind.__struct_config__.tag_field) == kind.__struct_config__.tag]
    return [name for kind in chosen or tables for name in kind.__struct_encode_fields__]


def _value_at(value: Any, place: str) -> Any:
    for name, index in _STEP.findall(place):
        value = value[name] if name else value[int(index)]
    return value


def _choices_at(schema: Any, place: str) -> tuple[str, ...]:
    """Return the values of the ``Literal`` types at ``place``, also within unions; none if there is no such type."""
    kinds = _kinds_at(schema, place)
    return tuple(choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))


def _kinds_at(schema: Any, place: str) -> list[Any]:
    """Return the types that a value at ``place`` may have; none if ``schema`` is None."""
    kinds = _members(schema)
    for name, _ in _STEP.findall(place):
        inner = [get_type_hints(k).get(name) if name else get_args(k)[0] for k in kinds if _has_inner(k, name)]
        kinds = [member for kind in inner for member in _members(kind)]
    return kinds


def _has_inner(kind: Any, name: str) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct) if name else get_origin(kind) is list


def _members(kind: Any) -> list[Any]:
    """Return the types that ``kind`` may be: a union, a class variable or another type."""
    if get_origin(kind) in (Union, UnionType, ClassVar):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def parse_option(key: str, parse: Callable[[str], Value], text: str) -> Value:
    """Read the text of an option. A ConfigError names the option."""
    try:
        return parse(text)
    except ConfigError as e:
        raise ConfigError(f"{option_name(key)}: {e}") from e


def option_name(key: str) -> str:
    """Return how the command line spells the option for a key."""
    return f"--{key.replace('_', '-')}"
