"""The intake is the engine's side on the node's loop: it takes requests in and gives answers out."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal, NamedTuple, Protocol, TypeVarTuple

from msgspec.structs import replace

from lamina.errors import CapacityError, LaminaError, NodeError, RequestError, first_error
from lamina.front.constraints import Constraints
from lamina.front.cost import ThroughputEstimate
from lamina.front.engine import Engine, EngineCounters
from lamina.front.journal import Beginning, EndRecord, JournalEntry, RequestJournal, StepRecord
from lamina.front.limits import RequestLimits
from lamina.front.meter import RequestMeter
from lamina.front.sequence import CacheChanges, ReservationRequest, Sequence, StepOutcome, Transfer
from lamina.front.space import Space
from lamina.runtime.crossing import Crossing
from lamina.wire.requests import ChatForm, Failed, Request, Score

Ts = TypeVarTuple("Ts")

log = logging.getLogger("lamina.front")


class End(NamedTuple):
    """Says how an answer ended. `lamina.wire.requests.Finished` has the same times, in seconds."""

    reason: Literal["stop", "length"]
    stopped_by: int | None = None
    """The token that ended it, which is the last one of the answer."""
    shared_tokens: int = 0
    """How many tokens of the prompt were found on the memory nodes."""
    queued_s: float = 0.0
    prompt_s: float = 0.0
    answer_s: float = 0.0

    @classmethod
    def restored(cls, beginning: Beginning | None, end: EndRecord) -> End:
        """Return the end of an answer that an earlier front has kept."""
        reason: Literal["stop", "length"] = "stop" if end.reason == "stop" else "length"
        begun = beginning or Beginning(0, 0.0, 0.0)
        return cls(reason, end.stopped_by, begun.shared_tokens, begun.queued_s, begun.prompt_s, end.answer_s)


class Answer(Protocol):
    """Receives what is computed for one request, and then its end once, on the node's loop."""

    def token(self, token: int, score: Score | None = None) -> None:
        """Take one more token, with its score if the request wants it."""

    def prompt_scored(self, scores: list[Score]) -> None:
        """Take the scores of the next tokens of the prompt, from the second one on, before any token; only if the
        request wants them."""

    def finished(self, end: End) -> None:
        """The request is over."""

    def failed(self, error: LaminaError) -> None:
        """The request has failed with this error."""


@dataclass(slots=True)
class _Open:
    """A request that is not over: where its answer goes, and when it got how far, by the loop's clock."""

    answer: Answer
    arrived_s: float
    admitted_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan
    entry: JournalEntry | None = None
    """Keeps it, if a client may come back for it."""

    def restored(self, beginning: Beginning | None) -> None:
        """Have begun in an earlier front, if it has."""
        if beginning is not None:
            self.first_s = self.last_s = self.arrived_s
            self.admitted_s = self.first_s - beginning.prompt_s
            self.arrived_s = self.admitted_s - beginning.queued_s

    def beginning(self, sequence: Sequence) -> Beginning:
        """Describe how it got its first token."""
        return Beginning(sequence.found, self.admitted_s - self.arrived_s, self.first_s - self.admitted_s)

    def end(self, sequence: Sequence) -> End:
        return End(
            sequence.finish_reason or "length",
            sequence.stopped_by,
            sequence.found,
            self.admitted_s - self.arrived_s,
            self.first_s - self.admitted_s,
            self.last_s - self.first_s,
        )


class Intake:
    """Passes requests on to the engine, and passes its results on to clients and memory nodes; on the node's loop.

    A sequence belongs to the engine from `submit` on; here it is only the key of its answer, until it is over.
    """

    def __init__(
        self,
        name: str,
        device: Crossing,
        *,
        context: int,
        vocabulary: int,
        stop_tokens: frozenset[int],
        repetition_penalty: float,
        max_waiting: int,
        random: Random,
        constraints: Constraints,
        journal: RequestJournal | None = None,
    ) -> None:
        """``name`` is that of the node; ``context`` and ``vocabulary`` bound what a prompt may be.

        The seeds of requests that have none come from ``random``, their compiled constraints from ``constraints``. The
        ``journal`` keeps those that have a ticket.
        """
        self.draining = False
        self.on_suspect: Callable[[str, str], None] = lambda node, reason: None
        """Is told of nodes with which a step has failed, by name, and why."""
        self.limits = RequestLimits(context, vocabulary)
        self.meter = RequestMeter()
        """Counts requests by their ends, and the seconds they take."""
        self._name = name
        self._there = device
        self._stop_tokens = stop_tokens
        self._repetition_penalty = repetition_penalty
        self._max_waiting = max_waiting
        self._random = random
        self._constraints = constraints
        self._journal = journal
        self._engine: Engine
        self._space: Space
        self._open: dict[Sequence, _Open] = {}
        self._estimate = ThroughputEstimate()
        self._coming = 0
        """The number of requests that are on their way to the engine."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: LaminaError | None = None
        self._failed: asyncio.Future[None] = self._loop.create_future()

    def open(self, engine: Engine, space: Space) -> None:
        """Take requests for ``engine`` from now on; memory nodes are told through ``space``."""
        self._engine, self._space = engine, space

    @property
    def counters(self) -> EngineCounters:
        """Return the engine's counters."""
        return self._engine.counters

    # -- from clients

    async def submit(
        self,
        request: Request,
        prompt: list[int],
        answer: Answer,
        *,
        ticket: str = "",
        form: ChatForm | None = None,
    ) -> Sequence:
        """Queue a request with the tokens of its prompt.

        By its ``ticket``, if it has one, and with its ``form`` it is kept in the journal. RequestError, CapacityError,
        StorageError or NodeError say why it cannot be served; then nothing is queued, nor kept.
        """
        self._require_serving()
        max_tokens = self.limits.max_tokens(request, prompt)
        self.require_place(0)
        own = _Open(answer, self._loop.time())
        sequence = self._sequence(self._filled_in(request), prompt, max_tokens)
        try:
            await self._follow_constraint(sequence)
            if ticket and self._journal is not None:
                own.entry = self._journal.accept(ticket, sequence.request, form)
            await self._enter(sequence, own)
        except LaminaError:
            self.drop(ticket)
            raise
        return sequence

    async def restore(self, entry: JournalEntry, answer: Answer) -> Sequence:
        """Go on with a request that an earlier front has kept, however many wait.

        Raises the errors of `submit`, if it cannot be served any more.
        """
        own = _Open(answer, self._loop.time(), entry=entry)
        own.restored(entry.beginning)
        try:
            self._require_serving()
            sequence = self._sequence(entry.request, entry.prompt, self.limits.max_tokens(entry.request, entry.prompt))
            sequence.output, sequence.scored = list(entry.tokens), len(entry.prompt_scores)
            if entry.beginning is not None:
                sequence.admitted, sequence.found = True, entry.beginning.shared_tokens
            if sequence.finish_reason is None:
                await self._follow_constraint(sequence)
                await self._enter(sequence, own, restored=True)
            else:  # the end is all that is missing
                end = own.end(sequence)
                self._note_end(own, EndRecord(end.reason, end.stopped_by))
                answer.finished(end)
        except LaminaError as e:
            self._note_end(own, EndRecord("failed", failure=Failed.of(e)))
            raise
        return sequence

    def _sequence(self, request: Request, prompt: list[int], max_tokens: int) -> Sequence:
        # A constrained answer can end in no other way than by the model's end tokens.
        ignores = request.ignore_eos and request.constraint is None
        ends = frozenset(request.stop_token_ids) | (frozenset() if ignores else self._stop_tokens)
        return Sequence(request, prompt, max_tokens, ends)

    async def _follow_constraint(self, sequence: Sequence) -> None:
        """Have a sequence follow its constraint, if it has one, behind the output that it has."""
        request = sequence.request
        if request.constraint is not None:
            self._coming += 1
            try:
                sequence.matcher, sequence.mask = await self._constraints.begin(
                    request.constraint, sequence.output, min_tokens=request.min_tokens
                )
            finally:
                self._coming -= 1
            self._require_serving()

    async def _enter(self, sequence: Sequence, own: _Open, *, restored: bool = False) -> None:
        """Hand a sequence over to the engine, which refuses it if too many wait, unless it is ``restored``."""
        self._open[sequence] = own
        self._idle.clear()
        self._coming += 1
        try:
            await self._there.call(self._engine.submit, sequence, self._retry_after_s(), restored)
        except asyncio.CancelledError:
            self.cancel(sequence)
            raise
        except LaminaError:
            self._open.pop(sequence, None)
            self._note_idle()
            raise
        finally:
            self._coming -= 1

    def _require_serving(self) -> None:
        if self._failure:
            raise self._failure
        if self.draining:
            raise NodeError(f"compute node {self._name} is draining and takes no new requests", node=self._name)

    def require_place(self, encoding: int) -> None:
        """Raise CapacityError if too many requests wait already, counting ``encoding`` whose prompts are still being
        encoded.

        The engine decides exactly; this check also bounds the requests that have not reached it yet.
        """
        if self._coming >= self._max_waiting or (encoding and self.counters.waiting + encoding >= self._max_waiting):
            retry_after_s = self._retry_after_s()
            raise CapacityError(
                f"{max(self.counters.waiting + encoding, self._coming)} requests are waiting already, the limit is "
                f"{self._max_waiting}; retry in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; its space is free after the step that it is in. A request that is over is ignored."""
        if own := self._open.pop(sequence, None):
            self.meter.left(sequence, self._loop.time() - own.arrived_s)
            self._there.post(self._engine.cancel, sequence)
            if own.entry is not None:
                self.drop(own.entry.ticket)
            self._note_idle()

    def drop(self, ticket: str) -> None:
        """Keep a request no longer, if it is kept."""
        if self._journal is not None:
            self._journal.drop(ticket)

    def stop(self, sequence: Sequence) -> End:
        """Forget a request that is not over, as its text has come to its end; return how that came."""
        own = self._open.pop(sequence)
        end = own.end(sequence)._replace(reason="stop", stopped_by=None)
        self._note_end(own, EndRecord("stop", answer_s=end.answer_s))
        self._count(sequence, end)
        self._there.post(self._engine.cancel, sequence)
        self._note_idle()
        return end

    # -- serving

    async def run(self) -> None:
        """Serve until cancelled, or until the engine or another node fails; then tell all clients, and raise the
        error."""
        engine = self._there.start(self._engine.run())
        try:
            await asyncio.wait((engine, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                engine.result()
            self._failed.result()
        except* LaminaError as group:
            raise self._tell_all(first_error(group)) from group
        except* Exception as group:
            log.exception("event=internal_error")
            raise self._tell_all(NodeError.failed("compute", self._name, first_error(group))) from group
        finally:
            engine.cancel()
            await asyncio.wait((engine,))
            if not engine.cancelled():
                engine.exception()  # it may have failed of the same loss

    def fail(self, error: NodeError) -> None:
        """Another node is lost: `run` tells all clients and raises ``error``."""
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # `run` may not have begun

    async def drain(self) -> None:
        """Take no more requests, and wait until all earlier ones have been answered."""
        self.draining = True
        await self._idle.wait()

    # -- from the engine

    def apply(self, changes: CacheChanges) -> None:
        """See `lamina.front.engine.Desk`."""
        now_s = self._loop.time()
        for request in changes.reservations:
            if request.is_new and (own := self._open.get(request.sequence)) and math.isnan(own.admitted_s):
                own.admitted_s = now_s
                self.meter.queue_time.observe(now_s - own.arrived_s)
        self._space.apply(changes)

    def answer(self, outcome: StepOutcome) -> None:
        """See `lamina.front.engine.Desk`."""
        self._space.apply(outcome.changes)
        step = self._noted(outcome)
        if step and self._journal is not None:
            self._journal.write(step, partial(self._give, outcome))
        else:
            self._give(outcome)

    def _noted(self, outcome: StepOutcome) -> StepRecord:
        """Note when tokens came; return what has to be kept before clients get it."""
        now_s, step = self._loop.time(), StepRecord()
        for sequence, scores in outcome.prompt_scores:
            if (own := self._open.get(sequence)) and own.entry is not None:
                step.prompt_scored(own.entry, scores)
        for sequence, token, score in outcome.tokens:
            if own := self._open.get(sequence):
                if math.isnan(own.first_s):
                    own.first_s = now_s
                    self.meter.first_token(sequence, now_s - own.arrived_s)
                    if own.entry is not None:
                        step.begin(own.entry, own.beginning(sequence))
                else:
                    self.meter.inter_token_latency.observe(now_s - own.last_s)
                own.last_s = now_s
                if own.entry is not None:
                    step.token(own.entry, token, score)
        for sequence in outcome.finished:
            if (own := self._open.get(sequence)) and own.entry is not None:
                end = own.end(sequence)
                step.end(own.entry, EndRecord(end.reason, end.stopped_by, end.answer_s))
        return step

    def _give(self, outcome: StepOutcome) -> None:
        """Give the clients what a step brought."""
        for sequence, scores in outcome.prompt_scores:
            if own := self._open.get(sequence):
                self._tell(sequence, own.answer.prompt_scored, scores)
        for sequence, token, score in outcome.tokens:
            if own := self._open.get(sequence):
                self._tell(sequence, own.answer.token, token, score)
        if outcome.finished:
            self._estimate.note_ended(self._loop.time(), len(outcome.finished))
        for sequence in outcome.finished:
            if own := self._open.get(sequence):
                end = own.end(sequence)
                self._tell(sequence, own.answer.finished, end)
                if self._open.pop(sequence, None):
                    self._count(sequence, end)
        for sequence in outcome.broken:
            log.error(
                "event=logits_not_finite sequence=%d position=%d request=%r",
                sequence.arrival,
                sequence.context,
                sequence.request.name,
            )
            self._fail(
                sequence,
                NodeError(
                    f"the model's logits for position {sequence.context} are not finite numbers, so no token can "
                    "be chosen; check the weights, or set model.dtype to a type with a larger range",
                    node=self._name,
                ),
            )
        for sequence in outcome.stuck:
            self._fail(
                sequence,
                RequestError(
                    f"no token is allowed at position {sequence.context}, after {len(sequence.output)} tokens of the "
                    "answer: constraint, bad_words and min_tokens together leave none; allow more"
                ),
            )
        self._note_idle()

    def _tell(self, sequence: Sequence, take: Callable[[*Ts], None], *values: *Ts) -> None:
        """Give an answer what came for it. Trouble with it must not harm the others."""
        try:
            take(*values)
        except Exception as e:
            log.exception("event=answer_failed sequence=%d request=%r", sequence.id, sequence.request.name)
            self._there.post(self._engine.cancel, sequence)
            self._fail(sequence, NodeError.failed("compute", self._name, e))

    def _fail(self, sequence: Sequence, error: LaminaError) -> None:
        if own := self._open.pop(sequence, None):
            self._break_off(sequence, own, error)

    def _break_off(self, sequence: Sequence, own: _Open, error: LaminaError) -> None:
        self.meter.broken_off(sequence, error, self._loop.time() - own.arrived_s)
        self._note_end(own, EndRecord("failed", failure=Failed.of(error)))
        own.answer.failed(error)

    def _note_end(self, own: _Open, end: EndRecord) -> None:
        if own.entry is not None and self._journal is not None:
            self._journal.end(own.entry, end)

    def _count(self, sequence: Sequence, end: End) -> None:
        self.meter.answered(sequence, end.reason, end.queued_s, end.prompt_s, end.answer_s)

    def suspect(self, node: str, reason: str) -> None:
        """See `lamina.front.engine.Desk`."""
        self.on_suspect(node, reason)

    def refuse(self, sequence: Sequence, error: LaminaError) -> None:
        """See `lamina.front.engine.Desk`."""
        self._fail(sequence, error)
        self._note_idle()

    def reserved(self, request: ReservationRequest, answer: int | CapacityError) -> None:
        """Pass the answer to a reservation on to the engine."""
        self._there.post(self._engine.reserved, request, answer)

    def transferred(self, transfer: Transfer, error: LaminaError | None) -> None:
        """Pass the end of a transfer on to the engine."""
        self._there.post(self._engine.transferred, transfer, error)

    # -- inside

    def _filled_in(self, request: Request) -> Request:
        """Return the request with a repetition penalty, by default that of the checkpoint, and a seed: its own, else a
        random one, which a greedy answer does not need."""
        if request.sampling.repetition_penalty is None and self._repetition_penalty != 1:
            sampling = replace(request.sampling, repetition_penalty=self._repetition_penalty)
            request = replace(request, sampling=sampling)
        if request.sampling.seed is not None:
            return request
        seed = self._random.getrandbits(63) if request.sampling.temperature else 0
        return replace(request, sampling=replace(request.sampling, seed=seed))

    def _retry_after_s(self) -> float:
        return self._estimate.retry_after_s(self.counters.waiting)

    def _note_idle(self) -> None:
        if not self._open:
            self._estimate.note_idle()
            self._idle.set()

    def _tell_all(self, error: BaseException) -> LaminaError:
        assert isinstance(error, LaminaError)
        self._failure = error
        log.error("event=failed requests=%d reason=%r", len(self._open), str(error))
        for sequence, own in list(self._open.items()):
            self._break_off(sequence, own, error)
        self._open.clear()
        self._idle.set()
        return error
