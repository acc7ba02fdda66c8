"""The intake is the engine's side on the node's loop: it takes requests in and gives answers out."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple, Protocol, TypeVarTuple

from msgspec.structs import replace

from lamina.errors import CapacityError, LaminaError, NodeError, RequestError, first_error
from lamina.front.constraints import Constraints
from lamina.front.cost import ThroughputEstimate
from lamina.front.engine import Engine, EngineCounters
from lamina.front.meter import RequestMeter
from lamina.front.sequence import CacheChanges, ReservationRequest, Sequence, StepOutcome, Transfer
from lamina.front.space import Space
from lamina.runtime.crossing import Crossing
from lamina.wire.requests import Request, Score

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
        max_waiting: int,
        random: Random,
        constraints: Constraints,
    ) -> None:
        """``name`` is that of the node; ``context`` and ``vocabulary`` bound what a prompt may be.

        The seeds of requests that have none come from ``random``, their compiled constraints from ``constraints``.
        """
        self.draining = False
        self.on_suspect: Callable[[str, str], None] = lambda node, reason: None
        """Is told of nodes with which a step has failed, by name, and why."""
        self.meter = RequestMeter()
        """Counts requests by their ends, and the seconds they take."""
        self._name = name
        self._there = device
        self._context = context
        self._vocabulary = vocabulary
        self._stop_tokens = stop_tokens
        self._max_waiting = max_waiting
        self._random = random
        self._constraints = constraints
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

    async def submit(self, request: Request, prompt: list[int], answer: Answer) -> Sequence:
        """Queue a request with the tokens of its prompt.

        RequestError, CapacityError or NodeError say why it cannot be served; then nothing is queued.
        """
        self._require_serving()
        max_tokens = self._check(request, prompt)
        self.require_place(0)
        arrived_s = self._loop.time()
        # A constrained answer can end in no other way than by the model's end tokens.
        ignores = request.ignore_eos and request.constraint is None
        ends = frozenset(request.stop_token_ids) | (frozenset() if ignores else self._stop_tokens)
        sequence = Sequence(self._with_seed(request), prompt, max_tokens, ends)
        self._coming += 1
        try:
            if request.constraint is not None:
                compiled = await self._constraints.compiled(request.constraint)
                sequence.matcher = compiled.matcher(min_tokens=request.min_tokens)
                sequence.mask = compiled.first_mask(min_tokens=request.min_tokens)
                self._require_serving()
            self._open[sequence] = _Open(answer, arrived_s)
            self._idle.clear()
            await self._there.call(self._engine.submit, sequence, self._retry_after_s())
        except asyncio.CancelledError:
            self.cancel(sequence)
            raise
        except LaminaError:
            self._forget(sequence)
            raise
        finally:
            self._coming -= 1
        return sequence

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

    def require_fit(self, prompt_tokens: int) -> None:
        """Raise RequestError if a prompt of so many tokens leaves no room for an answer."""
        if prompt_tokens >= self._context:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, the context is {self._context} and must leave room for an "
                f"answer; use at most {self._context - 1}"
            )

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; its space is free after the step that it is in. A request that is over is ignored."""
        if own := self._open.pop(sequence, None):
            self.meter.left(sequence, self._loop.time() - own.arrived_s)
            self._there.post(self._engine.cancel, sequence)
            self._note_idle()

    def stop(self, sequence: Sequence) -> End:
        """Forget a request that is not over, as its text has come to its end; return how that came."""
        end = self._open.pop(sequence).end(sequence)._replace(reason="stop", stopped_by=None)
        self._count(sequence, end)
        self._there.post(self._engine.cancel, sequence)
        self._note_idle()
        return end

    def _check(self, request: Request, prompt: list[int]) -> int:
        """Return the most tokens that the answer may have; raise RequestError for what cannot be served."""
        if not prompt:
            raise RequestError("the prompt is empty; expected at least one token")
        self.require_fit(len(prompt))
        if max(prompt) >= self._vocabulary:
            position, token = next((i, t) for i, t in enumerate(prompt) if t >= self._vocabulary)
            raise RequestError(
                f"token {token} at position {position} of the prompt is not in the vocabulary of {self._vocabulary}"
            )
        self._require_known("stop_token_ids", request.stop_token_ids)
        self._require_known("sampling.logit_bias", request.sampling.logit_bias)
        for i, word in enumerate(request.bad_words):
            if isinstance(word, str):
                raise RequestError(f"bad_words[{i}] is the text {word!r}; here only its token ids are understood")
            self._require_known(f"bad_words[{i}]", word)
        left, max_tokens = self._context - len(prompt), request.max_tokens
        if max_tokens is not None and max_tokens > left:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the context of {self._context}; "
                f"ask for at most {left}"
            )
        most = max_tokens or left
        if request.min_tokens > most:
            raise RequestError(
                f"min_tokens is {request.min_tokens}, but the answer can have {most} tokens at most; ask for {most} or "
                "fewer"
            )
        return most

    def _require_known(self, field: str, tokens: Iterable[int]) -> None:
        """Raise RequestError for a token that the vocabulary lacks."""
        for token in tokens:
            if token >= self._vocabulary:
                raise RequestError(
                    f"{field} has token {token}, which is not in the vocabulary; expected less than {self._vocabulary}"
                )

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
        now_s = self._loop.time()
        for sequence, scores in outcome.prompt_scores:
            if own := self._open.get(sequence):
                self._tell(sequence, own.answer.prompt_scored, scores)
        for sequence, token, score in outcome.tokens:
            if own := self._open.get(sequence):
                if math.isnan(own.first_s):
                    own.first_s = now_s
                    self.meter.first_token(sequence, now_s - own.arrived_s)
                else:
                    self.meter.inter_token_latency.observe(now_s - own.last_s)
                own.last_s = now_s
                self._tell(sequence, own.answer.token, token, score)
        if outcome.finished:
            self._estimate.note_ended(now_s, len(outcome.finished))
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
            self.meter.broken_off(sequence, error, self._loop.time() - own.arrived_s)
            own.answer.failed(error)

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

    def _with_seed(self, request: Request) -> Request:
        """Return the request with a seed: its own, else a random one, which a greedy answer does not need."""
        if request.sampling.seed is not None:
            return request
        seed = self._random.getrandbits(63) if request.sampling.temperature else 0
        return replace(request, sampling=replace(request.sampling, seed=seed))

    def _retry_after_s(self) -> float:
        return self._estimate.retry_after_s(self.counters.waiting)

    def _forget(self, sequence: Sequence) -> None:
        self._open.pop(sequence, None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._open:
            self._estimate.note_idle()
            self._idle.set()

    def _tell_all(self, error: BaseException) -> LaminaError:
        assert isinstance(error, LaminaError)
        self._failure = error
        log.error("event=failed requests=%d reason=%r", len(self._open), str(error))
        for sequence, own in list(self._open.items()):
            self.meter.broken_off(sequence, error, self._loop.time() - own.arrived_s)
            own.answer.failed(error)
        self._open.clear()
        self._idle.set()
        return error
