"""Answers that must be calls, or of a given form, are forced into the model's own format."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import llguidance
import llguidance.hf
import pytest
from transformers import PreTrainedTokenizerFast

from lamina.chat.chat import Chat
from lamina.chat.events import ChatAnswer
from lamina.chat.request import ChatRequest, ToolFunction
from lamina.chat.template import ChatPrompt, ChatTemplate
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex
from tests.serve.chat.checkpoints import CONTEXT, STYLES, save
from tests.serve.chat.test_answers import TIME, WEATHER

ASKED = [{"role": "user", "content": "Hi"}]
STRICT = ToolFunction("weather", {**WEATHER.parameters, "additionalProperties": False}, strict=True)


class Model:
    """A tokenizer, as the format of answers and as grammars see it."""

    def __init__(self, style: str) -> None:
        path = Path(mkdtemp(prefix="lamina-"))
        self.library: PreTrainedTokenizerFast = save(path, style)
        tokenizer = Tokenizer(path, CONTEXT)
        self.chat = Chat(
            tokenizer, ChatTemplate(tokenizer, self.library.chat_template, self.library.special_tokens_map)
        )
        texts = self.library.batch_decode([[token] for token in range(len(self.library))])
        self.ends = [t for t, text in enumerate(texts) if text.strip() in ('"', "}", '"}', "]") or text[:1] in "<["]
        self.grammars = llguidance.hf.from_tokenizer(self.library)

    def constraint(self, request: ChatRequest, answer: Constraint | None = None, prompt: str = "") -> Constraint | None:
        return self.chat.constraint(request, ChatPrompt([], prompt), answer)

    def accepts(self, grammar: Constraint | None, text: str) -> bool:
        """Return whether a grammar takes a whole text, token by token."""
        matcher = self.matcher(grammar)
        ids = self.library(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def matcher(self, grammar: Constraint | None) -> llguidance.LLMatcher:
        assert isinstance(grammar, Grammar)
        schemas = "".join(f"{name}: %json {schema}\n" for name, schema in grammar.schemas.items())
        matcher = llguidance.LLMatcher(self.grammars, grammar.grammar + schemas)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def generate(self, grammar: Constraint | None, seed: int, most: int = 200) -> str:
        """Return a random text that a grammar allows, or the beginning of one."""
        matcher, chance = self.matcher(grammar), random.Random(seed)
        ids: list[int] = []
        while not matcher.is_stopped() and len(ids) < most:
            if matcher.is_accepting() and chance.random() < 0.5:
                break
            bits = matcher.compute_bitmask()
            # Quotes, brackets and marks end what a random text would never end.
            first = self.ends if chance.random() < 0.3 else []
            order = [*chance.sample(first, len(first)), *chance.sample(range(len(self.library)), len(self.library))]
            ids.append(next(t for t in order if bits[t // 8] >> t % 8 & 1 and t != self.library.eos_token_id))
            assert matcher.consume_token(ids[-1])
        return str(self.library.decode(ids, skip_special_tokens=False))

    def calls(self, request: ChatRequest, text: str, prompt: str = "") -> list[tuple[str, Any]]:
        reader = self.chat.reader(request, ChatPrompt([], prompt))
        answer = ChatAnswer().take([*reader.push(text), *reader.finish()])
        return [(call.name, json.loads(call.arguments)) for call in answer.calls]


@cache
def model(style: str) -> Model:
    return Model(style)


ONE = {
    "llama": '{"name": "weather", "parameters": {"city": "a"}}',
    "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>',
    "qwen_coder": "<tool_call>\n<function=weather>\n<parameter=city>\na\n</parameter>\n</function>\n</tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "a"}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "a"}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "a"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "harmony": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "a"}',
    "phi": '{"name": "weather", "parameters": {"city": "a"}}',
}
REASONED = {
    "qwen": "<think>\nHm\n</think>\n\n",
    "deepseek": "<think>\nHm\n</think>\n\n",
    "mistral_args": "[THINK]Hm[/THINK]",
    "harmony": "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant",
}


@pytest.mark.parametrize("style", STYLES)
def test_required_calls_are_in_the_model_s_format(style: str) -> None:
    """Where a call is required, only calls that the format's reader understands are allowed, behind reasoning."""
    request = ChatRequest(ASKED, functions=[WEATHER, TIME], must_call=True)
    grammar = model(style).constraint(request)

    assert model(style).calls(request, ONE[style]) == [("weather", {"city": "a"})]
    assert model(style).accepts(grammar, ONE[style])
    assert model(style).accepts(grammar, REASONED.get(style, "") + ONE[style])
    assert not model(style).accepts(grammar, "Hello")
    assert not model(style).accepts(grammar, ONE[style].replace("weather", "nothing"))
    if style != "qwen_coder":
        assert not model(style).accepts(grammar, ONE[style].replace('"a"', "3"))


@pytest.mark.parametrize("style", STYLES)
def test_a_chosen_function_is_the_only_one(style: str) -> None:
    """With one function to choose from, no other is allowed."""
    grammar = model(style).constraint(ChatRequest(ASKED, functions=[TIME], must_call=True))
    assert not model(style).accepts(grammar, ONE[style])


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"llama", "phi", "harmony"}))
def test_several_calls_need_parallel_calls(style: str) -> None:
    """Two calls are allowed unless the client forbids it."""
    between = {"mistral": ", ", "mistral_args": "", "deepseek": "\n"}.get(style, "\n")
    form = model(style).chat.tools
    inner = ONE[style].removeprefix(form.before).removesuffix(form.after)
    two = form.before + inner + between + inner + form.after
    for parallel in (True, False):
        request = ChatRequest(ASKED, functions=[WEATHER], must_call=True, parallel=parallel)
        assert model(style).accepts(model(style).constraint(request), two) == parallel
    assert len(model(style).calls(ChatRequest(ASKED, functions=[WEATHER]), two)) == 2


@pytest.mark.parametrize("style", ["qwen", "mistral", "mistral_args", "deepseek", "harmony"])
def test_whatever_a_grammar_allows_is_read_as_calls(style: str) -> None:
    """Random answers under the grammar are calls whose arguments fit, if they end."""
    request = ChatRequest(ASKED, functions=[STRICT], must_call=True)
    prompt = "<think></think>"
    ended = 0
    for seed in range(4):
        grammar = model(style).constraint(request, prompt=prompt)
        text = model(style).generate(grammar, seed)
        if not model(style).accepts(grammar, text):
            continue
        calls = model(style).calls(request, text, prompt)
        ended += 1
        assert calls
        for name, arguments in calls:
            assert name == "weather"
            assert isinstance(arguments["city"], str)
            assert set(arguments) <= {"city", "days"}
            assert isinstance(arguments.get("days", 0), int)
    assert ended


FORMS: list[tuple[Constraint, str, str]] = [
    (JsonSchema('{"type": "object", "properties": {"a": {"type": "integer"}}}'), '{"a": 1}', '{"a": "x"}'),
    (JsonObject(), '{"b": [1]}', "[1]"),
    (Regex("[0-9]+/[a-z]"), "12/a", "12a"),
    (OneOf(["yes", 'n"o']), 'n"o', "maybe"),
]


@pytest.mark.parametrize("style", ["qwen", "harmony"])
@pytest.mark.parametrize(("form", "right", "wrong"), FORMS)
def test_the_form_of_an_answer_holds_behind_reasoning(style: str, form: Constraint, right: str, wrong: str) -> None:
    """Reasoning is free and what follows has the form, also where the prompt begins the reasoning; calls stay
    possible where there are tools."""
    final = "<|channel|>final<|message|>" if style == "harmony" else ""
    grammar = model(style).constraint(ChatRequest(ASKED), form)
    assert model(style).accepts(grammar, REASONED[style] + final + right)
    assert model(style).accepts(grammar, final + right)
    assert not model(style).accepts(grammar, REASONED[style] + final + wrong)
    if style == "qwen":
        opened = model(style).constraint(ChatRequest(ASKED), form, prompt="<think>\n")
        assert model(style).accepts(opened, "Hm\n</think>\n\n" + right)
        assert not model(style).accepts(opened, right)

    with_tools = model(style).constraint(ChatRequest(ASKED, functions=[WEATHER]), form)
    assert model(style).accepts(with_tools, REASONED[style] + final + right)
    assert model(style).accepts(with_tools, REASONED[style] + ONE[style])
    assert not model(style).accepts(with_tools, REASONED[style] + final + wrong)


def test_constraints_that_need_nothing_stay_as_they_are() -> None:
    """Without reasoning and tools the given form is used; a grammar cannot be put behind something."""
    form = Grammar('start: "a"\n')
    assert model("llama").constraint(ChatRequest(ASKED), form) is form
    assert model("qwen").constraint(ChatRequest(ASKED), form, prompt="<think>\n\n</think>\n\n") is form
    assert model("qwen").constraint(ChatRequest(ASKED)) is None
    assert model("qwen").constraint(ChatRequest(ASKED, functions=[WEATHER])) is None
    with pytest.raises(RequestError, match=r"structured_outputs\.grammar"):
        model("qwen").constraint(ChatRequest(ASKED), form)


@pytest.mark.parametrize("style", ["qwen", "qwen_coder", "mistral", "mistral_args", "deepseek"])
def test_strict_functions_are_enforced_when_the_model_calls_them(style: str) -> None:
    """With tools that the model may call, text is free, and a call of a strict function fits its schema."""
    grammar = model(style).constraint(ChatRequest(ASKED, functions=[STRICT, TIME]))

    assert model(style).accepts(grammar, "Hello <you>, {2 + 3}")
    assert model(style).accepts(grammar, "Hm.\n" + ONE[style])
    assert not model(style).accepts(grammar, ONE[style].replace("city", "town"))
    assert not model(style).accepts(grammar, ONE[style].replace("weather", "nothing"))


def test_arguments_with_marks_of_their_own_keep_their_types() -> None:
    """Texts stand there without quotes, also where there is a choice of them; what cannot be enforced is named."""
    properties = {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    }
    request = ChatRequest(
        ASKED,
        functions=[ToolFunction("f", {"properties": properties, "required": ["unit"]}, strict=True)],
        must_call=True,
    )
    grammar = model("qwen_coder").constraint(request)
    text = "<tool_call>\n<function=f>\n<parameter=unit>\nC\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n"
    text += "</function>\n</tool_call>"

    assert model("qwen_coder").accepts(grammar, text)
    assert model("qwen_coder").calls(request, text) == [("f", {"unit": "C", "days": [1, 2]})]
    assert not model("qwen_coder").accepts(grammar, text.replace("\nC\n", "\nK\n"))
    assert not model("qwen_coder").accepts(grammar, text.replace("[1, 2]", '["a"]'))
    with pytest.raises(RequestError, match="'maxLength' of a text in the parameters of 'f'"):
        model("qwen_coder").constraint(
            ChatRequest(
                ASKED,
                functions=[ToolFunction("f", {"properties": {"a": {"type": "string", "maxLength": 3}}}, strict=True)],
                must_call=True,
            )
        )


def test_a_schema_that_cannot_be_enforced_is_loosened_unless_it_is_strict() -> None:
    """What the library cannot enforce is left to the model, property by property; the rest holds."""
    properties = {"city": {"type": "string", "nullable": True}, "days": {"type": "integer"}}
    function = ToolFunction("weather", {"type": "object", "properties": properties, "required": ["city"]})
    grammar = model("qwen").constraint(ChatRequest(ASKED, functions=[function], must_call=True))

    assert model("qwen").accepts(grammar, ONE["qwen"].replace('"a"', "3"))
    assert not model("qwen").accepts(grammar, ONE["qwen"].replace('"city": "a"', '"days": 1'))
    assert not model("qwen").accepts(grammar, ONE["qwen"].replace('"a"', '"a", "days": "b"'))
    strict = ToolFunction("weather", function.parameters, strict=True)
    with pytest.raises(RequestError, match=r"^tools: the parameters of 'weather': .*nullable"):
        model("qwen").constraint(ChatRequest(ASKED, functions=[strict], must_call=True))
