"""Chat templates make the prompts that `transformers` makes, and no user's text becomes a special token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from lamina.chat import template as module
from lamina.chat.template import ChatPrompt, ChatTemplate
from lamina.errors import CheckpointError, RequestError
from tests.serve.chat.checkpoints import STYLES, load, save

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Look out of the window: é <b>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "number"}},
                "required": ["city"],
            },
        },
    }
]
CHAT = [{"role": "system", "content": "Be short. "}, {"role": "user", "content": " Once upon <b>a</b> time, 5 > 3 "}]
CALLS = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I look.",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
            }
        ],
    },
    {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "abcdefghi", "name": "weather"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "Thank you"},
]


@cache
def checkpoint(style: str) -> tuple[PreTrainedTokenizerFast, ChatTemplate]:
    path = Path(mkdtemp(prefix="lamina-"))
    return save(path, style), load(path)


@pytest.mark.parametrize(
    ("style", "messages"),
    [(style, messages) for style in STYLES for messages in (CHAT, CALLS) if (style, messages) != ("phi", CALLS)],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_templates_make_the_prompts_that_transformers_makes(style: str, messages: Any, tools: Any) -> None:
    """A prompt has the token ids of the library's, with and without tools and calls of them."""
    library, template = checkpoint(style)

    for generate in (True, False):
        prompt = template.render(messages, tools, add_generation_prompt=generate)
        wanted = library.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, return_dict=False)
        text = library.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, tokenize=False)
        assert prompt.ids == wanted
        assert prompt.text == text


def test_variables_documents_and_named_templates_work(tmp_path: Path) -> None:
    """Templates get variables and documents; "tool_use" is chosen where there are tools."""
    source = [
        {"name": "default", "template": "{{ documents | tojson }}{{ mood }}{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    library = save(tmp_path, "llama", {one["name"]: one["template"] for one in source})
    template = load(tmp_path)
    documents = [{"title": "a", "text": "b"}]

    prompt = template.render(CHAT, documents=documents, variables={"mood": "calm"})
    assert prompt.text == library.apply_chat_template(CHAT, documents=documents, mood="calm", tokenize=False)
    assert prompt.text == '[{"title": "a", "text": "b"}]calmBe short. '
    assert template.render(CHAT, TOOLS).text == "weather"


def test_the_list_form_in_the_tokenizer_s_configuration_is_read(tmp_path: Path) -> None:
    """Older checkpoints keep their templates as a list in tokenizer_config.json."""
    save(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load(tmp_path)

    assert (template.render(CHAT).text, template.render(CHAT, TOOLS).text) == ("a", "b")


PARTS = [{"type": "text", "text": "It"}, {"type": "text", "text": "was "}]


@pytest.mark.parametrize(
    ("style", "end"),
    [
        *((style, end) for style in ("llama", "qwen", "mistral", "harmony") for end in ("It was", "It was  ")),
        ("llama", PARTS),
        ("qwen", PARTS),
    ],
)
def test_the_last_message_can_be_continued(style: str, end: Any) -> None:
    """The prompt ends in the last message, as the library's does."""
    library, template = checkpoint(style)
    messages = [*CHAT, {"role": "assistant", "content": end}]

    prompt = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.ids == library.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    with pytest.raises(RequestError, match="exclude each other"):
        template.render(messages, continue_final_message=True)


# -- special tokens in the texts of users


def special_ids(style: str, ids: list[int]) -> list[str]:
    library, _ = checkpoint(style)
    special = set(STYLES[style][0])
    return [token for token in library.convert_ids_to_tokens(ids) if token in special]


def decoded(style: str, ids: list[int]) -> str:
    return str(checkpoint(style)[0].backend_tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("style", STYLES)
def test_spelling_a_special_token_does_not_make_one(style: str) -> None:
    """A prompt has the special tokens that it would have with harmless texts, and spells those of the user as text."""
    _, template = checkpoint(style)
    for token in STYLES[style][0]:
        evil = f"a{token}b {token}{token}"
        prompt, harmless = (
            template.render([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
            for text in (evil, "a")
        )

        assert special_ids(style, prompt.ids) == special_ids(style, harmless.ids)
        assert decoded(style, prompt.ids) == prompt.text
        assert evil in prompt.text


@pytest.mark.parametrize("style", ["llama", "qwen"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_cannot_be_joined_to_a_special_token(style: str, data: st.DataObject) -> None:
    """However a special token is cut into parts, which a template joins, none of it becomes that token."""
    _, template = checkpoint(style)
    token = data.draw(st.sampled_from(STYLES[style][0]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token)), max_size=5)))
    pieces = [token[a:b] for a, b in zip([0, *cuts], [*cuts, len(token)], strict=True)]
    before = data.draw(st.sampled_from(["", "x", "<", " "]))

    prompt = template.render([{"role": "user", "content": [{"type": "text", "text": t} for t in [before, *pieces]]}])
    harmless = template.render([{"role": "user", "content": [{"type": "text", "text": "x"}]}])

    assert special_ids(style, prompt.ids) == special_ids(style, harmless.ids)
    assert decoded(style, prompt.ids) == prompt.text
    assert token in prompt.text


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_nothing_that_a_user_writes_anywhere_becomes_a_special_token(style: str, data: st.DataObject) -> None:
    """Pieces of special tokens in messages, tools, arguments, results and keys stay text, wherever they meet."""
    _, template = checkpoint(style)
    tokens = st.sampled_from(STYLES[style][0])
    pieces = st.tuples(tokens, st.integers(0, 20), st.integers(0, 20)).map(lambda cut: cut[0][cut[1] : cut[2]])
    texts = st.lists(pieces | tokens | st.sampled_from("a <|>\n"), max_size=6).map("".join)

    def ids_and_text(text: Callable[[], str]) -> tuple[list[str], ChatPrompt]:
        schema = {"type": "string", "description": text(), "z" + text(): text()}
        parameters = {"type": "object", "properties": {"k" + text(): schema}}
        function = {"name": "weather", "description": text(), "parameters": parameters}
        arguments = {"k" + text(): text(), "l": [text(), text()]}
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [
            {"role": "system", "content": "s" + text()},
            {"role": "user", "content": text()},
            {"role": "assistant", "content": text(), "reasoning_content": text(), "tool_calls": [call]},
            {"role": "tool", "content": text(), "tool_call_id": "abcdefghi", "name": "weather"},
            {"role": "user", "content": text()},
        ]
        shown = messages if style != "phi" else messages[:2]
        prompt = template.render(shown, [{"type": "function", "function": function}])
        return special_ids(style, prompt.ids), prompt

    special, prompt = ids_and_text(lambda: data.draw(texts))

    assert special == ids_and_text(lambda: "x")[0]
    assert decoded(style, prompt.ids) == prompt.text


def test_keys_cannot_complete_a_special_token() -> None:
    """A template that writes <key> for a key of a schema does not write a special token."""
    tools = json.loads(json.dumps(TOOLS))
    tools[0]["function"]["parameters"]["properties"]["city"]["|im_end|"] = "x"
    _, template = checkpoint("qwen_coder")

    prompt = template.render([{"role": "user", "content": "Hi"}], tools)

    assert special_ids("qwen_coder", prompt.ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert "<|im_end|>x</|im_end|>" in prompt.text
    assert decoded("qwen_coder", prompt.ids) == prompt.text


def test_json_that_escapes_what_is_not_ascii_shows_no_marks(tmp_path: Path) -> None:
    """Marks leave no trace in JSON with escapes, and what looks like one in a text stays."""
    save(tmp_path, "llama")
    template = load(tmp_path, "{{ messages[0].content | tojson(ensure_ascii=True) }}")
    text = "é<|eot_id|>\\ufdd0"

    prompt = template.render([{"role": "user", "content": text}])

    assert json.loads(prompt.text) == text
    assert "\\ufdd0" in prompt.text
    assert prompt.text.count("fdd0") == 1


def test_marks_do_not_change_how_text_with_spaces_is_spelled(tmp_path: Path) -> None:
    """Where a tokenizer marks words by their spaces, also behind special tokens, the rest of a text stays as it was."""
    words = ["<unk>", "▁a", "▁b", "a", "b", "▁", *"<|end>/s", "</s>"]
    library = Library(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token=words[0]))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace()
    library.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("</s>", special=True, normalized=True)])
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token=words[-1]).save_pretrained(tmp_path)
    template = load(tmp_path, "{{ messages[0].content }}<|end|>{{ messages[1].content }}</s>")
    end, eos = library.token_to_id("<|end|>"), library.token_to_id("</s>")

    plain = template.render([{"role": "user", "content": "b a"}, {"role": "user", "content": "a b"}]).ids
    marked = template.render([{"role": "user", "content": "b a</s>"}, {"role": "user", "content": "a b<|end|>"}]).ids

    assert plain.count(end) == marked.count(end) == 1
    assert plain.count(eos) == marked.count(eos) == 1
    spelled = [library.token_to_id(c) for c in "</s>"]
    at = plain.index(end)
    assert marked[: at + len(spelled)] == plain[:at] + spelled


def test_text_with_a_mark_is_refused() -> None:
    """The noncharacter of the marks is named."""
    with pytest.raises(RequestError, match=r"U\+FDD0"):
        checkpoint("llama")[1].render([{"role": "user", "content": "a\ufdd0"}])


# -- templates that refuse or go wrong


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "refuses these messages: Roles must alternate!"),
        ("{{ raise_exception('x' * 100000) }}", "xxx…$"),
        ("{{ messages.missing.more }}", "'missing'"),
        ("{% for a in range(99999) %}xxxxxxxxxxxxxxx{% endfor %}", "more than [0-9]+ characters"),
        ("{% for a in range(999999) %}{% endfor %}", "Range too big"),
        ("{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}", "longer than"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safe|unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "private names"),
    ],
)  # fmt: skip
def test_a_template_that_goes_wrong_is_a_request_error(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template's own words come out, within bounds of time and length."""
    monkeypatch.setattr(module, "TIME_LIMIT_S", 0.2)
    save(tmp_path, "llama")
    template = load(tmp_path, source)

    with pytest.raises(RequestError, match=message) as error:
        template.render(CHAT)
    assert len(str(error.value)) < 700


def test_a_checkpoint_without_a_template_cannot_chat(tmp_path: Path) -> None:
    """The error says what to ask for instead; a template that cannot be read is the checkpoint's fault."""
    save(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()

    with pytest.raises(RequestError, match="has no chat template; ask for"):
        load(tmp_path).render(CHAT)
    with pytest.raises(CheckpointError, match="'default' cannot be read: line 1"):
        load(tmp_path, "{% if %}")


def test_templates_need_no_torch() -> None:
    """A process that only renders templates does not pay for torch."""
    code = "import lamina.chat.template, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
