"""What an answer has to be where tools must be called, or where reasoning precedes an answer of a given form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark

from lamina.chat.formats import ReasoningFormat, ToolFormat
from lamina.chat.request import ChatRequest, ToolFunction
from lamina.constrain.schema import prepare_schema
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer, spelling
from lamina.wire.requests import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex

_ANY = r"/(.|\n)*/"
_MOST_CHARACTERS = 1 << 18
_MOST_SCHEMAS = 2048
_BREAK = "\n"
_SAID_OF_TEXT = frozenset(("type", "title", "description", "default", "examples", "$defs", "definitions"))
"""Keywords of a text's schema that leave nothing to enforce."""


class Grammars:
    """Makes grammars in the Lark dialect of `llguidance` for one checkpoint, in the format of its own answers.

    A token that was added to the vocabulary is written as its number: for the library, no text matches it.
    """

    def __init__(self, tokenizer: Tokenizer, tools: ToolFormat, reasoning: ReasoningFormat) -> None:
        self._added = tokenizer.added_tokens
        self._spelling = spelling(self._added)
        self._tools = tools
        self._reasoning = reasoning
        self._harmony = tools.name == "harmony"

    def constraint(
        self, request: ChatRequest, answer: Constraint | None, *, opened: bool, closed: bool
    ) -> Constraint | None:
        """Return what the model's whole answer has to be, with its reasoning and calls; None if anything.

        ``answer`` is what has been asked of the content. ``opened``: the prompt ends with the beginning of reasoning.
        ``closed``: it ends with the end of reasoning, so that none follows. Raises RequestError if that cannot be said.
        """
        rules = _Rules()
        calls = request.functions and (request.must_call or answer is not None)
        if request.functions and not calls:
            return self._strict(request, rules)
        if not calls and answer is None:
            return None
        before = self._before(rules, opened, closed)
        if not calls and not before:
            return answer
        alternatives = []
        if answer is not None and not request.must_call:
            alternatives.append(self._final(rules, answer))
        if calls:
            alternatives.append(self._calls(rules, request.functions, request.parallel))
        return rules.grammar(f"{before} ({' | '.join(alternatives)})")

    def _strict(self, request: ChatRequest, rules: _Rules) -> Grammar | None:
        """Return a grammar of free text, in which every call of a strict function fits its schema; None where there is
        no such function, or no mark at which calls begin."""
        form = self._tools
        if not any(function.strict for function in request.functions) or not form.trigger:
            return None
        functions = [
            function if function.strict or form.xml else ToolFunction(function.name, {})
            for function in request.functions
        ]
        free = self._up_to(rules, "free", form.trigger)
        # The mark ends the free text, and so is no part of what follows.
        together = form.before.startswith(form.trigger)
        calls = self._calls(rules, functions, request.parallel and together, without=form.trigger)
        rest = rules.add("rest", _ANY)
        return rules.grammar(f"({free} {calls}){'*' if request.parallel and not together else '?'} {rest}")

    # -- parts, each of which is an expression

    def _before(self, rules: _Rules, opened: bool, closed: bool) -> str:
        """Return what precedes the answer, or nothing."""
        if self._harmony:
            begin = self._text("<|channel|>analysis<|message|>")
            thoughts = self._up_to(rules, "thoughts", "<|end|>")
            return f"({begin} {thoughts} {self._text('<|start|>assistant')})?"
        if not self._reasoning.begin or closed:
            return ""
        thoughts = self._up_to(rules, "thoughts", self._reasoning.end) + r" /\s*/"
        return thoughts if opened else f"({self._text(self._reasoning.begin)} {thoughts})?"

    def _final(self, rules: _Rules, answer: Constraint) -> str:
        """Return the content."""
        match answer:
            case JsonSchema(schema):
                content = rules.json("content", schema)
            case JsonObject():
                content = rules.json("content", '{"type": "object"}')
            case Regex(pattern):
                content = rules.add("content", f"/{regex_to_lark(pattern, '')}/")
            case OneOf(texts):
                content = rules.add("content", " | ".join(map(_quoted, texts)))
            case Grammar():
                raise RequestError(
                    "structured_outputs.grammar: a grammar cannot be combined with tools or with this model's "
                    "reasoning; leave out the tools, and turn the reasoning off by chat_template_kwargs if that works"
                )
        return f"{self._text('<|channel|>final<|message|>')} {content}" if self._harmony else content

    def _calls(self, rules: _Rules, functions: Sequence[ToolFunction], parallel: bool, without: str = "") -> str:
        """Return one call or several. The mark ``without``, at which all calls begin, is left out."""
        form = self._tools
        calls = []
        for i, function in enumerate(functions):
            begin = self._text(form.call.removeprefix(without).replace("{name}", function.name))
            arguments = self._arguments(rules, f"arguments_{i}", function)
            calls.append(rules.add(f"call_{i}", f"{begin} {arguments} {self._text(form.end)}"))
        call = rules.add("call", " | ".join(calls))
        several = f" ({self._text(form.between)} {call})*" if parallel and form.between is not None else ""
        return f"{self._text(form.before.removeprefix(without))} {call}{several} {self._text(form.after)}"

    def _arguments(self, rules: _Rules, name: str, function: ToolFunction) -> str:
        schema = {"type": "object", **function.parameters}
        if not self._tools.xml:
            return rules.json(name, json.dumps(_enforced(schema, function), ensure_ascii=False))
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts = []
        for i, (key, about) in enumerate(schema.get("properties", {}).items()):
            value = self._value(
                rules, f"{name}_{i}", {**about, **shared} if isinstance(about, dict) else about, function
            )
            part = f"{self._text(f'<parameter={key}>' + _BREAK)} {value}"
            parts.append(part if key in schema.get("required", ()) else f"({part})?")
        return " ".join(parts)

    def _value(self, rules: _Rules, name: str, schema: Any, function: ToolFunction) -> str:
        """Return an argument with a mark of its own, to the mark at its end: a text as it is, all else as JSON."""
        end = "\n</parameter>\n"
        if not isinstance(schema, dict) or schema.get("type") != "string":
            whole = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
            enforced = _enforced(whole, function)["properties"]["value"]
            return f"{rules.json(name, json.dumps(enforced, ensure_ascii=False))} {self._text(end)}"
        choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if choices:
            texts = " | ".join(_quoted(choice) for choice in choices if isinstance(choice, str))
            return f"{rules.add(name, texts)} {self._text(end)}"
        if function.strict and (unknown := schema.keys() - _SAID_OF_TEXT):
            raise RequestError(
                f"tools: {min(unknown)!r} of a text in the parameters of {function.name!r} cannot be enforced in the "
                "format of this model; leave it out, or do not make the function strict"
            )
        return self._up_to(rules, name, end)

    def _up_to(self, rules: _Rules, name: str, mark: str) -> str:
        """Return free text with the mark at its end."""
        if mark in self._added:  # no text has it
            return f"{rules.add(name, _ANY)} {self._text(mark)}"
        return rules.add(f"{name}[lazy]", f"{_ANY} {_quoted(mark)}").removesuffix("[lazy]")

    def _text(self, text: str) -> str:
        """Return a text as terminals."""
        terminals, at = [], 0
        for token in self._spelling.finditer(text):
            terminals += [_quoted(text[at : token.start()]), f"<[{self._added[token[0]]}]>"]
            at = token.end()
        terminals.append(_quoted(text[at:]))
        return " ".join(terminal for terminal in terminals if terminal != '""')


class _Rules:
    """The rules of a grammar but its first, and those that are schemas."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._schemas: dict[str, str] = {}

    def add(self, name: str, expression: str) -> str:
        """Add a rule, and return its name."""
        self._rules.append(f"{name}: {expression}")
        return name

    def json(self, name: str, schema: str) -> str:
        """Add the rule of a JSON text that fits a schema, and return its name."""
        self._schemas[name] = schema
        return name

    def grammar(self, start: str) -> Grammar:
        """Return the grammar. RequestError if it is too long."""
        text = "\n".join([f"start: {start}", *self._rules]) + "\n"
        length = len(text) + sum(map(len, self._schemas.values()))
        if length > _MOST_CHARACTERS or len(self._schemas) > _MOST_SCHEMAS:
            raise RequestError(
                f"tools: {len(self._schemas)} schemas with {length} characters are too much to be enforced; at most "
                f"{_MOST_SCHEMAS} with {_MOST_CHARACTERS} are allowed"
            )
        return Grammar(text, self._schemas)


def _enforced(schema: dict[str, Any], function: ToolFunction) -> dict[str, Any]:
    """Return the schema of an object as far as it can be enforced: a tool that is not strict asks for no more.

    RequestError names what cannot, if the tool is strict.
    """
    reason = _refusal(schema)
    if reason is None:
        return schema
    if function.strict:
        raise RequestError(f"tools: the parameters of {function.name!r}: {reason}") from reason
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = schema.get("properties")
    loose: dict[str, Any] = {
        "type": "object",
        "properties": {
            name: about if isinstance(about, dict) and _refusal({**shared, **about}) is None else {}
            for name, about in (properties if isinstance(properties, dict) else {}).items()
        },
        "required": schema.get("required", []),
        **shared,
    }
    return (
        loose if _refusal(loose) is None else {"type": "object", "properties": {key: {} for key in loose["properties"]}}
    )


def _refusal(schema: dict[str, Any]) -> RequestError | None:
    try:
        prepare_schema(json.dumps(schema))
    except RequestError as e:
        return e
    return None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
