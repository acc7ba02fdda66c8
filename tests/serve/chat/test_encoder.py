"""What the front makes of a conversation, and how a client is told to read the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lamina.chat.events import ChatAnswer
from lamina.chat.reader import answer_reader
from lamina.chat.request import read_text
from lamina.demo.run import CHECKPOINT
from lamina.errors import ProtocolError, RequestError
from lamina.front.encoder import Encoder
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import ChatForm, Grammar, OneOf, Request
from tests.serve.chat.checkpoints import CONTEXT, STYLES, save

USER = {"role": "user", "content": "Hi"}


def conversation(**fields: Any) -> str:
    return json.dumps({"messages": [USER], **fields})


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_becomes_the_prompt_of_its_template(style: str, tmp_path: Path) -> None:
    library = save(tmp_path, style)

    encoded = Encoder(Tokenizer(tmp_path, CONTEXT)).encode(Request(conversation(), chat=True))

    expected = library.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert encoded.request.prompt == expected
    assert encoded.request.chat is False


def test_marks_that_are_special_tokens_are_shown_and_read(tmp_path: Path) -> None:
    """Others are hidden, unless the client wants to see special tokens."""
    save(tmp_path, "mistral")
    encoder, text = Encoder(Tokenizer(tmp_path, CONTEXT)), conversation(tools=[tool("f")])
    said = 'One[INST] moment.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'

    for show, content in ((False, "One moment."), (True, "One[INST] moment.")):
        request, form = encoder.encode(Request(text, chat=True, show_special=show))
        assert request.show_special
        assert form is not None
        form = msgspec.convert(msgspec.to_builtins(form), ChatForm)  # as it travels
        reader = answer_reader(form, read_text(text))
        answer = ChatAnswer().take([*reader.push(said), *reader.finish()])
        assert answer.content == content
        assert [(call.name, call.arguments, len(call.id)) for call in answer.calls] == [("f", '{"a": 1}', 9)]


def test_a_form_is_of_the_content_where_reasoning_precedes_it(tmp_path: Path) -> None:
    """What was reasoned is told apart, also where the prompt begins it."""
    save(tmp_path, "qwen", "{{ messages[0].content }}<think>\n")
    text = conversation()

    request, form = Encoder(Tokenizer(tmp_path, CONTEXT)).encode(Request(text, chat=True, constraint=OneOf(["yes"])))

    assert isinstance(request.constraint, Grammar)
    assert form is not None
    assert form.opened
    reader = answer_reader(form, read_text(text))
    answer = ChatAnswer().take([*reader.push("So</think>\n\nyes"), *reader.finish()])
    assert (answer.reasoning, answer.content) == ("So", "yes")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (conversation(), "this model cannot chat: its checkpoint has no chat template"),
        ("{", "the conversation is no JSON"),
        ("[" * 100_000, "the conversation is no JSON"),
        ("[]", "expected an object with messages, got list"),
        ("{}", "missing key 'messages'"),
        (conversation(tools=[{"type": "x"}]), "tools[0].type"),
        ([1, 2], "chat: expected a conversation as JSON text, got token ids"),
    ],
)
def test_what_is_no_conversation_is_refused(prompt: Any, message: str) -> None:
    """The shipped checkpoint has no template."""
    with pytest.raises(RequestError) as caught:
        Encoder(Tokenizer(CHECKPOINT, CONTEXT)).encode(Request(prompt, chat=True))
    assert message in str(caught.value)


def test_a_format_of_another_version_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="that this version does not know; use the version of the cluster"):
        answer_reader(ChatForm(tools="telepathy", reasoning="none"), read_text(conversation()))
