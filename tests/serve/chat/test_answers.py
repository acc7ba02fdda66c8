"""Answers of models become content, reasoning and calls, however their text is cut into pieces."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.chat.chat import Chat
from lamina.chat.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ChatAnswer,
    ChatEvent,
    ContentDelta,
    ReasoningDelta,
)
from lamina.chat.reader import AnswerReader, answer_reader
from lamina.chat.request import ChatRequest, ToolFunction
from lamina.chat.template import ChatPrompt, ChatTemplate
from lamina.demo.run import CHECKPOINT
from lamina.errors import ConfigError
from lamina.model.tokenizer import Tokenizer
from tests.serve.chat.checkpoints import CONTEXT, STYLES, save

WEATHER = ToolFunction(
    "weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
TIME = ToolFunction("time", {"type": "object", "properties": {"zone": {"type": "string"}}})
ASKED = ChatRequest([{"role": "user", "content": "Hi"}], functions=[WEATHER, TIME])


@cache
def chat(style: str) -> Chat:
    path = Path(mkdtemp(prefix="lamina-"))
    library = save(path, style)
    return Chat(
        tokenizer := Tokenizer(path, CONTEXT),
        ChatTemplate(tokenizer, library.chat_template, library.special_tokens_map),
    )


def reader(style: str, *, prompt: str = "", request: ChatRequest = ASKED) -> AnswerReader:
    return chat(style).reader(request, ChatPrompt([], prompt))


def read(style: str, *pieces: str, prompt: str = "", request: ChatRequest = ASKED) -> list[ChatEvent]:
    """Return the events of an answer in pieces."""
    answer = reader(style, prompt=prompt, request=request)
    return [event for piece in pieces for event in answer.push(piece)] + answer.finish()


def told(events: list[ChatEvent]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return content, reasoning and calls with their arguments as values."""
    answer = ChatAnswer().take(events)
    return answer.content, answer.reasoning, [(call.name, json.loads(call.arguments)) for call in answer.calls]


CITY = {"city": 'Zürich {"<tool_call>"} \\ ', "days": 2}
ZONE = {"zone": "UTC"}
CITY_JSON, ZONE_JSON = (json.dumps(value, ensure_ascii=False) for value in (CITY, ZONE))
BOTH = [("weather", CITY), ("time", ZONE)]
DEEP = "<｜tool▁call▁begin｜>"

ANSWERS: dict[str, tuple[str, str, str, tuple[str, str, Any]]] = {
    "hermes": (
        "qwen",
        "",
        (
            f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {CITY_JSON}}}\n</tool_call>\n'
            f'<tool_call>\n{{"name": "time", "arguments": {ZONE_JSON}}}\n</tool_call>'
        ),
        ("I look.", "", BOTH),
    ),
    "hermes with reasoning": (
        "qwen",
        "",
        f'<think>\nShall I?\n\nYes\n</think>\n\n<tool_call>{{"name":"time","arguments":{ZONE_JSON}}}</tool_call>',
        ("", "Shall I?\n\nYes", BOTH[1:]),
    ),
    "hermes with another order": (
        "qwen",
        "",
        f'<tool_call>{{"arguments": {CITY_JSON.replace("<tool_call>", "x")}, "name": "weather"}}</tool_call>',
        ("", "", [("weather", {**CITY, "city": CITY["city"].replace("<tool_call>", "x")})]),
    ),
    "opened reasoning": ("qwen", "...<think>\n", "Hm\n</think>\n\nYes.  ", ("Yes.  ", "Hm", [])),
    "reasoning without an end": ("qwen", "...<think>\n", "Hm, well\n", ("", "Hm, well\n", [])),
    "ended reasoning": ("qwen", "...<think>\n\n</think>\n\n", "<think>a</think>", ("<think>a</think>", "", [])),
    "coder": (
        "qwen_coder",
        "",
        (
            "Well\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
        ),
        ("Well", "", [("weather", {"city": "12", "days": 2}), ("time", {})]),
    ),
    "llama": ("llama", "", f'{{"name": "weather", "parameters": {CITY_JSON}}}', ("", "", BOTH[:1])),
    "llama with two and a tag": (
        "llama",
        "",
        (
            f'<|python_tag|>{{"name": "weather", "parameters": {CITY_JSON}}}; '
            f'{{"type": "function", "name": "time", "parameters": {ZONE_JSON}}}'
        ),
        ("", "", BOTH),
    ),
    "llama with an object of another kind": ("llama", "", '{"names": ["a"]} is it', ('{"names": ["a"]} is it', "", [])),
    "llama with code": ("llama", "", "<|python_tag|>print(1)", ("<|python_tag|>print(1)", "", [])),
    "mistral": (
        "mistral",
        "",
        (
            f'Well [TOOL_CALLS] [{{"name": "weather", "arguments": {CITY_JSON}}}, '
            f'{{"name": "time", "arguments": {ZONE_JSON}, "id": "123456789"}}]'
        ),
        ("Well", "", BOTH),
    ),
    "mistral with names": (
        "mistral_args",
        "",
        f"[THINK]Hm[/THINK]Well[TOOL_CALLS]weather[ARGS]{CITY_JSON}[TOOL_CALLS]time[CALL_ID]123456789[ARGS]{ZONE_JSON}",
        ("Well", "Hm", BOTH),
    ),
    "deepseek": (
        "deepseek",
        "<think>\n",
        (
            f"Hm</think>Well\n<｜tool▁calls▁begin｜>{DEEP}function<｜tool▁sep｜>weather\n```json\n{CITY_JSON}\n```"
            f"<｜tool▁call▁end｜>\n{DEEP}function<｜tool▁sep｜>time\n```json\n{ZONE_JSON}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>"
        ),
        ("Well", "Hm", BOTH),
    ),
    "deepseek 3.1": (
        "deepseek",
        "<think></think>",
        (
            f"<｜tool▁calls▁begin｜>{DEEP}weather<｜tool▁sep｜>{CITY_JSON}<｜tool▁call▁end｜>"
            f"{DEEP}time<｜tool▁sep｜>{ZONE_JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        ("", "", BOTH),
    ),
    "harmony": (
        "harmony",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        + CITY_JSON
        + f"<|call|><|start|>assistant to=functions.time<|channel|>commentary json<|message|>{ZONE_JSON}",
        ("I look.", "Hm", BOTH),
    ),
    "harmony with a call at once": (
        "harmony",
        "<|start|>assistant",
        f" to=functions.time<|channel|>commentary json<|message|>{ZONE_JSON}<|call|>",
        ("", "", BOTH[1:]),
    ),
    "harmony without calls": (
        "harmony",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Hm\n<|end|><|start|>assistant<|channel|>final<|message|>Yes. ",
        ("Yes. ", "Hm", []),
    ),
    "harmony without channels": ("harmony", "<|start|>assistant", "Just text", ("Just text", "", [])),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read_in_the_model_s_format(name: str) -> None:
    """The format is found by the checkpoint's template, and content, reasoning and calls are told apart."""
    style, prompt, text, wanted = ANSWERS[name]
    assert told(read(style, text, prompt=prompt)) == wanted


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_the_same_character_by_character(name: str) -> None:
    """Arguments come as they are written, not only when a call is complete, where the format has them as JSON."""
    style, prompt, text, wanted = ANSWERS[name]
    events = read(style, *text, prompt=prompt)

    assert told(events) == wanted
    if wanted[2] and style != "qwen_coder" and name != "hermes with another order":
        assert sum(isinstance(event, CallArguments) for event in events) > 5
    begun: list[int] = []
    for event in events:
        match event:
            case CallBegin(index):
                assert index == len(begun)
                begun.append(index)
            case CallArguments(index) | CallEnd(index):
                assert index == begun[-1]


MARKS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', '"a": 1', "}}", "}", "{"),
    *("[TOOL_CALLS]", "[", "]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "f", " ", "\n", '"', "\\", ",", ";"),
    *("<function=f>", "<parameter=a>", "</parameter>", "</function>", "<|python_tag|>", "<|im_end|>", "<", "é"),
    *("<|start|>", "assistant", " to=functions.f", "<|channel|>", "analysis", "<|message|>", "<|end|>", "<|call|>"),
    *("<｜tool▁calls▁begin｜>", DEEP, "<｜tool▁sep｜>", "```json\n", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
]


def joined(events: list[ChatEvent]) -> list[tuple[Any, ...]]:
    """Return the events with the texts of neighbours of one kind joined, and without ids."""
    runs: list[list[Any]] = []
    for event in events:
        match event:
            case ContentDelta(text) | ReasoningDelta(text):
                kind: list[Any] = [type(event)]
            case CallArguments(index, text):
                kind = [type(event), index]
            case CallBegin(index, _, name):
                kind, text = [type(event), index, name], ""
            case CallEnd(index):
                kind, text = [type(event), index], ""
        if runs and runs[-1][:-1] == kind:
            runs[-1][-1] += text
        else:
            runs.append([*kind, text])
    return [tuple(run) for run in runs]


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_change_nothing_and_nothing_is_lost(style: str, data: st.DataObject) -> None:
    """Any text, well-formed or not, gives the same in any pieces; each word of it is somewhere in what comes out."""
    parts = data.draw(st.lists(st.sampled_from(MARKS) | st.from_regex(r"w[0-9]{3}", fullmatch=True), max_size=14))
    text = "".join(parts)
    prompt = data.draw(st.sampled_from(["", "<think>\n", "[THINK]", "</think>"]))
    request = ChatRequest(ASKED.messages, functions=ASKED.functions, parallel=data.draw(st.booleans()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    whole = joined(read(style, text, prompt=prompt, request=request))
    assert joined(read(style, *pieces, prompt=prompt, request=request)) == whole
    assert joined(read(style, *text, prompt=prompt, request=request)) == whole
    if request.parallel:
        out = "".join(str(one) for run in whole for one in run)
        # A harmony header, a call's own id and keys beside its arguments are no part of an answer.
        if style not in ("harmony", "mistral", "mistral_args", "llama"):
            assert sorted(re.findall(r"w[0-9]{3}", text)) == sorted(re.findall(r"w[0-9]{3}", out))


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("qwen", "<tool_call>not JSON</tool_call> after"),
        ("qwen", '<tool_call>{"name": 3}</tool_call>'),
        ("qwen", '<tool_call>{"name": "f"'),
        ("qwen_coder", "<tool_call><function=f>junk</function></tool_call>"),
        ("mistral", '[TOOL_CALLS][{"nam": 1}]'),
        ("mistral_args", "[TOOL_CALLS]I cannot do that"),
        ("deepseek", f"<｜tool▁calls▁begin｜>{DEEP}function<｜tool▁call▁end｜>"),
        ("llama", '{"name": 3, "parameters": {}}'),
    ],
)
def test_malformed_calls_are_content(style: str, text: str) -> None:
    """What only looks like a call comes out as the model wrote it."""
    prompt = "<think></think>"
    assert told(read(style, *text, prompt=prompt)) == (text, "", [])


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"harmony"}))
def test_marks_are_not_read_where_there_are_no_tools(style: str) -> None:
    """Without tools, or if none may be called, the spelling of a mark is text. (Harmony always has channels.)"""
    text = '{"name": "f", "parameters": {}} <tool_call> [TOOL_CALLS] <｜tool▁calls▁begin｜>'
    answer = told(read(style, *text, request=ChatRequest(ASKED.messages), prompt="<think></think>"))
    assert answer == (text, "", []) or (style == "mistral" and "[TOOL_CALLS]" not in answer[0])


def test_one_call_ends_an_answer_that_may_have_only_one() -> None:
    """Without parallel calls, the reader is over after the first, and gives nothing more."""
    style, prompt, text, _ = ANSWERS["hermes"]
    answer = reader(
        style, prompt=prompt, request=ChatRequest(ASKED.messages, functions=ASKED.functions, parallel=False)
    )
    events = []
    for character in text:
        events += answer.push(character)
        if answer.over:
            break

    assert told(events) == ("I look.", "", BOTH[:1])
    assert answer.push("more") == []
    assert answer.finish() == []
    assert joined(
        read(style, text, request=ChatRequest(ASKED.messages, functions=ASKED.functions, parallel=False))
    ) == (joined(events))


def test_special_tokens_that_mark_nothing_stay_hidden() -> None:
    """Where special tokens are shown because some mark calls, the others are left out."""
    assert chat("mistral").show_special
    assert not chat("qwen").show_special
    assert told(read("mistral", "a</s>b", "[IN", "ST]c")) == ("abc", "", [])
    shown = answer_reader(chat("mistral").form(ASKED, ChatPrompt([], ""), hide_special=False), ASKED)
    assert told([*shown.push("a</s>b"), *shown.finish()]) == ("a</s>b", "", [])


def test_ids_have_the_form_that_the_template_needs() -> None:
    """Mistral's have 9 letters and digits, and longer ones of other servers are shortened for the template."""
    for style, pattern in (("mistral", r"[a-zA-Z0-9]{9}"), ("qwen", r"call_[0-9a-f]{24}")):
        events = read(style, ANSWERS["mistral" if style == "mistral" else "hermes"][2])
        ids = [event.id for event in events if isinstance(event, CallBegin)]
        assert len(set(ids)) == 2
        assert all(re.fullmatch(pattern, id_) for id_ in ids)
    long = "call_0123456789abcdef"
    call = {"id": long, "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": long},
    ]
    text = chat("mistral").prompt(ChatRequest(messages)).text
    first, second = re.findall(r'id": "([a-zA-Z0-9]{9})"', text)
    assert first == second


@pytest.mark.parametrize("style", STYLES)
def test_content_comes_in_the_form_that_the_template_takes(style: str) -> None:
    """Parts are joined for templates that take only text."""
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    text = chat(style).prompt(ChatRequest([{"role": "user", "content": parts}])).text
    assert ("Onetwo" if style in ("llama", "qwen") else "One\ntwo") in text


def test_text_becomes_parts_for_templates_that_take_only_parts() -> None:
    """So do the developer's messages become the system's where the template knows no developer."""
    tokenizer = Tokenizer(CHECKPOINT, CONTEXT)
    source = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    small = Chat(tokenizer, ChatTemplate(tokenizer, source, {}))

    assert small.prompt(ChatRequest([{"role": "developer", "content": "Hi"}])).text == "system:Hi"


def test_formats_can_be_named() -> None:
    """A name takes the place of what the template shows; an unknown one is explained."""
    tokenizer = Tokenizer(CHECKPOINT, CONTEXT)
    template = ChatTemplate(tokenizer, "{{ messages }}", {})

    named = Chat(tokenizer, template, tools="hermes", reasoning="think")
    assert (named.tools.name, named.reasoning.name) == ("hermes", "think")
    assert Chat(tokenizer, template).reasoning.name == "none"
    with pytest.raises(ConfigError, match="--tool-parser: unknown format 'hermess'; did you mean 'hermes'"):
        Chat(tokenizer, template, tools="hermess")
