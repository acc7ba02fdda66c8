"""Answers on their way to clients, which may lose their links and come back for the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol, cast

from msgspec.structs import replace

from lamina.errors import LaminaError, NodeError
from lamina.front.answer import AnswerText
from lamina.front.encoder import Encoded
from lamina.front.intake import End, Intake
from lamina.front.journal import JournalEntry
from lamina.front.sequence import Sequence
from lamina.model.tokenizer import Tokenizer
from lamina.wire.codec import Message
from lamina.wire.requests import ChatForm, Failed, Finished, Piece, PromptScored, Rendered, Request, Score

log = logging.getLogger("lamina.front")

SCORES = 1 << 10
"""The most scores of a prompt in one message, which may have some hundreds of bytes each."""


class Outlet(Protocol):
    """Sends answers to one client; `lamina.front.session.ClientSession` does."""

    def has_news(self, answer: ClientAnswer) -> None:
        """Send what is new of an answer soon, together with what the step that runs now brings for the others."""

    def flush(self) -> None:
        """Send what is new."""

    def send(self, message: Message) -> None:
        """Send a message."""

    def let_go(self, answer: ClientAnswer) -> None:
        """Forget an answer, as its client has come back on another link."""


class ClientAnswer:
    """One answer, from the moment in which its request is taken until its client has all of it.

    It keeps what it is given, so that its client can have the rest on another link. Its ``outlet`` sends it.
    """

    def __init__(self, id_: int, ticket: str = "", outlet: Outlet | None = None) -> None:
        self.id = id_
        """The client's number for it."""
        self.ticket = ticket
        self.outlet = outlet
        """None while the client is gone."""
        self.is_live = outlet is not None
        """Whether the outlet sends what is new. It does not yet while the client catches up."""
        self.is_told = False
        """Whether the outlet has sent the end."""
        self.work: Sequence | asyncio.Task[None] | None = None
        """What the engine knows the request by; before it does, the task that submits it."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends it, if its client has not been heard of until then."""
        self._request: Request | None = None
        self._form: ChatForm | None = None
        self._tokens: list[int] = []
        self._scores: list[Score] = []
        self._prompt_scores: list[Score] = []
        self._end: End | Failed | None = None
        self._tokenizer: Tokenizer
        self._intake: Intake
        self._text: AnswerText
        self._given = 0
        """The number of tokens of which the text has been made."""
        self._seen = 0
        """The number of tokens that the client has from an earlier link."""
        self._scores_given = 0

    @property
    def name(self) -> str:
        """Return how logs call the request."""
        return "" if self._request is None else self._request.name

    @property
    def is_over(self) -> bool:
        """Return whether nothing more will come of it."""
        return self._end is not None

    @property
    def is_refused(self) -> bool:
        """Return whether it has failed before anything came of it, so that its client may as well ask again."""
        return isinstance(self._end, Failed) and not (self._tokens or self._prompt_scores)

    def begin(self, request: Request, form: ChatForm | None, tokenizer: Tokenizer, intake: Intake) -> None:
        """The request has been encoded."""
        self._request, self._form, self._tokenizer, self._intake = request, form, tokenizer, intake
        self._start_text()
        if form is not None and self.is_live and self.outlet is not None:
            self.outlet.send(self._rendered(form))

    def restore(self, entry: JournalEntry) -> None:
        """Take what an earlier front has kept."""
        self._tokens, self._scores = list(entry.tokens), list(entry.scores)
        self._prompt_scores = list(entry.prompt_scores)
        match entry.end:
            case None:
                pass
            case ended if ended.failure is not None:
                self._end = ended.failure
            case ended:
                self._end = End.restored(entry.beginning, ended)

    # -- for the outlet

    def rewind(self, seen: int, prompt_scores: int) -> list[Message]:
        """Begin anew for a client that has so many tokens, and scores of its prompt. Returns what it is told first."""
        self._seen, self._given, self._scores_given, self.is_told = seen, 0, prompt_scores, False
        if self._request is None:
            return []
        self._start_text()
        return [self._rendered(self._form)] if self._form is not None else []

    @property
    def has_more(self) -> bool:
        """Return whether `take` would bring anything."""
        return self._given < len(self._tokens) or (self._end is not None and not self.is_told)

    def scores(self) -> list[Message]:
        """Return the scores of the prompt that are new."""
        new = self._prompt_scores[self._scores_given :]
        self._scores_given += len(new)
        return [PromptScored(id=self.id, scores=new[i : i + SCORES]) for i in range(0, len(new), SCORES)]

    def take(self, pieces: list[Piece], most: int | None = None) -> Finished | Failed | None:
        """Add what is new to ``pieces``, of at most so many tokens, and return how the answer ended, if it is over."""
        tokens, scores, text = self._tokens, self._scores, self._text if self._request is not None else None
        ended = self._end if isinstance(self._end, End) else None
        if text is None:
            return self._failure
        stop = len(tokens) if most is None else min(len(tokens), self._given + most)
        for number in range(self._given, stop):
            last = ended if number == len(tokens) - 1 else None
            piece = text.piece(tokens[number], scores[number] if scores else None, last)
            if number >= self._seen:
                pieces.append(piece)
            if text.found is not None:
                self._given = len(tokens)
                self._end = ended = ended or self._stop()
                return text.finished(ended)
        self._given = stop
        if stop < len(tokens):
            return None
        return text.finished(ended) if ended is not None else self._failure

    # -- see `lamina.front.intake.Answer`

    def token(self, token: int, score: Score | None = None) -> None:
        self._tokens.append(token)
        if score is not None:
            self._scores.append(score)
        self._note()

    def prompt_scored(self, scores: list[Score]) -> None:
        self._prompt_scores += scores
        if self.is_live and self.outlet is not None:
            for message in self.scores():
                self.outlet.send(message)

    def finished(self, end: End) -> None:
        self._end = end
        self._note()

    def failed(self, error: LaminaError) -> None:
        self._end = Failed.of(error)
        self._note()
        if self.outlet is not None:
            self.outlet.flush()  # the node may be about to end

    # -- inside

    @property
    def _failure(self) -> Failed | None:
        """The error with which it ended, as it is told to the client."""
        return replace(self._end, id=self.id) if isinstance(self._end, Failed) else None

    def _start_text(self) -> None:
        assert self._request is not None
        prompt = cast("list[int]", self._request.prompt)
        self._text = AnswerText(self.id, self._request, prompt, self._tokenizer)

    def _rendered(self, form: ChatForm) -> Rendered:
        assert self._request is not None
        return Rendered(id=self.id, prompt_tokens=len(self._request.prompt), form=form)

    def _note(self) -> None:
        if self.is_live and self.outlet is not None:
            self.outlet.has_news(self)

    def _stop(self) -> End:
        """Have the engine forget the request, as its text has come to its end; return how that came."""
        if isinstance(self.work, Sequence):
            return self._intake.stop(self.work)
        if isinstance(self.work, asyncio.Task):
            self.work.cancel()
        return End("stop")  # so early that nobody here knows more


class AnswerKeeper:
    """Has requests submitted, and keeps their answers for ``lease_s`` seconds for clients that are gone.

    It belongs to the node's loop. ``name`` is that of the node.
    """

    def __init__(self, name: str, lease_s: float) -> None:
        self.ready = asyncio.Event()
        """Set when all is here that an earlier front has kept."""
        self._name = name
        self._lease_s = lease_s
        self._kept: dict[str, ClientAnswer] = {}
        """By ticket, the answers that a client can come back for."""
        self._intake: Intake
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, intake: Intake, tokenizer: Tokenizer, entries: Iterable[JournalEntry] = ()) -> None:
        """Serve from now on, and go on with what an earlier front has kept, in its order."""
        self._intake = intake
        for entry in entries:
            answer = ClientAnswer(0, entry.ticket)
            answer.begin(entry.request, entry.form, tokenizer, intake)
            answer.restore(entry)
            self._kept[entry.ticket] = answer
            if entry.end is None:
                answer.work = self.start(self._restore(answer, entry))
            self.left(answer)
        self.ready.set()

    def knows(self, ticket: str) -> bool:
        """Return whether a request has this ticket already."""
        return ticket in self._kept

    def begin(
        self, answer: ClientAnswer, request: Request, tokenizer: Tokenizer, encoding: asyncio.Task[Encoded] | None
    ) -> None:
        """Submit a request, which is being encoded if the engine needs any of its texts as tokens."""
        if answer.ticket and self._lease_s:
            self._kept[answer.ticket] = answer
        answer.work = self.start(self._submit(answer, request, tokenizer, encoding))

    def claim(self, ticket: str, outlet: Outlet) -> ClientAnswer | None:
        """Return the answer that a client has come back for, which gets nothing of it on any other link from now on."""
        answer = self._kept.get(ticket)
        if answer is None:
            return None
        if answer.outlet is not None:
            answer.outlet.let_go(answer)
        answer.outlet, answer.is_live = outlet, False
        self._stop_timer(answer)
        self._intake.meter.resumed += 1
        return answer

    def left(self, answer: ClientAnswer) -> None:
        """The client of an answer is gone. Unless it comes back in time, or without a ticket, the request is over."""
        answer.outlet, answer.is_live = None, False
        if self.keeps(answer):
            self._start_timer(answer)
        else:
            self.forget(answer)

    def told(self, answer: ClientAnswer) -> None:
        """The end of an answer has been sent, but perhaps not received."""
        answer.is_told = True
        if self.keeps(answer) and not answer.is_refused:
            self._start_timer(answer)
        else:
            self.forget(answer)

    def keeps(self, answer: ClientAnswer) -> bool:
        """Return whether an answer is kept until its client wants nothing more of it."""
        return self._kept.get(answer.ticket) is answer

    def forget(self, answer: ClientAnswer) -> None:
        """Nothing more is wanted of an answer: have the engine forget its request, wherever it is."""
        self._stop_timer(answer)
        if answer.outlet is not None:
            answer.outlet.let_go(answer)
        if self.keeps(answer):
            del self._kept[answer.ticket]
        match answer.work:
            case Sequence() as sequence:
                self._intake.cancel(sequence)
            case asyncio.Task() as submitting:
                submitting.cancel()
        if answer.ticket:
            self._intake.drop(answer.ticket)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that has to do with answers, until `close` at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """The node ends: wait for nothing and nobody any more."""
        for task in list(self._tasks):
            task.cancel()
        for answer in self._kept.values():
            self._stop_timer(answer)

    # -- inside

    async def _submit(
        self, answer: ClientAnswer, request: Request, tokenizer: Tokenizer, encoding: asyncio.Task[Encoded] | None
    ) -> None:
        intake = self._intake
        try:
            form = None
            if encoding is not None:
                request, form = await encoding
            answer.begin(request, form, tokenizer, intake)
            prompt = cast("list[int]", request.prompt)
            answer.work = await intake.submit(request, prompt, answer, ticket=answer.ticket, form=form)
        except LaminaError as e:
            self._refuse(answer, e, request.name)
        except Exception as e:
            self._refuse(answer, self.unexpected(answer, e), request.name)

    async def _restore(self, answer: ClientAnswer, entry: JournalEntry) -> None:
        try:
            answer.work = await self._intake.restore(entry, answer)
        except LaminaError as e:
            self._refuse(answer, e, entry.request.name)
        except Exception as e:
            self._refuse(answer, self.unexpected(answer, e), entry.request.name)

    def _refuse(self, answer: ClientAnswer, error: LaminaError, name: str) -> None:
        self._intake.meter.unanswered(error, name)
        answer.failed(error)

    def unexpected(self, answer: ClientAnswer, error: Exception) -> NodeError:
        """Return the error for trouble with one answer that nobody expected."""
        log.error("event=answer_failed request=%d", answer.id, exc_info=error)
        return NodeError.failed("compute", self._name, error)

    def _start_timer(self, answer: ClientAnswer) -> None:
        self._stop_timer(answer)
        answer.timer = asyncio.get_running_loop().call_later(self._lease_s, self._expire, answer)

    def _stop_timer(self, answer: ClientAnswer) -> None:
        if answer.timer is not None:
            answer.timer.cancel()
            answer.timer = None

    def _expire(self, answer: ClientAnswer) -> None:
        if not answer.is_over:
            log.info("event=client_gone request=%r seconds=%g", answer.name, self._lease_s)
        self.forget(answer)
