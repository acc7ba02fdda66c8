"""One wording for values that do not fit a schema: the place, what was expected, what was found."""

from __future__ import annotations

import re
from typing import Any


def explain(error: Exception, value: Any) -> str:
    """What a validation error of msgspec says about ``value``: ``node[1].memory: expected str, got 3``."""
    message, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    message = message.replace("`", "")
    where = f"{place}: " if place else ""
    if match := re.fullmatch(r"Object contains unknown field (\S+)", message):
        return f"{where}unknown key {match[1]!r}"
    if match := re.fullmatch(r"Object missing required field (\S+)", message):
        return f"{where}missing key {match[1]!r}"
    message = re.sub(r", got \w+$", "", message[0].lower() + message[1:])
    found = _value_at(value, place)
    return f"{where}{message}, got {found!r:.200}"


def _value_at(value: Any, place: str) -> Any:
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", place):
        value = value[name] if name else value[int(index)]
    return value
