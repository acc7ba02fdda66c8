"""Every keyword of a JSON schema is enforced, or it is refused by name and place."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lamina.constrain.schema import MAX_PROPERTIES
from lamina.errors import RequestError
from lamina.wire.requests import JsonSchema
from tests.constrain.words import demo_words

Schema = dict[str, Any]
INTEGER: Schema = {"type": "integer"}


def compiled(schema: Any) -> Any:
    return demo_words().compile(JsonSchema(json.dumps(schema)))


def is_valid(schema: Any, value: Any) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(value)


# -- what is refused

REFUSED: list[tuple[Any, str]] = [
    *(
        ({"properties": {"a": {keyword: value}}}, rf"at \$.properties.a.{keyword.replace('$', '[$]')}: the keyword")
        for keyword, value in {
            "not": {},
            "if": {},
            "then": {},
            "else": {},
            "contains": {},
            "minContains": 1,
            "maxContains": 1,
            "uniqueItems": True,
            "propertyNames": {},
            "dependentRequired": {},
            "dependentSchemas": {},
            "dependencies": {},
            "unevaluatedItems": False,
            "unevaluatedProperties": False,
            "contentEncoding": "base64",
            "contentMediaType": "text/plain",
            "contentSchema": {},
            "nullable": True,
            "x-guidance": {"lenient": True},
            "$anchor": "a",
            "$id": "a",
            "$dynamicRef": "#a",
            "$dynamicAnchor": "a",
            "$vocabulary": {},
            "divisibleBy": 2,
            "Type": "string",
        }.items()
    ),
    *(
        ({"items": {"format": name}}, rf"at \$.items.format: the format '{name}' is not supported; use one of date")
        for name in ("regex", "iri", "json-pointer", "idn-email", "uri-reference", "int32", "unknown")
    ),
    ({"anyOf": [{"minProperties": 2}]}, r"at \$.anyOf\[0\].minProperties: 2 cannot be enforced"),
    ({"properties": {"a": {}}, "minProperties": 1}, r"minProperties at \$.minProperties"),
    ({"items": {"oneOf": [{"minimum": 1}, {"maximum": 5}]}}, r"oneOf at \$.items.oneOf: .* use anyOf"),
    ({"patternProperties": {"^a": True, "b$": True}}, r"patternProperties at \$.patternProperties: .*not disjoint"),
    ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, r"at \$.\$ref: \$.\$defs.b is no schema within this one"),
    ({"$ref": "#/enum/0", "enum": [{}]}, r"\$.enum.0 is no schema"),
    ({"$ref": "https://example.org/schema"}, "leads out of the schema"),
    ({"type": "strin"}, r"at \$.type: expected one or some of object, array"),
    ({"type": []}, "got \\[\\]"),
    ({"enum": []}, "at least one value"),
    ({"enum": ["\u0001"]}, r"control character '\\x01'"),
    ({"properties": {"a\u007f": {}}}, "control character"),
    ({"const": 2**53 + 1}, "too large to be exact"),
    ({"const": -(2**63)}, "too large to be exact"),  # of which the library dies
    ({"maximum": 1e30}, "too large to be enforced"),
    ({"exclusiveMinimum": 0, "maximum": 0.25}, r"at \$.exclusiveMinimum: 0 cannot be excluded less than 1 away"),
    (
        {"allOf": [{"exclusiveMinimum": 1}, {"maximum": 1.5}]},
        r"at \$.allOf\[0\].exclusiveMinimum: .* 1.5 at \$.allOf\[1\].maximum",
    ),
    ({"exclusiveMinimum": True}, "expected a number"),
    ({"multipleOf": 0}, "above 0"),
    ({"multipleOf": 1e-9}, "above 0"),
    ({"minItems": "1"}, "expected a number, got '1'"),
    ({"minLength": -1}, "whole number from 0"),
    ({"required": "a"}, "list of names"),
    ({"properties": []}, "object of schemas"),
    ({"items": 3}, "expected a schema"),
    ({"anyOf": []}, "list of schemas"),
    *(
        ({"pattern": pattern}, "pattern")
        for pattern in ("(?i)a", "(?P<a>b)", r"\Aa", r"a\z", "[a&&b]", "[[a]]", "[a--b]", "[]", "[^]", r"\cA")
    ),
    *(({"type": "string", "pattern": p}, "pattern|regex|look") for p in ("(", "(?=a)", r"(a)\1", r"\bfoo", "a$b")),
    (False, "no answer fits it"),
    (3, "expected a schema"),
    ({"allOf": [INTEGER, {"type": "string"}]}, "Unsatisfiable"),
    ({"$ref": "#"}, "no answer fits it"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_enforced_is_refused(schema: Any, message: str) -> None:
    """Never ignored; and what cannot be a schema is refused too."""
    with pytest.raises(RequestError, match=message):
        compiled(schema)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"type": "string", "type": "null"}', "the key 'type' twice"),
        ('{"const": NaN}', "not a number in JSON"),
        ('{"const": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "levels|JSON"),
        ('{"const": ' + "9" * 5000 + "}", "too long|too large"),
    ],
)
def test_what_is_no_json_is_refused(text: str, message: str) -> None:
    """In one sentence."""
    with pytest.raises(RequestError, match=message):
        demo_words().compile(JsonSchema(text))


def chain(length: int, step: Any) -> Schema:
    steps = {f"a{i}": step({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{length}": INTEGER}}


def nested(depth: int) -> Schema:
    schema = INTEGER
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        chain(5000, lambda ref: ref),  # of all these chains the library dies
        chain(5000, lambda ref: {"type": "array", "items": ref}),
        chain(2000, lambda ref: {"allOf": [ref], "minimum": 0}),
        chain(1500, lambda ref: {"anyOf": [ref, {"type": "string"}]}),
        nested(70),
        {"enum": list(range(20_000))},
        {"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}},
        {"multipleOf": 999_983},
        {"prefixItems": [{"multipleOf": 9000 + i} for i in range(5)]},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(4)]} for i in range(12)]},
        {"type": "string", "pattern": "(.*)" * 300 + "(" * 300},
    ],
)
def test_schemas_that_would_take_too_much_are_refused(schema: Any) -> None:
    """Soon, and before the library meets those of which it dies."""
    with pytest.raises(RequestError):
        compiled(schema)


def test_annotations_are_no_constraints() -> None:
    """Programs send them, and they say nothing about what is valid."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/answer",
        "$comment": "none",
        "title": "Answer",
        "description": "A number.",
        "default": 3,
        "examples": [1, 2],
        "deprecated": True,
        "readOnly": True,
        "writeOnly": False,
        "uniqueItems": False,
        **INTEGER,
    }
    assert demo_words().takes(compiled(schema), "12")
    assert not demo_words().takes(compiled(schema), '"a"')


# -- what is enforced

SINGLE: list[Schema] = [
    *({"type": name} for name in ("object", "array", "string", "number", "integer", "boolean", "null")),
    {},
    {"type": ["string", "integer"]},
    {"enum": ["a", 1, None, {"x": [1, 1.5]}, 'q"\\\n', "é", True]},
    {"const": {"a": [1, "b"]}},
    {"const": 1.0},
    {"enum": [1, 5, 9], "minimum": 3},
    {"type": "string", "enum": ["a", 1]},
    {"minimum": 3},
    {"type": "integer", "minimum": -5, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    {"type": "number", "minimum": 1.5, "exclusiveMaximum": 2},
    {"type": "number", "minimum": -1.5, "maximum": -0.5},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0.125, "exclusiveMaximum": 0.5},
    {"type": "integer", "maximum": 2**63 - 1, "minimum": 0},
    {"type": "integer", "multipleOf": 7},
    {"type": "integer", "multipleOf": 3, "minimum": 5, "maximum": 40},
    {"type": "number", "multipleOf": 0.5},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "maxLength": 0},
    {"minLength": 3},
    {"type": "string", "pattern": "^a(b|c)+$"},
    {"type": "string", "pattern": "^[a-c]{2,4}-\\d+$"},
    {"type": "string", "pattern": '^"\\\\/\\n$'},
    {"type": "string", "pattern": "^a*$", "maxLength": 3},
    {"type": "string", "pattern": "^[^a-z]{1,3}$"},
    {"type": "string", "pattern": "^\\S{1,3}$"},
    {"type": "string", "format": "date", "pattern": "^2"},
    {"items": INTEGER},
    {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER, {"type": "string", "maxLength": 3}]},
    {"type": "array", "prefixItems": [INTEGER], "items": False},
    {"type": "array", "prefixItems": [INTEGER], "items": {"type": "null"}, "minItems": 2},
    {"type": "object", "properties": {"a": INTEGER, "b": {"type": "null"}}},
    {"type": "object", "properties": {"a": INTEGER, "b": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["z"]},
    {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": False},
    {"type": "object", "additionalProperties": INTEGER},
    {"type": "object", "properties": {"a": False}},
    {"type": "object", "patternProperties": {"^x": INTEGER}, "additionalProperties": False},
    {"type": "object", "properties": {"xa": {}}, "patternProperties": {"^x": INTEGER}, "required": ["xa"]},
    {"type": "object", "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "maxProperties": 2, "minProperties": 2},
    {"type": "object", "properties": {'a"b\n': INTEGER}, "additionalProperties": False, "required": ['a"b\n']},
    {"anyOf": [INTEGER, {"type": "string", "maxLength": 2}]},
    {"type": "integer", "anyOf": [{"minimum": 30}, {"maximum": -3}]},
    {"oneOf": [INTEGER, {"type": "string", "maxLength": 2}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": k}}, "required": ["k"], "additionalProperties": False}
            for k in ("a", "b")
        ],
        "discriminator": {"propertyName": "k"},
    },
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 25}]},
    {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"type": "object", "maxProperties": 1}]},
    {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}, {"maxLength": 4}]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    {"allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "type": "integer"},
    {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": INTEGER}},
    {"$ref": "#/definitions/x", "definitions": {"x": INTEGER}},
    {"$ref": "#/$defs/x", "minimum": 3, "$defs": {"x": INTEGER}},
    {"type": "object", "properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": 2}}},
]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]


def pairs() -> Iterator[Schema]:
    """Schemas of two or three others, seeded."""
    chosen = random.Random(7)
    small = [s for s in SINGLE if "$ref" not in json.dumps(s)]
    for _ in range(75):
        one, other, third = chosen.sample(small, 3)
        yield {"type": "object", "properties": {"one": one, "two": other}, "required": ["one"]}
        yield {"type": "array", "prefixItems": [one, {"anyOf": [other, third]}], "items": False, "minItems": 1}


SCHEMAS = [*SINGLE, *pairs()]


def check_walks(schema: Any, count: int, limit: int = 3000) -> int:
    """Walk at random, and return how many answers there were, all of which are valid."""
    words, answers = demo_words(), 0
    start = compiled(schema)
    hurry = "".join(c for c in json.dumps(schema) if c.isalpha()) if "pattern" in json.dumps(schema) else "@.:-TZP"
    for seed in range(count):
        text = words.walk(start.matcher(), random.Random(seed), hurry, limit)
        if text is not None:
            answers += 1
            assert is_valid(schema, json.loads(text)), (schema, text)
    return answers


def test_there_are_two_hundred_schemas() -> None:
    """As many as were asked for."""
    assert len(SCHEMAS) >= 200


@pytest.mark.parametrize("part", range(4))
def test_random_answers_are_valid(part: int) -> None:
    """For each schema: whatever is chosen under the masks ends in JSON that fits, by another library."""
    for schema in SCHEMAS[part::4]:
        assert check_walks(schema, 2) == 2, schema


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    """What has a format is valid; a date is one of the calendar."""
    assert check_walks({"type": "string", "format": name}, 8, 300) > 0


DATES = {"2024-02-29": True, "2023-02-29": False, "2000-02-29": True, "1900-02-29": False, "2023-04-31": False}
TIMES = {"23:59:60Z": True, "12:00:60Z": False, "24:00:00Z": False, "12:00:00": False, "12:00:00.5+01:30": True}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"format": "date"}, DATES),
        ({"format": "time"}, TIMES),
        ({"format": "date-time"}, {f"{d}T{t}": DATES[d] and TIMES[t] for d, t in itertools.product(DATES, TIMES)}),
        ({"format": "hostname"}, {"a.b": True, "-a": False, ".".join(["a" * 60] * 5): False}),
        ({"pattern": "^\\d$"}, {"1": True, "٣": False}),
        ({"pattern": "^\\w$"}, {"a": True, "é": False}),
        ({"pattern": "^a|b$"}, {"ax": True, "xb": True, "xa": False}),
        ({"maxLength": 2}, {"😀😀": True, "😀😀a": False}),
    ],
)
def test_strings(schema: Schema, values: dict[str, bool]) -> None:
    """By keywords of which the library alone would enforce a part, or of which dialects differ."""
    start = compiled({"type": "string", **schema})
    for value, fits in values.items():
        assert demo_words().takes(start, json.dumps(value, ensure_ascii=False)) is fits, value


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": INTEGER}}, r'{"\u0061":"x"}', False),
        ({"properties": {"a": INTEGER}}, '{"a":1,"a":"x"}', False),
        ({"properties": {"a": INTEGER, "b": INTEGER}}, '{"b":1,"a":1}', False),  # in the order of the schema
        ({}, '{ "a" : [ 1, 2 ],\n    "b": 3 }', True),
        ({}, "[1,\n\n2]", False),
        ({}, " 1", False),
        (INTEGER, "1.0", False),
        ({"type": "number"}, "-1.5E-3", True),
    ],
)
def test_how_json_is_written(schema: Schema, text: str, fits: bool) -> None:
    """As the page on constrained output says it."""
    assert demo_words().takes(compiled(schema), text) is fits


# -- the public suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON-Schema test suite, which the source distribution of `jsonschema` has."""
    folder = tmp_path_factory.mktemp("suite")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    command = [*pip, "-d", str(folder), "jsonschema>=4.26,<5"]
    got = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    archives = list(folder.glob("jsonschema-*.tar.gz"))
    if not archives:
        pytest.skip(f"the suite cannot be had: {got.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    (found,) = folder.glob("jsonschema-*/json/tests/draft2020-12")
    return found


WRITTEN_OTHERWISE = "\ufeff"
"""White space to ECMA 262, but not to the library."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_public_suite(suite: Path) -> None:
    """Of each schema that is accepted, no invalid instance is an answer, and random answers are valid."""
    accepted = 0
    for file in sorted(suite.rglob("*.json")):
        if file.stem in ("cross-draft", "ecmascript-regex", "vocabulary"):
            continue
        for group in json.loads(file.read_text()):
            try:
                start = compiled(group["schema"])
            except RequestError:
                continue
            accepted += 1
            for test in group["tests"]:
                text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
                if not test["valid"] and WRITTEN_OTHERWISE not in text:
                    assert not demo_words().takes(start, text), (file.stem, group["description"], text)
            check_walks(group["schema"], 4)
    assert accepted >= 150
