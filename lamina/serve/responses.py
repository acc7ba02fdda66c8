"""POST /v1/responses: chats in the newer form of OpenAI's API, without stored state."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from lamina.chat.reader import AnswerReader
from lamina.serve.chat_completions import PreparedChat, prepare_chat
from lamina.serve.exchange import Exchange
from lamina.serve.gathering import AnswerEnd, Event, Gathering, NewTokens
from lamina.serve.generate import PATIENCE_S, PING_S, UsageMeter, gathered
from lamina.serve.parameters import with_seed
from lamina.serve.response_events import ResponseUsage, ResponseWriter
from lamina.serve.response_request import read_response
from lamina.serve.service import Service

Fields = dict[str, Any]


async def responses(service: Service, exchange: Exchange) -> None:
    """Answer the items of an input."""
    asked = read_response(await exchange.json())
    chat = await prepare_chat(service, dict(asked.chat))
    sampling = chat.request.sampling
    writer = ResponseWriter(
        asked,
        id_=f"resp_{exchange.id}",
        created=int(time.time()),
        model=chat.name,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )
    meter = UsageMeter(service, exchange, prompt_tokens=len(chat.prompt.ids), choices=1, prompts=1)
    request = with_seed(chat.request, chat.body.seed, 0)
    async with gathered(service, exchange, [request], meter) as gathering:
        answer = _ResponseAnswer(chat, gathering, writer, meter)
        if chat.body.stream:
            await _write_stream(exchange, gathering, answer)
            return
        while not answer.is_over:
            answer.take(await gathering.next())
    await exchange.reply_json(writer.response)


async def _write_stream(exchange: Exchange, gathering: Gathering, answer: _ResponseAnswer) -> None:
    events = await gathering.next(PATIENCE_S)
    await exchange.start_events()
    out = _lines(answer.begin())
    while True:
        out += _lines(answer.take(events))
        if answer.is_over:
            break
        if out:
            await exchange.write(out)
            out = b""
        events = await gathering.next(PING_S)
        if not events:
            out = b": ping\n\n"
    await exchange.write(out)
    await exchange.finish()


def _lines(events: Iterable[Fields]) -> bytes:
    """Return events as they are sent."""
    encode = msgspec.json.encode
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), encode(event)) for event in events)


class _ResponseAnswer:
    """Builds up the response of what the front sends."""

    def __init__(self, chat: PreparedChat, gathering: Gathering, writer: ResponseWriter, meter: UsageMeter) -> None:
        self.is_over = False
        self._chat = chat
        self._gathering = gathering
        self._writer = writer
        self._meter = meter
        self._reader: AnswerReader = chat.model.chat.reader(chat.asked, chat.prompt)

    def begin(self) -> list[Fields]:
        """Return the events before any token."""
        return self._writer.begin()

    def take(self, events: Iterable[Event]) -> list[Fields]:
        """Return what these events of the front are in a stream."""
        made: list[Fields] = []
        for event in events:
            self._meter.count(event)
            if isinstance(event, NewTokens):
                made += self._writer.push(self._reader.push(event.text), self._logprobs(event))
                if self._reader.over:
                    self._gathering.cut(event.index)
            else:
                made += self._end(event)
        return made

    def _end(self, event: AnswerEnd) -> list[Fields]:
        finished, meter = event.finished, self._meter
        made = self._writer.push([*self._reader.push(finished.text), *self._reader.finish()])
        usage = ResponseUsage(meter.prompt_tokens, meter.completion_tokens, meter.cached_tokens)
        self.is_over = True
        return [*made, *self._writer.finish(finished.reason, usage)]

    def _logprobs(self, event: NewTokens) -> list[Fields]:
        texts, top = self._chat.model.texts, self._chat.body.top_logprobs or 0
        return [texts.chat(token, score, top) for token, score in zip(event.tokens, event.scores or (), strict=False)]
