"""Fit the cost model before the first request, by a few steps of sequences that nobody asked for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator

from lamina.errors import CapacityError
from lamina.front.scheduler import Ask, Outcome, Scheduler, Sequence, Step
from lamina.front.team import Ran
from lamina.wire.requests import Sampling

log = logging.getLogger("lamina.front")

LIMIT_S = 2.0
GROWTH = 4
"""How many times larger rounds become, and so how many times longer at most."""
ANSWER_TOKENS = 4
"""Of each sequence: the first is its prompt's, the others take a decode step each."""


async def fit(
    scheduler: Scheduler,
    run: Callable[[int, int, Step], Awaitable[Ran]],
    reserve: Callable[[Ask], Awaitable[int]],
    release: Callable[[int], None],
    clock: Callable[[], float],
    *,
    slots: int,
    most_rows: int,
    most_tokens: int,
    limit_s: float = LIMIT_S,
) -> None:
    """Have ``scheduler``, which has no requests yet, make steps one at a time, and tell its cost model what they took.

    ``run`` takes a step of a slot, with its number, through the slices; ``reserve`` has memory nodes set space aside,
    and ``release`` gives all of a sequence back. Rounds grow up to ``most_rows`` sequences and to prompts of
    ``most_tokens``, as long as the next should be over ``limit_s`` seconds of ``clock`` after the begin; at that time
    the present one ends with its step. One that is refused space is the last. What stays is what was observed, and that
    counters of work have counted.
    """
    begun_s = clock()
    longest_s, numbers = 0.0, itertools.count()

    async def answer(sequences: list[Sequence], *, observe: bool) -> bool:
        """False if they were refused space, or it got too late."""
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
                _give_back(step, release)
                for ask in step.asks:
                    try:
                        scheduler.grant(ask, await reserve(ask))
                    except CapacityError:
                        ended = True
                if step.decode or step.prompts:
                    ran, load = await run(slot, next(numbers), step), step.load
                    ended |= clock() - begun_s > limit_s
                    if observe or ended:
                        scheduler.cost.observe(load.rows, load.prompt_tokens, load.context_tokens, *ran[1:])
                    _give_back(scheduler.finish(slot, step, ran.tokens), release)
        return not ended

    log.info("event=fitting rows=%d prompt_tokens=%d limit_s=%g", most_rows, most_tokens, limit_s)
    # Whatever runs for the first time takes longer than ever after, so the first round comes twice.
    for i, (rows, prompt) in enumerate([(1, 1), *_rounds(most_rows, most_tokens)]):
        round_s = clock()
        sequences = [
            Sequence([0] * prompt, ANSWER_TOKENS, Sampling(), frozenset(), share_prefix=False) for _ in range(rows)
        ]
        if not await answer(sequences, observe=i > 0):
            break
        now_s = clock()
        longest_s = max(longest_s, now_s - round_s) if i else 0.0
        log.info("event=fitted rows=%d prompt_tokens=%d seconds=%.3f", rows, prompt, now_s - round_s)
        if now_s + GROWTH * longest_s > begun_s + limit_s:
            break
    scheduler.prompt_tokens = scheduler.shared_tokens = 0


def _rounds(most_rows: int, most_tokens: int) -> Iterator[tuple[int, int]]:
    """How many sequences, and how many tokens each one's prompt has: many short ones and a long one, in turns."""
    yield 1, 1
    size = GROWTH
    while size <= max(most_rows, most_tokens):
        if size <= most_rows:
            yield size, 1
        if size <= most_tokens:
            yield 1, size
        size *= GROWTH


def _give_back(news: Step | Outcome, release: Callable[[int], None]) -> None:
    for id_ in news.released:
        release(id_)
