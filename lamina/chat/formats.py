"""The formats in which models call tools and show their reasoning, and how a checkpoint tells which are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lamina.chat import harmony, json_calls, marked_calls
from lamina.chat.feed import Feed, Marker, Steps
from lamina.chat.request import ToolFunction
from lamina.errors import ConfigError
from lamina.model.tokenizer import Tokenizer
from lamina.validation import meant

F = TypeVar("F")
Reader = Callable[[Feed, Sequence[ToolFunction]], Steps[None]]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls of tools. In the texts, ``{name}`` is the name of the function."""

    name: str
    read: Reader
    marks: tuple[str, ...] = ()
    """What an answer has to show though it may be special tokens."""
    before: str = ""
    """What stands before all calls."""
    call: str = '{"name": "{name}", "parameters": '
    """What stands before the arguments of a call."""
    end: str = "}"
    """What stands behind them."""
    between: str | None = None
    """What stands between calls; None if an answer has one only."""
    after: str = ""
    """What stands behind all calls."""
    trigger: str = ""
    """The mark at which all calls begin, if there is one; else free text cannot be told from a call at once."""
    short_ids: bool = False
    """Whether the ids of calls have 9 letters and digits."""
    xml: bool = False
    """Whether each argument has a mark of its own, instead of JSON."""


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around a model's reasoning, which comes first."""

    name: str
    begin: str = ""
    end: str = ""

    def read(self, feed: Feed, *, opened: bool) -> Steps[None]:
        """Read reasoning, if there is any. With ``opened``, the prompt ends with its beginning."""
        if not self.begin or not (opened or (yield from feed.starts(self.begin))):
            return
        yield from feed.skip("\n")
        found = yield from feed.until(Marker([self.end]), feed.reasoning)
        if found is None:
            feed.finish(reasoning=True)
        feed.end_reasoning()
        yield from feed.skip("\n")


_HERMES = ToolFormat(
    "hermes",
    json_calls.hermes,
    marks=("<tool_call>", "</tool_call>"),
    call='<tool_call>\n{"name": "{name}", "arguments": ',
    end="}\n</tool_call>",
    between="\n",
    trigger="<tool_call>",
)
_QWEN_CODER = ToolFormat(
    "qwen3_coder",
    marked_calls.qwen_coder,
    marks=("<tool_call>", "</tool_call>"),
    call="<tool_call>\n<function={name}>\n",
    end="</function>\n</tool_call>",
    between="\n",
    trigger="<tool_call>",
    xml=True,
)
_LLAMA = ToolFormat("llama3_json", json_calls.llama, marks=("<|python_tag|>",))
_MISTRAL_LIST = ToolFormat(
    "mistral",
    json_calls.mistral,
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    before="[TOOL_CALLS][",
    call='{"name": "{name}", "arguments": ',
    between=", ",
    after="]",
    trigger="[TOOL_CALLS]",
    short_ids=True,
)
_MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    json_calls.mistral,
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    call="[TOOL_CALLS]{name}[ARGS]",
    end="",
    between="",
    trigger="[TOOL_CALLS]",
    short_ids=True,
)
_DEEPSEEK_MARKS = tuple(
    f"<｜{mark}｜>" for mark in ("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep")
)
_DEEPSEEK_V3 = ToolFormat(
    "deepseek_v3",
    marked_calls.deepseek,
    marks=_DEEPSEEK_MARKS,
    before="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
    end="\n```<｜tool▁call▁end｜>",
    between="\n",
    after="<｜tool▁calls▁end｜>",
    trigger="<｜tool▁calls▁begin｜>",
)
_DEEPSEEK_V31 = ToolFormat(
    "deepseek_v31",
    marked_calls.deepseek,
    marks=_DEEPSEEK_MARKS,
    before="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
    end="<｜tool▁call▁end｜>",
    between="",
    after="<｜tool▁calls▁end｜>",
    trigger="<｜tool▁calls▁begin｜>",
)
_HARMONY = ToolFormat(
    "harmony",
    harmony.harmony,
    marks=harmony.SPELLINGS,
    call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    end="",  # the model ends with <|call|>, at which it stops
)

TOOL_FORMATS = {
    form.name: form
    for form in (_HERMES, _QWEN_CODER, _LLAMA, _MISTRAL_LIST, _MISTRAL_ARGS, _DEEPSEEK_V3, _DEEPSEEK_V31, _HARMONY)
}
REASONING_FORMATS = {
    form.name: form
    for form in (
        ReasoningFormat("none"),
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("harmony"),  # its reasoning is one of the channels
    )
}


def tool_format(name: str | None, template: str, tokenizer: Tokenizer) -> ToolFormat:
    """Return a format by its name, or the one that the template of a checkpoint uses. Where that shows none, it is that
    of Llama 3, which needs no marks. ConfigError for an unknown name."""
    if name is not None:
        return _named(name, TOOL_FORMATS, "--tool-parser")
    tokens = tokenizer.added_tokens.keys()
    if {"<|channel|>", "<|message|>"} <= tokens:
        return _HARMONY
    if "[TOOL_CALLS]" in template or "[TOOL_CALLS]" in tokens:
        return _MISTRAL_ARGS if "[ARGS]" in template else _MISTRAL_LIST
    if "<｜tool▁calls▁begin｜>" in template:
        return _DEEPSEEK_V3 if "```json" in template else _DEEPSEEK_V31
    if "<function=" in template:
        return _QWEN_CODER
    if "<tool_call>" in template:
        return _HERMES
    return _LLAMA


def reasoning_format(name: str | None, template: str, tokenizer: Tokenizer) -> ReasoningFormat:
    """Return a format by its name, or the one that the tokens and the template of a checkpoint show. ConfigError for an
    unknown name."""
    if name is not None:
        return _named(name, REASONING_FORMATS, "--reasoning-parser")
    tokens = tokenizer.added_tokens.keys()
    if {"<|channel|>", "<|message|>"} <= tokens:
        return REASONING_FORMATS["harmony"]
    for form in REASONING_FORMATS.values():
        if form.begin and (form.begin in tokens or form.end in template):
            return form
    return REASONING_FORMATS["none"]


def require_tool_format(name: str | None) -> None:
    """Raise ConfigError for an unknown name."""
    if name is not None:
        _named(name, TOOL_FORMATS, "--tool-parser")


def require_reasoning_format(name: str | None) -> None:
    """Raise ConfigError for an unknown name."""
    if name is not None:
        _named(name, REASONING_FORMATS, "--reasoning-parser")


def _named(name: str, known: dict[str, F], option: str) -> F:
    if name not in known:
        likely = meant(name, known)
        hint = f"did you mean {likely!r}?" if likely else f"known: {', '.join(known)}"
        raise ConfigError(f"{option}: unknown format {name!r:.100}; {hint}")
    return known[name]
