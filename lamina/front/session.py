"""Serve the clients of the front: take their requests in, and give text and tokens out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from msgspec.structs import replace

from lamina.errors import LaminaError, ProtocolError, RequestError
from lamina.front.answers import AnswerKeeper, ClientAnswer
from lamina.front.encoder import Encoded, Encoder, texts_of
from lamina.front.intake import Intake
from lamina.runtime.workers import BackgroundWorkers
from lamina.transport import Link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode
from lamina.wire.questions import send_unless_gone
from lamina.wire.requests import (
    Cancel,
    Failed,
    Finished,
    FromClient,
    Generate,
    Generated,
    Piece,
    Prompt,
    PromptPart,
    Request,
    Resume,
    Resumed,
    length_of,
)

log = logging.getLogger("lamina.front")

CATCH_UP = 256
"""So many tokens of an answer are sent at a time to a client that has come back, about a millisecond's work."""
UNREAD_BYTES = 1 << 20
"""Such a client gets more when it has not more than this unread, which is looked at so often:"""
LOOK_S = 0.01


class ClientSession:
    """Serves one client on its link, on the node's loop. When the link is lost, `AnswerKeeper` has its requests.

    ``intake`` and ``encoder`` return those of the front. While there are none, they raise the error that the client
    gets. Texts are encoded in ``workers``.
    """

    def __init__(
        self,
        link: Link,
        workers: BackgroundWorkers,
        answers: AnswerKeeper,
        intake: Callable[[], Intake],
        encoder: Callable[[], Encoder],
        status: Callable[[], Status],
    ) -> None:
        self._link = link
        self._workers = workers
        self._kept = answers
        self._intake = intake
        self._encoder = encoder
        self._status = status
        self._answers: dict[int, ClientAnswer] = {}
        """The answers of which the client does not have all, by its ids."""
        self._news: list[ClientAnswer] = []
        """Those that have something to send. One may be there several times."""
        self._coming: _ComingPrompt | None = None
        """The request of which parts are still to come."""
        self._resuming: dict[int, asyncio.Task[None]] = {}
        """What sends the client what it has missed of answers, by its ids."""
        self._catching_up = asyncio.Lock()

    def on_message(self, plain: dict[str, Any]) -> None:
        """Take in a message of the client."""
        try:
            message = decode(plain, FromClient)
        except ProtocolError as e:
            id_ = plain.get("id")
            if not isinstance(id_, int) or id_ < 0:
                raise
            if self._is_coming(id_):
                self._coming = None
            self._refuse(id_, RequestError(str(e)))  # one bad request harms no other
            return
        match message:
            case Generate(id=id_) | PromptPart(id=id_):
                try:
                    self._take(message)
                except LaminaError as e:
                    if self._is_coming(id_):
                        self._coming = None
                    self._refuse(id_, e, message.request.name if isinstance(message, Generate) else "")
            case Cancel(id=id_):
                self._cancel(id_)
            case Resume(id=id_):
                if self._is_used(id_):
                    self._refuse(id_, RequestError(f"request id {id_} is in use on this connection"))
                else:
                    self._resuming[id_] = self._kept.start(self._resume(message))
            case AskStatus():
                self.send(self._status())

    def on_lost(self, error: LaminaError) -> None:
        """The link has ended, or the node is not the front any more."""
        if under_way := sum(not answer.is_over for answer in self._answers.values()):
            log.info("event=client_lost requests=%d reason=%r", under_way, str(error))
        self._leave()

    def _take(self, message: Generate | PromptPart) -> None:
        """Take in a request, or a part of its prompt, and begin with the request if it is complete."""
        if isinstance(message, PromptPart):
            coming = self._coming
            if coming is not None and coming.id == message.id and coming.add(message.part):
                self._coming = None
                self._begin(coming.whole())
            return
        id_, request, length = message.id, message.request, message.length
        if self._is_used(id_):
            raise RequestError(f"request id {id_} is in use on this connection")
        if message.ticket and self._kept.knows(message.ticket):
            raise RequestError("ticket: it is that of another request; draw a new one for each")
        if length is None:
            self._begin(message)
            return
        self._require_fit(request, length)
        if self._coming is not None:
            raise RequestError(f"the prompt of request {self._coming.id} is still coming on this connection; wait")
        coming = _ComingPrompt(message, length)
        if coming.add(request.prompt):
            self._begin(message)
        else:
            self._coming = coming

    def _is_used(self, id_: int) -> bool:
        return id_ in self._answers or id_ in self._resuming or self._is_coming(id_)

    def _is_coming(self, id_: int) -> bool:
        return self._coming is not None and self._coming.id == id_

    def _require_fit(self, request: Request, length: int) -> None:
        """Raise the error for a request whose prompt, of this length, is too long, or that cannot be served, before it
        is kept or encoded."""
        intake, encoder = self._intake(), self._encoder()
        tokenizer = encoder.tokenizer
        if isinstance(request.prompt, str):
            encoder.require_fit(request, length)
        else:
            intake.limits.require_fit(length)
        if request.stop:
            tokenizer.require_text("stop")
        if request.show_special:
            tokenizer.require_text("show_special")
        if any(isinstance(word, str) for word in request.bad_words):
            tokenizer.require_text("bad_words")
        if texts_of(request) or request.chat:
            intake.require_place(tokenizer.at_work)

    def _begin(self, asked: Generate) -> None:
        """Encode the texts of a request, if it has any that the engine needs as tokens, and have it submitted."""
        request = asked.request
        self._require_fit(request, length_of(request.prompt))
        encoder = self._encoder()
        tokenizer = encoder.tokenizer
        encoding: asyncio.Task[Encoded] | None = None
        if texts_of(request) or request.chat:
            work = self._workers.run(encoder.encode, request, long=encoder.takes_long(request))
            encoding = asyncio.get_running_loop().create_task(work)
            tokenizer.at_work += 1
            encoding.add_done_callback(tokenizer.done)
        answer = self._answers[asked.id] = ClientAnswer(asked.id, asked.ticket, self)
        self._kept.begin(answer, request, tokenizer, encoding)

    def _cancel(self, id_: int) -> None:
        if self._is_coming(id_):
            self._coming = None
        if id_ in self._answers:
            self._kept.forget(self._answers[id_])
        self._resuming.pop(id_, None)  # its task will find out

    def _leave(self) -> None:
        """The client is gone, but may come back for its answers on another link."""
        for answer in list(self._answers.values()):
            self._kept.left(answer)
        self._answers.clear()
        for resuming in self._resuming.values():
            resuming.cancel()

    def _refuse(self, id_: int, error: LaminaError, name: str = "") -> None:
        """Say why a request is not even begun."""
        with suppress(LaminaError):  # a node that is starting counts nothing
            self._intake().meter.unanswered(error, name)
        self.send(Failed.of(error, id_))

    # -- clients that come back

    async def _resume(self, asked: Resume) -> None:
        """Go on with an answer, once all is here that an earlier front has kept."""
        await self._kept.ready.wait()
        answer = self._kept.claim(asked.ticket, self)
        try:
            if answer is not None:
                async with self._catching_up:
                    await self._catch_up(answer, asked)
            elif asked.id in self._resuming:
                self.send(Resumed(id=asked.id, known=False))
        finally:
            if answer is not None and answer.outlet is self and not answer.is_live:
                self._kept.left(answer)  # the link is lost
            self._resuming.pop(asked.id, None)

    async def _catch_up(self, answer: ClientAnswer, asked: Resume) -> None:
        """Send what a client has missed, piece by piece, so that neither the node nor the link has too much at once."""
        link, is_first = self._link, True
        while answer.outlet is self:  # else the client has come back once more
            if asked.id not in self._resuming:
                self._kept.forget(answer)  # the client has cancelled it meanwhile
                return
            if is_first:
                is_first, answer.id = False, asked.id
                for message in (Resumed(id=asked.id), *answer.rewind(asked.tokens, asked.prompt_scores)):
                    self.send(message)
            for message in answer.scores():
                self.send(message)
            pieces: list[Piece] = []
            end = answer.take(pieces, CATCH_UP)
            if pieces:
                self._send_pieces(pieces)
            if link.state.closed:
                return
            if end is not None or not answer.has_more:
                del self._resuming[asked.id]
                self._answers[asked.id], answer.is_live = answer, True
                if end is not None:
                    self._end(answer, end)
                return
            await asyncio.sleep(0)
            while link.state.pending_bytes > UNREAD_BYTES and not link.state.closed:  # noqa: ASYNC110 # no event tells
                await asyncio.sleep(LOOK_S)

    def let_go(self, answer: ClientAnswer) -> None:
        """See `lamina.front.answers.Outlet`."""
        if self._answers.get(answer.id) is answer:
            del self._answers[answer.id]

    # -- what is sent

    def has_news(self, answer: ClientAnswer) -> None:
        """See `lamina.front.answers.Outlet`."""
        if not self._news:
            asyncio.get_running_loop().call_soon(self.flush)
        self._news.append(answer)

    def flush(self) -> None:
        """See `lamina.front.answers.Outlet`."""
        news, self._news = self._news, []
        pieces: list[Piece] = []
        ends: list[tuple[ClientAnswer, Finished | Failed]] = []
        for answer in news:
            if self._answers.get(answer.id) is not answer or answer.is_told:
                continue  # it was cancelled, or is over
            try:
                end = answer.take(pieces)
            except Exception as e:  # trouble with one answer must not harm the others
                end = Failed.of(self._kept.unexpected(answer, e), answer.id)
                self._kept.forget(answer)
            if end is not None:
                answer.is_told = True
                ends.append((answer, end))
        if pieces:
            self._send_pieces(pieces)
        for answer, end in ends:
            self._end(answer, end)

    def _end(self, answer: ClientAnswer, end: Finished | Failed) -> None:
        """Send how an answer ended."""
        self.send(end)
        self._kept.told(answer)

    def _send_pieces(self, pieces: list[Piece]) -> None:
        """Send pieces in one message, or in several where it would be too long."""
        try:
            self.send(Generated(pieces=pieces))
        except ProtocolError:
            if len(pieces) == 1:
                raise
            half = len(pieces) // 2
            self._send_pieces(pieces[:half])
            self._send_pieces(pieces[half:])

    def send(self, message: Message) -> None:
        """See `lamina.front.answers.Outlet`."""
        if not send_unless_gone(self._link, message):
            self._leave()


@dataclass
class _ComingPrompt:
    """Collects the parts of a request's prompt, up to the length that it was announced to have."""

    asked: Generate
    length: int
    parts: list[Prompt] = field(default_factory=list)
    arrived: int = 0

    @property
    def id(self) -> int:
        return self.asked.id

    def add(self, part: Prompt) -> bool:
        """Take the next part; return whether it is the last. Raises RequestError for one that does not fit."""
        if type(part) is not type(self.asked.request.prompt):
            raise RequestError("the parts of a prompt must be all text, or all token ids")
        self.parts.append(part)
        self.arrived += length_of(part)
        if self.arrived > self.length:
            raise RequestError(f"the prompt is longer than announced: {self.arrived} instead of {self.length}")
        return self.arrived == self.length

    def whole(self) -> Generate:
        """Return the request with its whole prompt."""
        request = self.asked.request
        prompt: Prompt
        if isinstance(request.prompt, str):
            prompt = "".join(cast("list[str]", self.parts))
        else:
            prompt = [token for part in cast("list[list[int]]", self.parts) for token in part]
        return replace(self.asked, request=replace(request, prompt=prompt))
