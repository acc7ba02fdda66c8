"""Answers in the form of /v1/responses: one object, or the events of a stream that build it up."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lamina.chat.events import CallArguments, CallBegin, CallEnd, ChatEvent, ContentDelta, ReasoningDelta
from lamina.serve.response_request import ResponseRequest

Event = dict[str, Any]


@dataclass(frozen=True)
class ResponseUsage:
    """How many tokens a request took."""

    prompt: int
    answer: int
    shared: int = 0
    """Of the prompt: found on the memory nodes."""
    reasoning: int = 0
    """Of the answer."""

    def plain(self) -> dict[str, Any]:
        """Return it in the form of the API."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.shared, "cache_write_tokens": 0},
            "output_tokens": self.answer,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.answer,
        }


class ResponseWriter:
    """Builds up one response.

    Its events are the ones of a stream, in order; who does not stream takes `response` at the end.
    """

    def __init__(
        self, request: ResponseRequest, *, id_: str, created: int, model: str, temperature: float, top_p: float
    ) -> None:
        """``temperature`` and ``top_p`` are those that are used, whether asked for or not."""
        fields = request.fields
        text = {"format": {"type": "text"}} if fields.text is None else _plain_text(fields.text)
        self.response: dict[str, Any] = {
            "id": id_,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "metadata": fields.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": fields.prompt_cache_key,
            "reasoning": {
                "effort": fields.reasoning.effort if fields.reasoning else None,
                "summary": fields.reasoning.summary if fields.reasoning else None,
            },
            "safety_identifier": fields.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": temperature,
            "text": text,
            "tool_choice": fields.tool_choice if fields.tool_choice is not None else "auto",
            "tools": [{"strict": None, "parameters": None, **tool} for tool in fields.tools or ()],
            "top_logprobs": fields.top_logprobs or 0,
            "top_p": top_p,
            "truncation": "disabled",
            "usage": None,
            "user": fields.user,
        }
        self._number = 0
        self._items: list[dict[str, Any]] = self.response["output"]
        self._open: dict[str, Any] | None = None
        """The item to which text is added: the last one, until it is done."""
        self._parts: list[str] = []
        """Its text, of which the item has nothing yet."""

    def begin(self) -> list[Event]:
        """Return the first events."""
        return [self._event(f"response.{name}", response=self._snapshot()) for name in ("created", "in_progress")]

    def push(self, events: Iterable[ChatEvent], logprobs: Iterable[dict[str, Any]] = ()) -> list[Event]:
        """Return the events for what comes next of the answer, with the logprobs of its content, if any."""
        pending = list(logprobs)
        made: list[Event] = []
        for event in events:
            match event:
                case ContentDelta(text):
                    made += self._text(text, pending)
                    pending = []
                case ReasoningDelta(text):
                    made += self._reasoning(text)
                case CallBegin(_, id_, name):
                    call = {"type": "function_call", "id": _new_id("fc"), "call_id": id_, "name": name, "arguments": ""}
                    made += [*self._close(), self._add(call)]
                case CallArguments(_, text):
                    self._parts.append(text)
                    made.append(self._of_item("response.function_call_arguments.delta", delta=text))
                case CallEnd():
                    made += self._close()
        return made

    def finish(self, reason: Literal["stop", "length"], usage: ResponseUsage) -> list[Event]:
        """Return the last events of an answer that is complete, or as long as it may be."""
        complete = reason == "stop"
        made: list[Event] = []
        if complete and all(item["type"] == "reasoning" for item in self._items):
            made += self._text("", [])  # clients expect a message
        made += self._close("completed" if complete else "incomplete")
        self.response["status"] = "completed" if complete else "incomplete"
        if not complete:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = usage.plain()
        return [*made, self._event(f"response.{self.response['status']}", response=self._snapshot())]

    def fail(self, message: str, code: Literal["server_error", "rate_limit_exceeded"] = "server_error") -> list[Event]:
        """Return the last event of an answer that failed."""
        if self._open is not None:
            self._open["status"] = "incomplete"
            self._settle(self._open)
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return [self._event("response.failed", response=self._snapshot())]

    # -- items

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close()
            yield self._add({"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []})
            yield self._add_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        assert self._open is not None
        self._parts.append(text)
        self._open["content"][0]["logprobs"] += logprobs
        if text:
            yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "reasoning":
            yield from self._close()
            yield self._add({"type": "reasoning", "id": _new_id("rs"), "summary": [], "content": []})
            yield self._add_part({"type": "reasoning_text", "text": ""})
        self._parts.append(text)
        yield self._of_item("response.reasoning_text.delta", content_index=0, delta=text)

    def _add(self, item: dict[str, Any]) -> Event:
        item["status"] = "in_progress"
        self._open = item
        self._items.append(item)
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copy(item))

    def _add_part(self, part: dict[str, Any]) -> Event:
        assert self._open is not None
        self._open["content"].append(part)
        return self._of_item("response.content_part.added", content_index=0, part=_copy(part))

    def _close(self, status: str = "completed") -> list[Event]:
        """Return the events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        self._settle(item)
        made = []
        if item["type"] == "function_call":
            made.append(
                self._of_item("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
            )
        else:
            part = item["content"][0]
            if item["type"] == "message":
                text = {"text": part["text"], "logprobs": list(part["logprobs"])}
                made.append(self._of_item("response.output_text.done", content_index=0, **text))
            else:
                made.append(self._of_item("response.reasoning_text.done", content_index=0, text=part["text"]))
            made.append(self._of_item("response.content_part.done", content_index=0, part=_copy(part)))
        made.append(self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item)))
        self._open = None
        return made

    def _settle(self, item: dict[str, Any]) -> None:
        """Put the text of the open item into it."""
        of_text, key = (item, "arguments") if item["type"] == "function_call" else (item["content"][0], "text")
        of_text[key] += "".join(self._parts)
        self._parts.clear()

    # -- events

    def _of_item(self, kind: str, **about: Any) -> Event:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._items) - 1, **about)

    def _event(self, kind: str, **about: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **about}

    def _snapshot(self) -> dict[str, Any]:
        """Return the response as it is now."""
        return {**self.response, "output": [_copy(item) for item in self._items]}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [dict(part) if isinstance(part, dict) else part for part in value] if isinstance(value, list) else value
        for key, value in item.items()
    }


def _plain_text(text: Any) -> dict[str, Any]:
    form = text.format
    plain: dict[str, Any] = {"format": {"type": form.type if form else "text"}}
    if form and form.type == "json_schema":
        about = {"name": form.name or "answer", "schema": form.schema, "strict": form.strict}
        plain["format"] |= about | ({"description": form.description} if form.description else {})
    if text.verbosity:
        plain["verbosity"] = text.verbosity
    return plain


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
