"""A JSON schema is checked here before the library compiles it: every keyword in it is enforced, or it is refused.

The library (`llguidance`) ignores keywords that it does not know, enforces some only in part, and dies of a few
schemas. What is accepted here was found by trying each keyword against `jsonschema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

from lamina.constrain.formats import FORMATS
from lamina.errors import RequestError

MAX_DEPTH = 64
"""The most levels of a schema's JSON text. The library stops at 128."""
MAX_CHAIN = 1024
"""The most levels with all references followed. The library recurses: in a stack of 8 MiB it dies beyond 512, and
`lamina.runtime.workers` gives it eight times as much."""
MAX_PROPERTIES = 2000
"""The most named properties: the library's time grows with the square of their number, 2000 take a second."""
MAX_VALUES = 10_000
"""The most values of all ``enum`` together."""
MAX_MULTIPLE = 10_000
"""The largest ``multipleOf``, and sum of all, without decimal points: the library makes a state for each remainder."""
MAX_COUNT = 1 << 31
"""The largest length or number of items."""
EXACT = 1 << 53
"""The library computes with floats: integers beyond this one become others."""
INT64_MAX = (1 << 63) - 1
"""The library knows this one, which stands for no bound in many schemas."""

_ANNOTATIONS = frozenset(
    (
        "$schema",
        "$comment",
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
    )
)
"""They say nothing about what is valid. OpenAPI's discriminator only repeats what ``oneOf`` says."""
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_SCHEMAS = frozenset(("additionalProperties", "additionalItems"))
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))

Place = tuple[str | int, ...]


def prepare_schema(text: str) -> dict[str, Any]:
    """Return a schema that means the same as ``text`` and of which the library enforces everything.

    Raises RequestError, which names a keyword and its place, for all else.
    """
    result = _Check(_parse(text)).result
    assert isinstance(result, dict)
    return result


def places_of(text: str, *keywords: str) -> list[str]:
    """Return where a schema has one of the keywords, as far as it can be told without knowing what is a schema."""
    return [_spell((*place, key)) for place, key in _keys(json.loads(text), ()) if key in keywords]


def _keys(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield place, key
        yield from _keys(part, (*place, key))


def _parse(text: str) -> Any:
    """Return the JSON value of a text, which has no key twice and no number that is none."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(found)
        if len(value) < len(found):
            twice = next(key for i, (key, _) in enumerate(found) if key in dict(found[:i]))
            raise RequestError(f"the JSON schema has the key {_short(twice)} twice in one object; name it once")
        return value

    def constant(name: str) -> NoReturn:
        raise RequestError(f"the JSON schema has {name}, which is not a number in JSON; remove it")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise RequestError(f"the JSON schema has more than {MAX_DEPTH} levels; make it flatter") from None
    except UnicodeEncodeError:
        raise RequestError("the JSON schema has half of a surrogate pair, which is no character") from None
    except ValueError as e:
        raise RequestError(f"the JSON schema is not JSON, or has a number that is too long: {e}") from None
    return value


class _Check:
    """Walks over one schema. ``result`` is what the library gets."""

    def __init__(self, schema: Any) -> None:
        self._refs: list[tuple[Place, Place]] = []
        """From where to where references lead."""
        self._heights: dict[Place, int] = {}
        """How many levels there are below each schema, without following references."""
        self._properties = self._values = self._multiples = 0
        self.result = self._schema(schema, ())
        if self.result is True:
            self.result = {}
        if self.result is False:
            _refuse((), "the schema is false, so no answer fits it")
        self._follow()

    def _follow(self) -> None:
        """Check where references lead. A path through a schema takes each reference once at most."""
        targets = {target for _, target in self._refs}
        for place, target in self._refs:
            if target not in self._heights:
                _refuse(place, f"{_spell(target)} is no schema within this one; refer to one, as '#/$defs/NAME'")
        chain = self._heights[()] + sum(self._heights[target] for target in targets)
        if chain > MAX_CHAIN:
            raise RequestError(
                f"the JSON schema may be {chain} levels deep with its references followed, the limit is {MAX_CHAIN}; "
                "use fewer definitions"
            )

    def _schema(self, schema: Any, place: Place) -> Any:
        """Return the schema at ``place`` as the library gets it."""
        if len(place) > MAX_DEPTH:
            raise RequestError(f"the JSON schema has more than {MAX_DEPTH} levels; make it flatter")
        if isinstance(schema, bool):
            self._heights[place] = 1
            return schema
        if not isinstance(schema, dict):
            _refuse(place, f"expected a schema, which is an object or a boolean, got {_short(schema)}")
        result: dict[str, Any] = {}
        below = [0]
        for key, value in schema.items():
            at = (*place, key)
            if key in _ANNOTATIONS or (key == "$id" and not place):
                continue
            if key in _MAPS:
                result[key] = {name: self._below(part, (*at, name), below) for name, part in _map(value, at).items()}
            elif key in _LISTS or (key == "items" and isinstance(value, list)):
                result[key] = [self._below(part, (*at, i), below) for i, part in enumerate(_list(value, at))]
            elif key in _SCHEMAS or key == "items":
                result[key] = self._below(value, at, below)
            elif check := _ASSERTIONS.get(key):
                if (kept := check(self, value, at)) is not None:
                    result[key] = kept
            elif key == "const":  # whose value may be null
                result[key] = self._value(value, at)
            else:
                _refuse(at, "the keyword is not supported, and no keyword is ignored; remove it")
        self._heights[place] = 1 + max(below)
        self._check_properties(schema, place)
        return self._with_format(result)

    def _below(self, schema: Any, place: Place, heights: list[int]) -> Any:
        result = self._schema(schema, place)
        heights.append(self._heights[place])
        return result

    def _check_properties(self, schema: dict[str, Any], place: Place) -> None:
        """Refuse what the library does not see: that an object may have the same additional key twice."""
        for name in schema.get("properties", ()):
            _require_writable(name, (*place, "properties"))
        for pattern in schema.get("patternProperties", ()):
            check_pattern(pattern, (*place, "patternProperties"))
        self._properties += len(schema.get("properties", ()))
        if self._properties > MAX_PROPERTIES:
            raise RequestError(f"the JSON schema has more than {MAX_PROPERTIES} properties; use fewer")
        required, least = schema.get("required", ()), schema.get("minProperties", 0)
        if least > len(set(required)) + 1:
            _refuse(
                (*place, "minProperties"),
                f"{least} cannot be enforced, as keys that are not required may repeat; with "
                f"{len(set(required))} required keys, ask for at most {len(set(required)) + 1}",
            )

    @staticmethod
    def _with_format(schema: dict[str, Any]) -> dict[str, Any]:
        """Replace formats that the library checks in part by patterns that say all."""
        own = FORMATS.get(schema.get("format", ""))
        if own is None:
            return schema
        others = {key: value for key, value in schema.items() if key != "format"}
        if not own.keys() & others.keys():
            return {**others, **own}
        return {**others, "allOf": [*others.get("allOf", ()), own]}

    # -- assertions

    def _ref(self, value: Any, place: Place) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            _refuse(
                place, f"{_short(value)} leads out of the schema or to an anchor; refer to a place, as '#/$defs/NAME'"
            )
        parts = unquote(value).split("/")[1:]
        target: list[str | int] = []
        for part in (part.replace("~1", "/").replace("~0", "~") for part in parts):
            in_list = bool(target) and (target[-1] in _LISTS or target[-1] == "items")
            target.append(int(part) if in_list and re.fullmatch("0|[1-9][0-9]{0,8}", part) else part)
        self._refs.append((place, tuple(target)))
        return value

    def _type(self, value: Any, place: Place) -> Any:
        types = [value] if isinstance(value, str) else value
        if (
            not isinstance(types, list)
            or not types
            or any(t not in _TYPES for t in types if isinstance(t, str) or True)
        ):
            _refuse(place, f"expected one or some of {', '.join(_TYPES)}, got {_short(value)}")
        return value

    def _enum(self, value: Any, place: Place) -> list[Any]:
        if not isinstance(value, list) or not value:
            _refuse(place, f"expected a list of at least one value, got {_short(value)}")
        self._values += len(value)
        if self._values > MAX_VALUES:
            _refuse(place, f"the schema has more than {MAX_VALUES} values in all; use fewer")
        return [self._value(part, place) for part in value]

    def _value(self, value: Any, place: Place, depth: int = 0) -> Any:
        """Return a value of enum or const, if an answer can have it."""
        if depth > MAX_DEPTH:
            _refuse(place, f"the value has more than {MAX_DEPTH} levels; make it flatter")
        match value:
            case str():
                _require_writable(value, place)
            case bool() | None:
                pass
            case int() | float():
                return _number(value, place)
            case list():
                return [self._value(part, place, depth + 1) for part in value]
            case dict():
                for name in value:
                    _require_writable(name, place)
                return {name: self._value(part, place, depth + 1) for name, part in value.items()}
        return value

    def _required(self, value: Any, place: Place) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            _refuse(place, f"expected a list of names, got {_short(value)}")
        for name in value:
            _require_writable(name, place)
        return list(dict.fromkeys(value))

    def _count(self, value: Any, place: Place) -> int:
        count = _number(value, place)
        if not isinstance(count, int) or not 0 <= count < MAX_COUNT:
            _refuse(place, f"expected a whole number from 0 to {MAX_COUNT - 1}, got {_short(value)}")
        return count

    def _bound(self, value: Any, place: Place) -> Any:
        if isinstance(value, bool) and place[-1] in ("exclusiveMinimum", "exclusiveMaximum"):
            return value  # as in draft 4
        bound = _number(value, place)
        if place[-1] == "multipleOf":
            if bound <= 0 or "e" in (digits := repr(bound)):
                _refuse(place, f"expected a number above 0, of few digits, got {_short(value)}")
            self._multiples += int(digits.replace(".", ""))
            if self._multiples > MAX_MULTIPLE:
                _refuse(
                    place, f"the multiples in the schema, without decimal points, add up to more than {MAX_MULTIPLE}"
                )
        elif abs(bound) > EXACT and bound != INT64_MAX:
            _refuse(place, f"{_short(value)} is too large to be enforced; use at most 2**53, or leave it out")
        return bound

    def _pattern(self, value: Any, place: Place) -> str:
        if not isinstance(value, str):
            _refuse(place, f"expected a regular expression, got {_short(value)}")
        check_pattern(value, place)
        return value

    def _format(self, value: Any, place: Place) -> str:
        if value not in tuple(FORMATS):
            _refuse(place, f"the format {_short(value)} is not supported; use one of {', '.join(FORMATS)}, or pattern")
        assert isinstance(value, str)
        return value

    def _unique(self, value: Any, place: Place) -> None:
        if value is not False:
            _refuse(place, "the keyword is not supported, and no keyword is ignored; remove it")


_ASSERTIONS: dict[str, Callable[[_Check, Any, Place], Any]] = {
    "$ref": _Check._ref,
    "type": _Check._type,
    "enum": _Check._enum,
    "required": _Check._required,
    "pattern": _Check._pattern,
    "format": _Check._format,
    "uniqueItems": _Check._unique,
    **dict.fromkeys(_COUNTS, _Check._count),
    **dict.fromkeys(_BOUNDS, _Check._bound),
}

_LOOKS_ALIKE = re.compile(r"\\[^\W\d_]")
_SAME_ESCAPES = frozenset("dDwWsSbBnrtfvxupP")


def check_pattern(pattern: str, place: Place) -> None:
    """Raise RequestError for a pattern that the library reads otherwise than ECMA 262, which JSON schemas follow.

    What it cannot read at all, it refuses itself: looking around, references back.
    """
    in_class, i = False, 0
    while i < len(pattern):
        rest = pattern[i:]
        if rest[0] == "\\":
            if rest[1:2].isalpha() and rest[1] not in _SAME_ESCAPES:
                _refuse(place, f"{rest[:2]} in the pattern {_short(pattern)} is not supported; write it otherwise")
            i += 2
            continue
        if in_class:
            if rest[0] == "[" or rest[:2] in ("&&", "--", "~~"):
                _refuse(place, f"{_short(rest[:2])} inside [] in the pattern {_short(pattern)} is ambiguous; escape it")
            in_class = rest[0] != "]"
        elif rest[0] == "[":
            in_class = True
            if rest[1:2] == "]" or rest[1:3] == "^]":
                _refuse(place, f"the pattern {_short(pattern)} has an empty class; leave it out")
            i += rest[1:2] == "^"
        elif rest[:2] == "(?" and not (rest[2:3] in (":", "=", "!") or rest[2:3] == "<"):
            _refuse(place, f"{_short(rest[:4])} in the pattern {_short(pattern)} is not supported; write it otherwise")
        i += 1


_NEEDS_CODE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")


def _require_writable(text: str, place: Place) -> None:
    r"""Refuse text that an answer could have only as ``\u0001``: such escapes are off, as with them an answer could
    spell a name in a way that the library does not see."""
    if found := _NEEDS_CODE.search(text):
        _refuse(place, f"the control character {found[0]!r} in {_short(text)} cannot be generated; remove it")


def _number(value: Any, place: Place) -> int | float:
    """Return a number as the library reads it right."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(place, f"expected a number, got {_short(value)}")
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) > EXACT and value != INT64_MAX:
        _refuse(place, f"{_short(value)} is too large to be exact; use at most 2**53, or leave it out")
    return value


def _map(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(place, f"expected an object of schemas, got {_short(value)}")
    return value


def _list(value: Any, place: Place) -> list[Any]:
    if not isinstance(value, list) or not (value or place[-1] in ("items", "prefixItems")):
        _refuse(place, f"expected a list of schemas, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _spell(place: Place) -> str:
    """Return how a message names a place."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[:400]


def _refuse(place: Place, why: str) -> NoReturn:
    raise RequestError(f"the JSON schema at {_spell(place)}: {why}")
