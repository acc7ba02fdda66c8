"""The engine of a compute node: takes requests, keeps every batch going, hands out tokens."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Coroutine
from collections.abc import Sequence as Listed
from typing import Any, Protocol

from msgspec.structs import replace

from lamina.compute.shard import RemoteShard
from lamina.errors import CapacityError, LaminaError, NodeError, RequestError, first_error
from lamina.front.cost import ThroughputEstimate
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, ReservationRequest, ScheduledStep, Sequence, StepOutcome
from lamina.front.space import reserve
from lamina.front.team import Ran, Team
from lamina.wire.requests import Request

log = logging.getLogger("lamina.front")


class Answer(Protocol):
    """Who asked: is called on the loop with every token and then once with the end."""

    def token(self, token: int) -> None: ...

    def finished(self, reason: str) -> None: ...

    def failed(self, error: LaminaError) -> None: ...


class Engine:
    """Continuous batching over the compute nodes of one model and the memory nodes that attend for it.

    Batches are driven on the device's loop, so that from the last operation of a step to the first of the next there is
    no way through another thread. Requests come, and tokens and messages go, on the node's own: what they need of the
    scheduler is short, and under a lock.
    """

    def __init__(
        self,
        name: str,
        team: Team,
        shards: Listed[RemoteShard],
        scheduler: Scheduler,
        *,
        batches: int,
        context: int,
        vocabulary: int,
        stop_tokens: frozenset[int],
    ) -> None:
        self._name = name
        self._team = team
        self._device = team.runner.device
        self._shards = shards
        self.scheduler = scheduler
        self._batches = batches
        self._context = context
        self._vocabulary = vocabulary
        self._stop_tokens = stop_tokens
        self._answers: dict[Sequence, Answer] = {}
        self._throughput = ThroughputEstimate()
        self._lock = threading.Lock()
        """Of the scheduler."""
        self._work = [asyncio.Event() for _ in range(batches)]
        """By slot, on the device's loop."""
        self._news: asyncio.Queue[CacheChanges | StepOutcome] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: LaminaError | None = None
        self._draining = False
        self.steps = 0
        self.tokens = 0

    @property
    def running(self) -> int:
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def free_blocks(self) -> int:
        return self.scheduler.free_blocks

    def submit(self, request: Request, prompt_tokens: list[int], answer: Answer) -> Sequence:
        """Queue a request with this prompt. RequestError or CapacityError say why it cannot be served."""
        if self._failure:
            raise self._failure
        if self._draining:
            raise NodeError(f"compute node {self._name} is draining and takes no new requests", node=self._name)
        if not prompt_tokens:
            raise RequestError("the prompt is empty; expected at least one token")
        for position, token in enumerate(prompt_tokens):
            if token >= self._vocabulary:
                raise RequestError(
                    f"token {token} at position {position} of the prompt is not in the vocabulary of {self._vocabulary}"
                )
        tokens, room = len(prompt_tokens), self._context - len(prompt_tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {tokens} tokens, the context is {self._context} and must leave room for an answer; "
                f"use at most {self._context - 1}"
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise RequestError(
                f"{tokens} prompt tokens and max_tokens {request.max_tokens} exceed the context of {self._context}; "
                f"ask for at most {room}"
            )
        sequence = Sequence(_with_seed(request), prompt_tokens, request.max_tokens or room, self._stop_tokens)
        with self._lock:
            self.scheduler.submit(sequence, retry_after_s=self._throughput.retry_after_s(self.waiting))
        self._answers[sequence] = answer
        self._idle.clear()
        self._wake()
        return sequence

    def require_place(self, coming: int) -> None:
        """CapacityError if one more request, besides so many that are about to be queued, would be refused."""
        self.scheduler.require_place(coming, retry_after_s=self._throughput.retry_after_s(self.waiting))

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; its space is free after the step that it is in. Nothing for one that is over."""
        if self._answers.pop(sequence, None) is not None:
            with self._lock:
                self.scheduler.cancel(sequence)
            self._note_idle()
            self._wake()  # whoever waited behind it may be next

    async def run(self) -> None:
        """Serve until cancelled, or until this node or another one fails: then all are told, and NodeError raised."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for slot in range(self._batches):
                    tasks.create_task(self._on_device(self._drive(slot, loop)))
                for shard in self._shards:
                    tasks.create_task(self._on_device(shard.run()))
                    tasks.create_task(shard.watch())
                for peer in self._team.peers:
                    tasks.create_task(peer.watch())
                tasks.create_task(self._pass_on())
        except* LaminaError as group:
            raise self._fail(first_error(group)) from group
        except* Exception as group:
            error = first_error(group)
            log.exception("event=internal_error")
            raise self._fail(NodeError(f"compute node {self._name} failed: {error!r}", node=self._name)) from group

    async def drain(self) -> None:
        """Take no more requests and wait until those that there are have been answered."""
        self._draining = True
        await self._idle.wait()

    async def _on_device(self, work: Coroutine[Any, Any, None]) -> None:
        await self._device.start(work)

    async def _drive(self, slot: int, home: asyncio.AbstractEventLoop) -> None:
        """Step after step of one batch, on the device's loop; ``home`` is told what comes of them."""
        work = self._work[slot]
        number = 0
        while True:
            while (step := self._next_step(slot)) is None:
                work.clear()
                await work.wait()
            if step.changes:
                home.call_soon_threadsafe(self._news.put_nowait, step.changes)
            if step.changes.released or step.moved:
                self._set_all()
            if not step.has_rows:
                continue
            ran = await self._team.run(slot, number, step)
            number += 1
            outcome = self._finish(slot, step, ran)
            home.call_soon_threadsafe(self._news.put_nowait, outcome)
            if outcome.changes.released:
                self._set_all()  # space has come free, perhaps for a request that another slot can admit

    def _next_step(self, slot: int) -> ScheduledStep | None:
        with self._lock:
            return self.scheduler.next_step(slot)

    def _finish(self, slot: int, step: ScheduledStep, ran: Ran) -> StepOutcome:
        self.steps += 1
        load = step.load
        with self._lock:
            self.scheduler.cost.observe(
                load.rows, load.prompt_tokens, load.context_tokens, ran.compute_s, ran.attention_s, ran.wire_s
            )
            return self.scheduler.finish(slot, step, ran.tokens)

    async def _pass_on(self) -> None:
        """Tell memory nodes and those who asked what came of steps, in their order."""
        while True:
            news = await self._news.get()
            if isinstance(news, StepOutcome):
                self._answer(news)
            changes = news.changes if isinstance(news, StepOutcome) else news
            self._tell(changes)
            for request in changes.reservations:
                self._tasks.create_task(self._reserve(request))
            self._note_idle()

    def _tell(self, changes: CacheChanges) -> None:
        """Pass on to the memory nodes what the scheduler decided."""
        for publication in changes.published:
            for member in publication.placement.members:
                keys = publication.placement.keys_on(member, publication.keys, self.scheduler.block_tokens)
                if keys:
                    self._shards[member].publish(publication.id, keys)
        self._team.forget(changes.released)
        for id_ in changes.released:
            for shard in self._shards:
                shard.release(id_)

    async def _reserve(self, request: ReservationRequest) -> None:
        """Have every memory node set space aside. Where one refuses, that request alone fails."""
        try:
            shared = await reserve(self._shards, request, self.scheduler.block_tokens)
        except CapacityError as e:
            if request.is_current:
                self._refuse(request.sequence, e)
        else:
            with self._lock:
                self.scheduler.confirm(request, shared)
            self._wake()

    def _refuse(self, sequence: Sequence, error: CapacityError) -> None:
        """A memory node has no space for a request, though the scheduler thought so."""
        log.warning("event=refused sequence=%d reason=%r", sequence.id, str(error))
        answer = self._answers.get(sequence)
        self.cancel(sequence)
        if answer:
            answer.failed(error)

    def _answer(self, outcome: StepOutcome) -> None:
        self.tokens += len(outcome.tokens)
        for sequence, token in outcome.tokens:
            if answer := self._answers.get(sequence):
                try:
                    answer.token(token)
                except Exception as e:  # one answer's trouble is nobody else's
                    log.exception("event=answer_failed sequence=%d", sequence.id)
                    self.cancel(sequence)
                    answer.failed(NodeError(f"compute node {self._name} failed: {e!r}", node=self._name))
        if outcome.finished:
            self._throughput.note_ended(asyncio.get_running_loop().time(), len(outcome.finished))
        for sequence in outcome.finished:
            if answer := self._answers.pop(sequence, None):
                answer.finished(sequence.finish_reason or "length")

    def _wake(self) -> None:
        """Have every batch look for something to do."""
        self._device.loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        for event in self._work:
            event.set()

    def _note_idle(self) -> None:
        with self._lock:
            idle = not (self._answers or self.scheduler.running or self.scheduler.waiting)
        if idle:
            self._throughput.note_idle()
            self._idle.set()

    def _fail(self, error: BaseException) -> LaminaError:
        assert isinstance(error, LaminaError)
        self._failure = error
        log.error("event=failed requests=%d reason=%r", len(self._answers), str(error))
        for answer in list(self._answers.values()):
            answer.failed(error)
        self._answers.clear()
        self._idle.set()
        return error


def _with_seed(request: Request) -> Request:
    """The request with a seed: its own, else a random one, which a greedy answer does not need."""
    if request.sampling.seed is not None:
        return request
    seed = secrets.randbits(63) if request.sampling.temperature else 0
    return replace(request, sampling=replace(request.sampling, seed=seed))
