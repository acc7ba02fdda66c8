"""One wording for values that do not fit a schema: the place, what was expected, what was found."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

_STEP = re.compile(r"(\w+)|\[(\d+)\]")


def explain(error: Exception, value: Any, schema: Any = None) -> str:
    """What a validation error of msgspec says about ``value``: ``node[1].memory: expected str, got 3``.

    With ``schema``, the type that ``value`` does not fit, the message also lists the choices where there are some.
    """
    message, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    message = message.replace("`", "")
    where = f"{place}: " if place else ""
    if match := re.fullmatch(r"Object contains unknown field (.+)", message, re.DOTALL):
        return f"{where}unknown key {match[1]!r:.200}"
    if match := re.fullmatch(r"Object missing required field (.+)", message):
        return f"{where}missing key {match[1]!r}"
    found = _value_at(value, place)
    if choices := _choices_at(schema, place) if schema else ():
        return f"{where}expected one of {', '.join(choices)}; got {found!r:.200}"
    message = re.sub(r", got \w+$", "", message[0].lower() + message[1:])
    return f"{where}{message}, got {found!r:.200}"


def _value_at(value: Any, place: str) -> Any:
    for name, index in _STEP.findall(place):
        value = value[name] if name else value[int(index)]
    return value


def _choices_at(schema: Any, place: str) -> tuple[str, ...]:
    """The values of the ``Literal``, optional or not, at ``place`` in structs and lists; else none."""
    for name, _ in _STEP.findall(place):
        schema = get_type_hints(schema)[name] if name else get_args(schema)[0]
    return next((get_args(kind) for kind in (schema, *get_args(schema)) if get_origin(kind) is Literal), ())
