"""POST /v1/chat/completions: answer messages, as the chat template of the checkpoint puts them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lamina.chat.events import (
    CallArguments,
    CallBegin,
    ChatAnswer,
    ChatEvent,
    ContentDelta,
    ReasoningDelta,
)
from lamina.chat.reader import AnswerReader
from lamina.chat.request import ChatFields, ChatRequest, read_chat
from lamina.chat.template import ChatPrompt
from lamina.errors import HttpError
from lamina.serve.completions import prompt_logprobs
from lamina.serve.exchange import Exchange
from lamina.serve.gathering import NewTokens
from lamina.serve.generate import Fields, Job, run
from lamina.serve.parameters import Body, constraint_of, convert, parse, request_of, with_seed
from lamina.serve.service import Model, Service
from lamina.wire.codec import Count
from lamina.wire.requests import Constraint, Finished, Request, Score, Top

_CHAT_KEYS = ChatFields.__struct_encode_fields__


class ChatBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a chat, beside those that make its prompt."""

    max_completion_tokens: Count | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool = False
    """Give the logprob of each token."""
    top_logprobs: Top | None = None
    """Give the logprobs of so many of the likeliest tokens, too."""


@dataclass(frozen=True)
class PreparedChat:
    """A chat that was understood, with its prompt."""

    name: str
    """What the answer calls the model."""
    model: Model
    body: ChatBody
    asked: ChatRequest
    prompt: ChatPrompt
    request: Request


async def prepare_chat(service: Service, plain: dict[str, Any]) -> PreparedChat:
    """Read the body of a chat completion, and render its prompt. HttpError or RequestError say what is wrong."""
    of_chat = {key: plain.pop(key) for key in _CHAT_KEYS if key in plain}
    body = parse(plain, ChatBody, beside=_CHAT_KEYS)
    asked = read_chat(convert(of_chat, ChatFields))
    name = service.require_name(body.model)
    model = service.model
    _check(body)
    prompt, constraint = await service.workers.run(_prepare, model, asked, constraint_of(body), long=True)
    request = request_of(
        body,
        prompt.ids,
        model.recommended,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        logprobs=None if not body.logprobs else body.top_logprobs or 0,
        prompt_logprobs=body.prompt_logprobs,
        constraint=constraint,
        show_special=model.chat.show_special or not body.skip_special_tokens,
    )
    return PreparedChat(name, model, body, asked, prompt, request)


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer a chat."""
    chat = await prepare_chat(service, await exchange.json())
    body, prompt = chat.body, chat.prompt
    choices = [_MessageAnswer(chat.model, body, chat.asked, prompt) for _ in range(body.n)]
    job = Job(
        object="chat.completion",
        chunk_object="chat.completion.chunk",
        id=f"chatcmpl-{exchange.id}",
        model=chat.name,
        requests=[with_seed(chat.request, body.seed, answer) for answer in range(body.n)],
        choices=choices,
        prompt_tokens=len(prompt.ids),
        prompts=1,
        stream=body.stream,
        options=body.stream_options,
        extra=lambda: _of_prompt(chat.model, body, prompt.ids, choices[0].prompt_scores),
    )
    await run(service, exchange, job)


def _check(body: ChatBody) -> None:
    """Raise HttpError for parameters that do not fit together."""
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise HttpError("max_tokens and max_completion_tokens mean the same, but differ", param="max_tokens")
    if 0 in both:
        raise HttpError("max_tokens: expected int >= 1, got 0", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise HttpError("top_logprobs: needs logprobs: true", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise HttpError("prompt_logprobs: not possible in a stream", param="prompt_logprobs")
    if body.add_special_tokens:
        raise HttpError(
            "add_special_tokens: the chat template writes the special tokens itself; leave it out",
            param="add_special_tokens",
        )


def _prepare(model: Model, asked: ChatRequest, answer: Constraint | None) -> tuple[ChatPrompt, Constraint | None]:
    """Return the prompt, and what the answer has to be. Both take some time."""
    prompt = model.chat.prompt(asked)
    return prompt, model.chat.constraint(asked, prompt, answer)


def _of_prompt(model: Model, body: ChatBody, ids: list[int], scores: list[Score]) -> Fields:
    fields: Fields = {}
    if body.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_logprobs(model, ids, scores, body.prompt_logprobs)
    if body.return_token_ids:
        fields["prompt_token_ids"] = ids
    return fields


class _MessageAnswer:
    """One answer: see `lamina.serve.generate.AnswerForm`."""

    def __init__(self, model: Model, body: ChatBody, asked: ChatRequest, prompt: ChatPrompt) -> None:
        self.prompt_scores: list[Score] = []
        self._model = model
        self._body = body
        self._prompt = prompt
        self._shows_reasoning = asked.include_reasoning
        self._reader: AnswerReader = model.chat.reader(asked, prompt)
        self._calls = 0
        # for whole answers
        self._answer = ChatAnswer()
        self._ids: list[int] = []
        self._scores: list[Any] = []

    @property
    def over(self) -> bool:
        return self._reader.over

    # -- streams

    def opening(self) -> Iterable[Fields]:
        fields: Fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = self._prompt.ids
        yield fields

    def part(self, part: NewTokens) -> Iterable[Fields]:
        deltas = self._deltas(self._reader.push(part.text))
        fields: Fields = {"delta": deltas[0] if deltas else {}, "logprobs": None, "finish_reason": None}
        if part.scores is not None:
            fields["logprobs"] = {"content": self._logprobs(part), "refusal": None}
        if self._body.return_token_ids:
            fields["token_ids"] = part.tokens
        yield fields
        for delta in deltas[1:]:
            yield {"delta": delta, "logprobs": None, "finish_reason": None}

    def end(self, finished: Finished) -> Iterable[Fields]:
        for delta in self._deltas([*self._reader.push(finished.text), *self._reader.finish()]):
            yield {"delta": delta, "logprobs": None, "finish_reason": None}
        yield {
            "delta": {},
            "logprobs": None,
            "finish_reason": self._reason(finished),
            "stop_reason": finished.stopped_by,
        }

    def _deltas(self, events: Iterable[ChatEvent]) -> list[Fields]:
        """Return what events are in a stream."""
        deltas: list[Fields] = []
        for event in events:
            if isinstance(event, ContentDelta):
                deltas.append({"content": event.text})
            elif isinstance(event, ReasoningDelta):
                if self._shows_reasoning:
                    deltas.append({"reasoning_content": event.text})
            elif isinstance(event, CallBegin):
                self._calls += 1
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.id, "type": "function", "function": function}
                deltas.append({"tool_calls": [call]})
            elif isinstance(event, CallArguments):
                deltas.append({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})
        return deltas

    # -- whole answers

    def take(self, part: NewTokens) -> None:
        self._answer.take(self._reader.push(part.text))
        self._ids += part.tokens
        if part.scores is not None:
            self._scores += self._logprobs(part)

    def whole(self, finished: Finished) -> Fields:
        answer = self._answer.take([*self._reader.push(finished.text), *self._reader.finish()])
        calls = answer.calls
        self._calls = len(calls)
        message: Fields = {
            "role": "assistant",
            "content": answer.content if answer.content or not calls else None,
            "refusal": None,
        }
        if answer.reasoning and self._shows_reasoning:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        fields: Fields = {
            "message": message,
            "logprobs": {"content": self._scores, "refusal": None} if self._body.logprobs else None,
            "finish_reason": self._reason(finished),
            "stop_reason": finished.stopped_by,
        }
        if self._body.return_token_ids:
            fields["token_ids"] = self._ids
        return fields

    # -- parts

    def _reason(self, finished: Finished) -> str:
        return "tool_calls" if self._calls and finished.reason == "stop" else finished.reason

    def _logprobs(self, part: NewTokens) -> list[Any]:
        top, texts = self._body.top_logprobs or 0, self._model.texts
        return [texts.chat(token, score, top) for token, score in zip(part.tokens, part.scores or (), strict=False)]
