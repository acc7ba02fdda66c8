"""The chat template of a checkpoint makes a prompt of messages, as `transformers` does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lamina.chat.marks import Marks
from lamina.errors import CheckpointError, RequestError
from lamina.model.tokenizer import MARK, Tokenizer

Message = dict[str, Any]

TIME_LIMIT_S = 10.0
"""How long a template may take. Those of real models take milliseconds."""
_LONGEST_REASON = 500
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What templates call the reasoning of a message; the first is the common one."""
_CONTINUED = "\ufdd1"
"""A noncharacter behind the text that is to be continued, which tells where the prompt has to end."""

_deadline: ContextVar[float] = ContextVar("deadline")


@dataclass(frozen=True)
class ChatPrompt:
    """What a model gets to read."""

    ids: list[int]
    text: str
    """The same as text, by whose end one can tell how the answer begins."""


class ChatTemplate:
    """Wraps the chat templates of a checkpoint. Any thread may call it; long chats take long, so not the event loop's.

    ``source`` is a template or several by name, of which "tool_use" is for requests with tools; None if the checkpoint
    has none. ``special`` is what templates call special tokens, such as ``bos_token``, and how they are spelled. Raises
    CheckpointError for a template that is not Jinja.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str | Mapping[str, str] | None, special: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._special = dict(special)
        self.sources = {"default": source} if isinstance(source, str) else dict(source or {})
        """The texts of the templates by name."""
        environment = _TemplateEnvironment()
        self._templates: dict[str, tuple[jinja2.Template, Marks]] = {}
        for name, text in self.sources.items():
            try:
                parsed = environment.parse(text)
                template = environment.from_string(text)
            except (jinja2.TemplateError, RecursionError) as e:
                raise CheckpointError(f"the chat template {name!r} cannot be read: {_reason(e)}") from e
            self._templates[name] = template, Marks(tokenizer, parsed)

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> ChatPrompt:
        """Return the prompt for messages, whose roles have been checked: they are not taken for a user's text.

        With ``continue_final_message`` the prompt ends in the text of the last message. ``variables`` are for the
        template alone. Without special tokens in the texts of users, the ids are those of
        `transformers.PreTrainedTokenizer.apply_chat_template`; such spellings become text. Raises RequestError if the
        template refuses the messages, takes more than `TIME_LIMIT_S` or makes more text than the context takes.
        """
        text = self.text(
            messages,
            tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return ChatPrompt(self._tokenizer.encode_marked(text), text.replace(MARK, ""))

    def text(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the text of a prompt, in which `MARK` is in special tokens that users spell."""
        template, marks = self._choose(bool(tools))
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first continues the last "
                "message, the second begins a new one; set one of them to false"
            )
        chat = [_marked_message(message, marks) for message in messages]
        if continue_final_message:
            _mark_end(chat)
        text = self._rendered(
            template,
            {
                **self._special,
                **marks.marked(variables or {}),
                "messages": chat,
                "tools": marks.marked(tools) if tools else None,
                "documents": marks.marked(documents),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _until_end(text) if continue_final_message else text

    def _choose(self, tools: bool) -> tuple[jinja2.Template, Marks]:
        names = ("tool_use", "default") if tools else ("default",)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        has = f" called 'default', only {', '.join(map(repr, self._templates))}" if self._templates else ""
        raise RequestError(
            f"this model cannot chat: its checkpoint has no chat template{has}; ask for the completion of a text "
            "instead, add a chat_template.jinja to the checkpoint, or start lamina serve with --chat-template"
        )

    def _rendered(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        parts, length, limit = [], 0, self._tokenizer.max_bytes
        token = _deadline.set(time.monotonic() + TIME_LIMIT_S)
        try:
            for part in template.generate(variables):
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise RequestError(
                        f"the chat template makes more than {limit} characters of these messages, more than the "
                        "context of this model takes; shorten them"
                    )
                _check_time()
        except RequestError:
            raise
        except Exception as e:  # a template may do anything that an expression can do wrong
            raise RequestError(f"the chat template refuses these messages: {_reason(e)}") from e
        finally:
            _deadline.reset(token)
        return "".join(parts)


def _marked_message(message: Message, marks: Marks) -> Message:
    """Return a message as templates expect it: without nulls, with its reasoning under its two common names."""
    marked: Message = marks.marked(
        {key: value for key, value in message.items() if value is not None and key != "role"}
    )
    marked = {"role": message["role"], **marked}
    reasoning = next((marked[key] for key in _REASONING if key in marked), None)
    return marked if reasoning is None else {"thinking": reasoning, **marked, "reasoning_content": reasoning}


def _mark_end(chat: list[Message]) -> None:
    """Put `_CONTINUED` and a space behind the last text of the last message."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUED + " "
        return
    for part in reversed(content if isinstance(content, list) else []):
        if "text" in part:
            part["text"] += _CONTINUED + " "
            return
    raise RequestError("continue_final_message needs a last message with a text that can be continued; it has none")


def _until_end(text: str) -> str:
    end = text.rfind(_CONTINUED)
    if end < 0:
        raise RequestError("the chat template leaves out the last message, so continue_final_message cannot work")
    # Where the template trims the text, it has also trimmed the space that came after the mark.
    return text[:end] if text.startswith(" ", end + 1) else text[:end].rstrip()


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself too often"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        reason = f"line {error.lineno}: {reason}"
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "…"


def _check_time() -> str:
    if time.monotonic() > _deadline.get():
        raise RequestError(
            f"the chat template took longer than {TIME_LIMIT_S:g} s for these messages; send fewer of them"
        )
    return ""


# -- what templates find in their environment


class _TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What `transformers` gives to templates. Each call and each turn of a loop looks at the clock."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
            _CHECK: _check_time,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            check = nodes.Call(nodes.Name(_CHECK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(check).set_lineno(loop.lineno).set_environment(self))
        return super()._generate(source, *args, **kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_time()
        return super().call(__context, __obj, *args, **kwargs)


_CHECK = "_check_time"


class _Generation(Extension):
    """{% generation %} says which text an assistant has generated, for training. It changes nothing in a prompt."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # A block has a scope of its own for what it sets, as the library's has.
        return nodes.CallBlock(
            self.call_method("_same"), [], [], parser.parse_statements(("name:endgeneration",), drop_needle=True)
        ).set_lineno(line)

    def _same(self, caller: Any) -> str:
        text: str = caller()
        return text


class _Dict:
    """The type of dictionaries, of which templates reach nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Variables of a template that loops can set. Their names are not private."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be the name of one
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no private names such as {name!r}")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002
    # The local time, without a zone, is what templates expect.
    return datetime.now().strftime(format)  # noqa: DTZ005


_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)" + re.escape(json.dumps(MARK)[1:-1]))


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON text. Jinja's own filter would escape what HTML does not allow."""
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED_MARK.sub(rf"\g<1>{MARK}", text) if ensure_ascii else text
