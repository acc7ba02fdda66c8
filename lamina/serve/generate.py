"""Run what an HTTP request asks for, and write it as one answer or as a stream of events.

Completions and chats differ in how an answer looks: see `AnswerForm`. Everything else is here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from lamina.serve.exchange import ClientGoneError, Exchange
from lamina.serve.gathering import Event, Gathering, NewTokens
from lamina.serve.parameters import StreamOptions
from lamina.serve.service import Service
from lamina.wire.requests import Finished, Request, Score

log = logging.getLogger("lamina.serve")

PATIENCE_S = 1.0
"""How long a stream waits for its first token, or for a refusal, before it sends its status."""
PING_S = 5.0
"""A stream without news sends a comment so often, so that nothing on the way takes the connection for dead."""

_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"

Fields = dict[str, Any]
"""The keys of a choice, without its index."""


class AnswerForm(Protocol):
    """One answer, in the form of one endpoint. Either the stream methods are called, or ``take`` and then ``whole``."""

    prompt_scores: list[Score]
    """The scores of the prompt, which are complete when the first token is here."""

    @property
    def over(self) -> bool:
        """Whether it is complete, whatever else the model says."""

    def opening(self) -> Iterable[Fields]:
        """Return what a stream says of it before any token."""

    def part(self, part: NewTokens) -> Iterable[Fields]:
        """Return what a stream says when tokens have come."""

    def end(self, finished: Finished) -> Iterable[Fields]:
        """Return what a stream says at the end of it; the last has the reason."""

    def take(self, part: NewTokens) -> None:
        """Keep tokens for `whole`."""

    def whole(self, finished: Finished) -> Fields:
        """Return all of it."""


@dataclass
class Job:
    """What one HTTP request asks for."""

    object: str
    """What the API calls the answer, such as "text_completion"."""
    chunk_object: str
    id: str
    model: str
    requests: Sequence[Request]
    """One for each choice."""
    choices: Sequence[AnswerForm]
    prompt_tokens: int
    """Of all prompts, each counted once."""
    prompts: int
    stream: bool = False
    options: StreamOptions | None = None
    extra: Callable[[], Fields] = dict
    """Returns more keys of a whole answer, once it is complete."""


class Meter:
    """Counts the tokens of an answer, and their times, also for the metrics of the server."""

    def __init__(self, service: Service, exchange: Exchange, *, prompt_tokens: int, choices: int, prompts: int) -> None:
        """``choices`` is the number of answers to all ``prompts``, and ``prompt_tokens`` counts each of these once."""
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        """The tokens of prompts that were found on the memory nodes."""
        self._metrics = service.metrics
        self._now = asyncio.get_running_loop().time
        self._begun_s = exchange.begun_s
        self._last_s = [0.0] * choices
        """When each choice got its last token."""
        self._per_prompt = choices // prompts
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def count(self, event: Event) -> None:
        """Count what has come."""
        if isinstance(event, NewTokens):
            now_s, last_s = self._now(), self._last_s[event.index]
            if last_s:
                self._metrics.next_token.observe(now_s - last_s)
            else:
                self._metrics.first_token.observe(now_s - self._begun_s)
            self._last_s[event.index] = now_s
            self.completion_tokens += len(event.tokens)
        elif event.index % self._per_prompt == 0:
            self.cached_tokens += event.finished.shared_tokens

    def end(self, *, complete: bool) -> None:
        """Note that the answer is over."""
        self._metrics.generated_tokens.inc(self.completion_tokens)
        if complete:
            self._metrics.whole.observe(self._now() - self._begun_s)

    def usage(self) -> Fields:
        """Return the usage so far, as answers tell it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@asynccontextmanager
async def gathered(
    service: Service, exchange: Exchange, requests: Sequence[Request], meter: Meter
) -> AsyncIterator[Gathering]:
    """Run requests while the client is there, and while the block lasts. Raises what the front says against them."""
    service.require_running()
    complete = False
    with Gathering(service.front.link(), service.front.ids, requests) as gathering:
        service.began(gathering)
        watching = asyncio.create_task(_watch(exchange, gathering))
        try:
            yield gathering
            complete = True
        finally:
            watching.cancel()
            service.ended(gathering)
            meter.end(complete=complete)


async def _watch(exchange: Exchange, gathering: Gathering) -> None:
    """Abort everything as soon as the client is gone."""
    await exchange.gone()
    gathering.stop(ClientGoneError())


async def run(service: Service, exchange: Exchange, job: Job) -> None:
    """Answer a request that generates. Raises what the front says against it, and ClientGoneError."""
    meter = Meter(service, exchange, prompt_tokens=job.prompt_tokens, choices=len(job.choices), prompts=job.prompts)
    async with gathered(service, exchange, job.requests, meter) as gathering:
        await _Writer(exchange, job, gathering, meter).write()


class _Writer:
    """Writes one answer while it comes."""

    def __init__(self, exchange: Exchange, job: Job, gathering: Gathering, meter: Meter) -> None:
        self._exchange = exchange
        self._job = job
        self._gathering = gathering
        self._meter = meter
        for choice, inbox in zip(job.choices, gathering.inboxes, strict=True):
            choice.prompt_scores = inbox.prompt_scores

    async def write(self) -> None:
        """Write the whole answer."""
        await (self._write_stream() if self._job.stream else self._write_whole())

    async def _write_whole(self) -> None:
        job, choices = self._job, self._job.choices
        done: list[Fields | None] = [None] * len(choices)
        while self._gathering.left or self._gathering.has_events:
            for event in await self._gathering.next():
                self._meter.count(event)
                choice = choices[event.index]
                if isinstance(event, NewTokens):
                    choice.take(event)
                    if choice.over:
                        self._gathering.cut(event.index)
                else:
                    done[event.index] = {"index": event.index, **choice.whole(event.finished)}
        answer = {
            "id": job.id,
            "object": job.object,
            "created": int(time.time()),
            "model": job.model,
            "choices": done,
            "usage": self._meter.usage(),
            **job.extra(),
        }
        await self._exchange.reply_json(answer)

    async def _write_stream(self) -> None:
        job, exchange, gathering, meter = self._job, self._exchange, self._gathering, self._meter
        options = job.options or StreamOptions()
        created = int(time.time())
        about = {"id": job.id, "object": job.chunk_object, "created": created, "model": job.model}
        head = b"data: " + msgspec.json.encode(about)[:-1]
        heads = [head + b',"choices":[{"index":%d,' % index for index in range(len(job.choices))]
        encode = msgspec.json.encode

        def chunk(index: int, fields: Fields) -> bytes:
            if options.continuous_usage_stats:
                return heads[index] + encode(fields)[1:] + b'],"usage":' + encode(meter.usage()) + b"}\n\n"
            return heads[index] + encode(fields)[1:] + b"]}\n\n"

        events = await gathering.next(PATIENCE_S)
        await exchange.start_events()
        out = [chunk(index, fields) for index, choice in enumerate(job.choices) for fields in choice.opening()]
        while True:
            for event in events:
                meter.count(event)
                index = event.index
                choice = job.choices[index]
                if isinstance(event, NewTokens):
                    out += [chunk(index, fields) for fields in choice.part(event)]
                    if choice.over:
                        gathering.cut(index)
                else:
                    out += [chunk(index, fields) for fields in choice.end(event.finished)]
            if not gathering.left and not gathering.has_events:
                break
            if out:
                await exchange.write(b"".join(out))
                out = []
            events = await gathering.next(PING_S)
            if not events:
                out.append(_PING)
        if options.include_usage or options.continuous_usage_stats:
            out.append(head + b',"choices":[],"usage":' + encode(meter.usage()) + b"}\n\n")
        out.append(_DONE)
        await exchange.write(b"".join(out))
        await exchange.finish()
