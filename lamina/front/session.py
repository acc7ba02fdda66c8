"""Serve the clients of the front: take their requests in, and give text and tokens out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from msgspec.structs import replace

from lamina.errors import LaminaError, NodeError, ProtocolError, RequestError, TransportError
from lamina.front.answer import AnswerText
from lamina.front.encoder import Encoded, Encoder, texts_of
from lamina.front.intake import End, Intake
from lamina.front.sequence import Sequence
from lamina.model.tokenizer import Tokenizer
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
    PromptScored,
    Rendered,
    Request,
    Score,
    length_of,
)

log = logging.getLogger("lamina.front")

SCORES = 1 << 10
"""The most scores of a prompt in one message, which may have some hundreds of bytes each."""


class ClientSession:
    """Serves one client on its link, on the node's loop. When the link ends, its requests are cancelled.

    ``intake`` and ``encoder`` return those of the front. While there are none, they raise the error that the client
    gets. Texts are encoded in ``workers``.
    """

    def __init__(
        self,
        link: Link,
        workers: BackgroundWorkers,
        intake: Callable[[], Intake],
        encoder: Callable[[], Encoder],
        status: Callable[[], Status],
    ) -> None:
        self._link = link
        self._workers = workers
        self._intake = intake
        self._encoder = encoder
        self._status = status
        self._answers: dict[int, _ClientAnswer] = {}
        """The answers to requests that are not over, by the client's id."""
        self._news: list[_ClientAnswer] = []
        """Those that have something to send. One may be there several times."""
        self._coming: _ComingPrompt | None = None
        """The request of which parts are still to come."""

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
            case AskStatus():
                self._send(self._status())

    def on_lost(self, error: TransportError) -> None:
        """The link has ended."""
        if self._answers:
            log.info("event=client_lost requests=%d reason=%r", len(self._answers), str(error))
        self._cancel_all()

    def _take(self, message: Generate | PromptPart) -> None:
        """Take in a request, or a part of its prompt, and begin with the request if it is complete."""
        if isinstance(message, PromptPart):
            coming = self._coming
            if coming is not None and coming.id == message.id and coming.add(message.part):
                self._coming = None
                self._begin(coming.id, coming.whole())
            return
        id_, request, length = message.id, message.request, message.length
        if id_ in self._answers or self._is_coming(id_):
            raise RequestError(f"request id {id_} is in use on this connection")
        if length is None:
            self._begin(id_, request)
            return
        self._require_fit(request, length)
        if self._coming is not None:
            raise RequestError(f"the prompt of request {self._coming.id} is still coming on this connection; wait")
        coming = _ComingPrompt(id_, request, length)
        if coming.add(request.prompt):
            self._begin(id_, request)
        else:
            self._coming = coming

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
            intake.require_fit(length)
        if request.stop:
            tokenizer.require_text("stop")
        if request.show_special:
            tokenizer.require_text("show_special")
        if any(isinstance(word, str) for word in request.bad_words):
            tokenizer.require_text("bad_words")
        if texts_of(request) or request.chat:
            intake.require_place(tokenizer.at_work)

    def _begin(self, id_: int, request: Request) -> None:
        """Encode the texts of a request, if it has any that the engine needs as tokens, and submit it."""
        loop = asyncio.get_running_loop()
        self._require_fit(request, length_of(request.prompt))
        intake, encoder = self._intake(), self._encoder()
        tokenizer = encoder.tokenizer
        encoding: asyncio.Task[Encoded] | None = None
        if texts_of(request) or request.chat:
            work = self._workers.run(encoder.encode, request, long=encoder.takes_long(request))
            encoding = loop.create_task(work)
            tokenizer.at_work += 1
            encoding.add_done_callback(tokenizer.done)
        answer = self._answers[id_] = _ClientAnswer(self, id_)
        answer.work = loop.create_task(self._submit(intake, tokenizer, answer, request, encoding))

    async def _submit(
        self,
        intake: Intake,
        tokenizer: Tokenizer,
        answer: _ClientAnswer,
        request: Request,
        encoding: asyncio.Task[Encoded] | None,
    ) -> None:
        try:
            if encoding is not None:
                request, form = await encoding
                if form is not None:
                    self._send(Rendered(id=answer.id, prompt_tokens=len(request.prompt), form=form))
            prompt = cast("list[int]", request.prompt)
            answer.begin(AnswerText(answer.id, request, prompt, tokenizer))
            answer.work = await intake.submit(request, prompt, answer)
        except LaminaError as e:
            intake.meter.unanswered(e, request.name)
            answer.failed(e)
        except Exception as e:
            error = self._unexpected(answer, e)
            intake.meter.unanswered(error, request.name)
            answer.failed(error)

    def _cancel(self, id_: int) -> None:
        if self._is_coming(id_):
            self._coming = None
        if answer := self._answers.pop(id_, None):
            self._abort(answer)

    def _cancel_all(self) -> None:
        for id_ in list(self._answers):
            self._cancel(id_)

    def _abort(self, answer: _ClientAnswer) -> None:
        """Have the engine forget a request, wherever it is. One that is over is ignored."""
        match answer.work:
            case Sequence() as sequence:
                self._intake().cancel(sequence)
            case asyncio.Task() as submitting:
                submitting.cancel()

    def _refuse(self, id_: int, error: LaminaError, name: str = "") -> None:
        """Say why a request is not even begun."""
        with suppress(LaminaError):  # a node that is starting counts nothing
            self._intake().meter.unanswered(error, name)
        self._send(failed(error, id_))

    # -- what is sent

    def has_news(self, answer: _ClientAnswer) -> None:
        """Send what is new of an answer soon, together with what the step that runs now brings for the others."""
        if not self._news:
            asyncio.get_running_loop().call_soon(self.flush)
        self._news.append(answer)

    def flush(self) -> None:
        """Send what is new."""
        news, self._news = self._news, []
        pieces: list[Piece] = []
        ends: list[Finished | Failed] = []
        for answer in news:
            if self._answers.get(answer.id) is not answer:
                continue  # it was cancelled, or is over
            try:
                end = answer.take(pieces)
            except Exception as e:  # trouble with one answer must not harm the others
                end = failed(self._unexpected(answer, e), answer.id)
                self._abort(answer)
            if end is not None:
                del self._answers[answer.id]
                ends.append(end)
        if pieces:
            self._send_pieces(pieces)
        for end in ends:
            self._send(end)

    def stop(self, answer: _ClientAnswer) -> End:
        """Have the engine forget a request whose text has come to its end, and return how that came."""
        if isinstance(answer.work, Sequence):
            return self._intake().stop(answer.work)
        self._abort(answer)
        return End("stop")  # so early that nobody here knows more

    def send_scores(self, id_: int, scores: list[Score]) -> None:
        """Send the scores of the tokens of a prompt, which come before any token."""
        for start in range(0, len(scores), SCORES):
            self._send(PromptScored(id=id_, scores=scores[start : start + SCORES]))

    def _unexpected(self, answer: _ClientAnswer, error: Exception) -> NodeError:
        log.error("event=answer_failed request=%d", answer.id, exc_info=error)
        return NodeError.failed("compute", self._link.info.local.name, error)

    def _send_pieces(self, pieces: list[Piece]) -> None:
        """Send pieces in one message, or in several where it would be too long."""
        try:
            self._send(Generated(pieces=pieces))
        except ProtocolError:
            if len(pieces) == 1:
                raise
            half = len(pieces) // 2
            self._send_pieces(pieces[:half])
            self._send_pieces(pieces[half:])

    def _send(self, message: Message) -> None:
        if not send_unless_gone(self._link, message):
            self._cancel_all()


@dataclass
class _ComingPrompt:
    """Collects the parts of a request's prompt, up to the length that it was announced to have."""

    id: int
    request: Request
    length: int
    parts: list[Prompt] = field(default_factory=list)
    arrived: int = 0

    def add(self, part: Prompt) -> bool:
        """Take the next part; return whether it is the last. Raises RequestError for one that does not fit."""
        if type(part) is not type(self.request.prompt):
            raise RequestError("the parts of a prompt must be all text, or all token ids")
        self.parts.append(part)
        self.arrived += length_of(part)
        if self.arrived > self.length:
            raise RequestError(f"the prompt is longer than announced: {self.arrived} instead of {self.length}")
        return self.arrived == self.length

    def whole(self) -> Request:
        """Return the request with its whole prompt."""
        if isinstance(self.request.prompt, str):
            return replace(self.request, prompt="".join(cast("list[str]", self.parts)))
        return replace(self.request, prompt=[token for part in cast("list[list[int]]", self.parts) for token in part])


class _ClientAnswer:
    """Collects what is new of one answer until the session sends it."""

    def __init__(self, session: ClientSession, id_: int) -> None:
        self.id = id_
        self.work: Sequence | asyncio.Task[None] | None = None
        """What the engine knows the request by; before it does, the task that submits it."""
        self._session = session
        self._text: AnswerText | None = None
        self._tokens: list[tuple[int, Score | None]] = []
        self._end: End | Failed | None = None

    def begin(self, text: AnswerText) -> None:
        """Make the pieces of tokens by ``text``."""
        self._text = text

    def take(self, pieces: list[Piece]) -> Finished | Failed | None:
        """Add what is new to ``pieces``, and return how the answer ended, if it is over."""
        tokens, self._tokens = self._tokens, []
        end, text = self._end, self._text
        ended = end if isinstance(end, End) else None
        if text is None:
            assert not isinstance(end, End)
            return end
        for number, (token, score) in enumerate(tokens, 1):
            pieces.append(text.piece(token, score, ended if number == len(tokens) else None))
            if text.found is not None:
                return text.finished(ended or self._session.stop(self))
        return text.finished(ended) if ended is not None else cast("Failed | None", end)

    # -- see `lamina.front.intake.Answer`

    def token(self, token: int, score: Score | None = None) -> None:
        self._tokens.append((token, score))
        self._session.has_news(self)

    def prompt_scored(self, scores: list[Score]) -> None:
        self._session.send_scores(self.id, scores)

    def finished(self, end: End) -> None:
        self._end = end
        self._session.has_news(self)

    def failed(self, error: LaminaError) -> None:
        self._end = failed(error, self.id)
        self._session.has_news(self)
        self._session.flush()  # the node may be about to end


def failed(error: LaminaError, id_: int | None = None) -> Failed:
    """Return an error as it travels to a client."""
    return Failed(
        kind=type(error).__name__,
        message=str(error),
        id=id_,
        node=getattr(error, "node", None),
        retry_after_s=getattr(error, "retry_after_s", None),
    )
