"""Constraints become grammars of the library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from lamina.constrain.schema import places_of, prepare_schema
from lamina.errors import RequestError
from lamina.wire.requests import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex

MAX_TEXTS = 1 << 18
"""The most bytes of the texts of which an answer is one."""

_FREELY = '%llguidance {"no_forcing": true}\n'
"""Without it, the library allows a single token where only one text can come next: the one that its tokenizer would
make of that text. A model may want others."""

_JSON_OPTIONS = {
    # Without a bound, a model that has nothing to say may write line breaks until its tokens are used up.
    "whitespace_pattern": r"(?:\x20|\r?\n[\x20\t]{0,64})",
    # No \u: in names of properties the library would take it for any character, also for one of a named property.
    "json_allowed_escapes": 'nrbtf\\"',
}

_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
"""Strings, regular expressions and comments of a grammar."""
_REFUSED = re.compile(r"%(?!ignore\b|import\b|declare\b)\w+|\b(?:temperature|max_tokens|capture)\s*[=,\]]")
"""A schema within a grammar would escape the check of its keywords; the others say what the library would not do."""

_RULE_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


def grammar_of(constraint: Constraint) -> str:
    """Return the library's form of a constraint. Raises RequestError for what it would not enforce."""
    match constraint:
        case JsonSchema(schema=text):
            return _json(prepare_schema(text))
        case JsonObject():
            return _json({"type": "object"})
        case Regex(pattern=pattern):
            return _lark(f"start: /{regex_to_lark(pattern, '')}/")
        case OneOf(texts=texts):
            if (nbytes := sum(len(text.encode()) for text in texts)) > MAX_TEXTS:
                raise RequestError(f"the texts to choose from have {nbytes} bytes, the limit is {MAX_TEXTS}")
            return _lark(_choice(sorted(set(texts))))
        case Grammar(grammar=text, schemas=schemas):
            return _grammar(text, schemas)


def explained(constraint: Constraint, reason: str) -> str:
    """Return why the library does not compile a constraint, in its words, with the places of what they name."""
    line = _brief(reason)
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


def _json(schema: dict[str, Any]) -> str:
    return _lark(f"start: {_json_rule(schema)}")


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _lark(grammar: str) -> str:
    return LLMatcher.grammar_from_lark(_FREELY + grammar)


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


def _grammar(text: str, schemas: Mapping[str, str]) -> str:
    """Return the grammar of a text in the Lark dialect, or in that of llama.cpp, which has ``::=``. To the former,
    ``schemas`` add rules that stand for JSON texts."""
    bare = _LITERALS.sub('""', text)
    if found := _REFUSED.search(bare):
        raise RequestError(
            f"the grammar has {found[0]}, which is not supported; use rules, terminals, %ignore, %import and %declare"
        )
    for name in schemas:
        if not _RULE_NAME.fullmatch(name):
            raise RequestError(f"schemas: expected names of rules, such as arguments_0, got {name!r:.100}")
    if "::=" not in bare:
        rules = [f"{name}: {_json_rule(prepare_schema(schema))}" for name, schema in schemas.items()]
        return _lark("\n".join([text, *rules]))
    if schemas:
        raise RequestError("schemas: only possible with a grammar in the Lark dialect")
    try:
        return _lark(gbnf_to_lark(text).replace("%llguidance {}", "", 1))
    except Exception as e:  # the library's converter raises what its parser stumbles over
        raise RequestError(f"the grammar cannot be read: {_brief(str(e))}") from None


def _brief(message: str) -> str:
    """Return the lines of a message of the library that say what is wrong, without its drawings."""
    first, *others = message.split("\n")
    lines = [first, *(line for line in others if line.startswith("error:"))]
    return " ".join(" ".join(lines).split())[:400]
