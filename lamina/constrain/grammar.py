"""Constraints become grammars of the library."""

from __future__ import annotations

import json
import re
from itertools import groupby

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from lamina.constrain.schema import places_of, prepare_schema
from lamina.errors import RequestError
from lamina.wire.requests import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex

MAX_TEXTS = 1 << 18
"""The most bytes of the texts of which an answer is one."""

_JSON_OPTIONS = {
    # Without a bound, a model that has nothing to say may write line breaks until its tokens are used up.
    "whitespace_pattern": r"(?:\x20|\r?\n[\x20\t]{0,64})",
    # No \u: in names of properties the library would take it for any character, also for one of a named property.
    "json_allowed_escapes": 'nrbtf\\"',
}

_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
"""Strings, regular expressions and comments of a grammar."""
_REFUSED = re.compile(r"%(?!ignore\b|import\b|declare\b)\w+|\b(?:temperature|max_tokens|capture)\b(?=[^\n]*\])")
"""A schema within a grammar would escape the check of its keywords; the others say what the library would not do."""


def grammar_of(constraint: Constraint) -> str:
    """Return the library's form of a constraint. Raises RequestError for what it would not enforce."""
    match constraint:
        case JsonSchema(schema=text):
            return _json(prepare_schema(text))
        case JsonObject():
            return _json('{"type": "object"}')
        case Regex(pattern=pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case OneOf(texts=texts):
            if (nbytes := sum(len(text.encode()) for text in texts)) > MAX_TEXTS:
                raise RequestError(f"the texts to choose from have {nbytes} bytes, the limit is {MAX_TEXTS}")
            return LLMatcher.grammar_from_lark(_choice(sorted(set(texts))))
        case Grammar(grammar=text):
            return _grammar(text)


def explained(constraint: Constraint, reason: str) -> str:
    """Return why the library does not compile a constraint, in its words, with the places of what they name."""
    line = " ".join(reason.split("\n", 1)[0].split())[:400]
    if not isinstance(constraint, JsonSchema):
        return line
    named = {
        "oneOf": ("oneOf constraints are not supported", "its alternatives are not clearly disjoint; use anyOf"),
        "minProperties": ("min/maxProperties", line),
        "maxProperties": ("min/maxProperties", line),
        "patternProperties": ("patternProperty", line),
    }
    for keyword, (sign, why) in named.items():
        if sign in line and (places := places_of(constraint.schema, keyword)):
            return f"{keyword} at {', '.join(places[:8])}: {why}"
    return line


def _json(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as e:
        raise RequestError(f"the JSON schema cannot be compiled: {e}") from None


def _choice(texts: list[str]) -> str:
    """Return a grammar of some sorted texts: a tree of their common beginnings, as the library would try each text on
    its own, and give up where there are many long ones."""
    rules: list[str] = []
    open_nodes = [("start", texts, 0)]
    while open_nodes:
        name, group, start = open_nodes.pop()
        branches = []
        if len(group[0]) == start:
            branches.append('""')
            group = group[1:]
        for _, same in groupby(group, key=lambda text: text[start]):
            below = list(same)
            end = _common(below[0], below[-1])
            literal = json.dumps(below[0][start:end])
            if len(below) == 1:
                branches.append(literal)
            else:
                child = f"r{len(rules)}_{len(branches)}"
                branches.append(f"{literal} {child}")
                open_nodes.append((child, below, end))
        rules.append(f"{name}: {' | '.join(branches)}")
    return "\n".join(rules)


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _grammar(text: str) -> str:
    """Return the grammar of a text in the Lark dialect, or in that of llama.cpp, which has ``::=``."""
    try:
        lark = any_to_lark(text)
    except Exception as e:  # the library's converter raises what its parser stumbles over
        raise RequestError(f"the grammar cannot be read: {' '.join(str(e).split())[:400]}") from None
    if found := _REFUSED.search(_LITERALS.sub('""', lark)):
        raise RequestError(
            f"the grammar has {found[0]}, which is not supported; use rules, terminals, %ignore, %import and %declare"
        )
    return LLMatcher.grammar_from_lark(lark)
