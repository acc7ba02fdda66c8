"""Fit the cost model before the first request, with a few steps of sequences that no client asked for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator

from lamina.errors import CapacityError
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, ReservationRequest, ScheduledStep, Sequence
from lamina.front.team import StepResult
from lamina.wire.requests import Request, Sampling

log = logging.getLogger("lamina.front")

LIMIT_S = 2.0
GROWTH = 4
"""The factor by which rounds grow, and so the factor by which they take longer at most."""
ANSWER_TOKENS = 4
"""The tokens that each sequence generates: the first comes from its prompt, each of the others from a decode step."""


async def fit(
    scheduler: Scheduler,
    run: Callable[[int, int, ScheduledStep], Awaitable[StepResult]],
    reserve: Callable[[ReservationRequest], Awaitable[int]],
    release: Callable[[int], None],
    clock: Callable[[], float],
    *,
    slots: int,
    most_rows: int,
    most_tokens: int,
    limit_s: float = LIMIT_S,
) -> None:
    """Let ``scheduler``, which has no requests yet, make steps one at a time, and tell its cost model what they took.

    ``run`` takes a step through the slices, given its slot and its number; ``reserve`` reserves space on the memory
    nodes, and ``release`` frees all space of a sequence.

    Rounds grow up to ``most_rows`` sequences, and up to prompts of ``most_tokens`` tokens, as long as the next one is
    expected to end within ``limit_s`` seconds of ``clock``. A round that takes longer ends with its present step. A
    round with a refused reservation is the last. The observations stay in the cost model; the counters of the scheduler
    start at 0 again.
    """
    begun_s = clock()
    longest_s, numbers = 0.0, itertools.count()

    async def answer(sequences: list[Sequence], *, observe: bool) -> bool:
        """Run sequences to their end; return False if a reservation was refused or the time was over."""
        ended = False
        for sequence in sequences:
            scheduler.submit(sequence)
        while scheduler.running or scheduler.waiting:
            if ended:
                for sequence in sequences:
                    scheduler.cancel(sequence)
            for slot in range(slots):
                step = scheduler.next_step(slot)
                if step is None:
                    continue
                _release_all(step.changes, release)
                for request in step.changes.reservations:
                    try:
                        scheduler.confirm(request, await reserve(request))
                    except CapacityError:
                        ended = True
                if step.has_rows:
                    ran, load = await run(slot, next(numbers), step), step.load
                    ended |= clock() - begun_s > limit_s
                    if observe or ended:
                        times = ran.compute_s, ran.attention_s, ran.wire_s, ran.memory_s
                        scheduler.cost.observe(load.rows, load.prompt_tokens, load.context_tokens, *times)
                    _release_all(scheduler.finish(slot, step, ran.tokens).changes, release)
        return not ended

    log.info("event=fitting rows=%d prompt_tokens=%d limit_s=%g", most_rows, most_tokens, limit_s)
    # What runs for the first time takes longer than ever after, so the first round comes twice.
    for i, (rows, prompt_tokens) in enumerate([(1, 1), *_rounds(most_rows, most_tokens)]):
        round_s = clock()
        if not await answer([_sequence(prompt_tokens) for _ in range(rows)], observe=i > 0):
            break
        now_s = clock()
        longest_s = max(longest_s, now_s - round_s) if i else 0.0
        log.info("event=fitted rows=%d prompt_tokens=%d seconds=%.3f", rows, prompt_tokens, now_s - round_s)
        if now_s + GROWTH * longest_s > begun_s + limit_s:
            break
    scheduler.prompt_tokens = scheduler.shared_tokens = 0


def _rounds(most_rows: int, most_tokens: int) -> Iterator[tuple[int, int]]:
    """Return the sequences of each round, and the length of their prompts: many short ones and a single long one in
    turns."""
    yield 1, 1
    size = GROWTH
    while size <= max(most_rows, most_tokens):
        if size <= most_rows:
            yield size, 1
        if size <= most_tokens:
            yield 1, size
        size *= GROWTH


def _sequence(prompt_tokens: int) -> Sequence:
    prompt = [0] * prompt_tokens
    request = Request(prompt, ANSWER_TOKENS, Sampling(seed=0), share_prefix=False)
    return Sequence(request, prompt, ANSWER_TOKENS, stop_tokens=frozenset())


def _release_all(changes: CacheChanges, release: Callable[[int], None]) -> None:
    for id_ in changes.released:
        release(id_)
