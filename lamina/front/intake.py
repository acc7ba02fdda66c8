"""The intake is the engine's side on the node's loop: it takes requests in and gives answers out."""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import Literal, Protocol

from msgspec.structs import replace

from lamina.errors import CapacityError, LaminaError, NodeError, RequestError, first_error
from lamina.front.cost import ThroughputEstimate
from lamina.front.engine import Engine, EngineCounters
from lamina.front.sequence import CacheChanges, Ended, ReservationRequest, Sequence, StepOutcome
from lamina.front.space import Space
from lamina.runtime.crossing import Crossing
from lamina.wire.requests import Request, Score

log = logging.getLogger("lamina.front")


class Answer(Protocol):
    """Receives every token of one request, and then its end once, on the node's loop."""

    def token(self, token: int, score: Score | None = None) -> None:
        """Take one more token."""

    def prompt_scored(self, scores: list[Score]) -> None:
        """Take the scores of the next tokens of the prompt, from its second token on, before any token."""

    def finished(self, end: Ended) -> None:
        """The request is over."""

    def failed(self, error: LaminaError) -> None:
        """The request has failed with this error."""


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
    ) -> None:
        """``name`` is that of the node; ``context`` and ``vocabulary`` bound what a prompt may be.

        The seeds of requests that have none come from ``random``.
        """
        self.draining = False
        self._name = name
        self._there = device
        self._context = context
        self._vocabulary = vocabulary
        self._stop_tokens = stop_tokens
        self._max_waiting = max_waiting
        self._random = random
        self._engine: Engine
        self._space: Space
        self._answers: dict[Sequence, Answer] = {}
        self._estimate = ThroughputEstimate()
        self._coming = 0
        """The number of requests that are on their way to the engine."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: LaminaError | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

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
        if self._failure:
            raise self._failure
        if self.draining:
            raise NodeError(f"compute node {self._name} is draining and takes no new requests", node=self._name)
        max_tokens = self._check(prompt, request.max_tokens)
        self.require_place(0)
        sequence = Sequence(self._with_seed(request), prompt, max_tokens, self._stop_tokens)
        self._answers[sequence] = answer
        self._idle.clear()
        self._coming += 1
        try:
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
        if self._answers.pop(sequence, None) is not None:
            self._there.post(self._engine.cancel, sequence)
            self._note_idle()

    def _check(self, prompt: list[int], max_tokens: int | None) -> int:
        """Return the most tokens that the answer may have; raise RequestError for a prompt that cannot be served."""
        if not prompt:
            raise RequestError("the prompt is empty; expected at least one token")
        self.require_fit(len(prompt))
        if max(prompt) >= self._vocabulary:
            position, token = next((i, t) for i, t in enumerate(prompt) if t >= self._vocabulary)
            raise RequestError(
                f"token {token} at position {position} of the prompt is not in the vocabulary of {self._vocabulary}"
            )
        left = self._context - len(prompt)
        if max_tokens is not None and max_tokens > left:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the context of {self._context}; "
                f"ask for at most {left}"
            )
        return max_tokens or left

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
        self._space.apply(changes)

    def answer(self, outcome: StepOutcome) -> None:
        """See `lamina.front.engine.Desk`."""
        self._space.apply(outcome.changes)
        for sequence, token in outcome.tokens:
            if answer := self._answers.get(sequence):
                try:
                    answer.token(token)
                except Exception as e:  # trouble with one answer must not harm the others
                    log.exception("event=answer_failed sequence=%d", sequence.id)
                    self.cancel(sequence)
                    answer.failed(NodeError.failed("compute", self._name, e))
        if outcome.finished:
            self._estimate.note_ended(asyncio.get_running_loop().time(), len(outcome.finished))
        for sequence in outcome.finished:
            if answer := self._answers.pop(sequence, None):
                try:
                    reason: Literal["stop", "length"] = "stop" if sequence.finish_reason == "stop" else "length"
                    answer.finished(Ended(reason, sequence.output[-1] if reason == "stop" else None))
                except Exception as e:
                    log.exception("event=answer_failed sequence=%d", sequence.id)
                    answer.failed(NodeError.failed("compute", self._name, e))
        for sequence in outcome.broken:
            log.error("event=logits_not_finite sequence=%d position=%d", sequence.arrival, sequence.context)
            if answer := self._answers.pop(sequence, None):
                answer.failed(
                    NodeError(
                        f"the model's logits for position {sequence.context} are not finite numbers, so no token can "
                        "be chosen; check the weights, or set model.dtype to a type with a larger range",
                        node=self._name,
                    )
                )
        self._note_idle()

    def refuse(self, sequence: Sequence, error: CapacityError) -> None:
        """See `lamina.front.engine.Desk`."""
        if answer := self._answers.pop(sequence, None):
            answer.failed(error)
            self._note_idle()

    def reserved(self, request: ReservationRequest, answer: int | CapacityError) -> None:
        """Pass the answer to a reservation on to the engine."""
        self._there.post(self._engine.reserved, request, answer)

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
        self._answers.pop(sequence, None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._answers:
            self._estimate.note_idle()
            self._idle.set()

    def _tell_all(self, error: BaseException) -> LaminaError:
        assert isinstance(error, LaminaError)
        self._failure = error
        log.error("event=failed requests=%d reason=%r", len(self._answers), str(error))
        for answer in list(self._answers.values()):
            answer.failed(error)
        self._answers.clear()
        self._idle.set()
        return error
