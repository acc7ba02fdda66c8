"""Have the masks of constrained answers made beside the steps, so that no other sequence waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lamina.constrain.matcher import Matcher
from lamina.errors import RequestError
from lamina.front.sequence import Sequence
from lamina.runtime.workers import ParallelWorkers

PATIENCE_S = 0.001
"""How long a step waits at most for masks that are not ready."""


@dataclass(slots=True)
class _Making:
    """The next mask of one sequence while a thread makes it."""

    sequence: Sequence
    token: int
    """The last token of its answer, which the matcher has not seen yet."""
    error: RequestError | None = None


class MaskMaker:
    """Makes the next mask of each sequence that has a matcher, in the threads of ``workers``; on the device's loop.

    A step waits for the masks of its sequences for `PATIENCE_S`, once for each mask. A sequence whose mask is not ready
    then sits out; ``on_ready`` is called when it is. ``on_failed`` gets the sequences whose constraint cannot go on.
    """

    def __init__(
        self,
        workers: ParallelWorkers,
        on_ready: Callable[[], None],
        on_failed: Callable[[Sequence, RequestError], None],
    ) -> None:
        self._workers = workers
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._recent: dict[int, list[asyncio.Future[None]]] = {}
        """What makes the masks of the last step of each slot, until a step has waited for it."""

    def begin(self, slot: int, sequences: Iterable[Sequence]) -> None:
        """Begin with the masks that follow the last tokens of some sequences of a slot."""
        makings = [_Making(s, s.output[-1]) for s in sequences if s.matcher is not None and s.finish_reason is None]
        if not makings:
            return
        for making in makings:
            making.sequence.mask = None
        jobs = self._workers.each(_make, makings)
        for job in jobs:
            job.add_done_callback(lambda job: self._ended(job, makings))
        self._recent[slot] = jobs

    async def settle(self, slot: int) -> None:
        """Wait a little for the masks of the last step of a slot."""
        pending = [job for job in self._recent.pop(slot, ()) if not job.done()]
        if pending:
            await asyncio.wait(pending, timeout=PATIENCE_S)

    def _ended(self, job: asyncio.Future[None], makings: list[_Making]) -> None:
        if job.cancelled():  # the node ends
            return
        job.result()  # a fault of ours is no secret
        for making in makings:
            if (error := making.error) is not None:
                making.error = None
                self._on_failed(making.sequence, error)
        self._on_ready()


def _make(making: _Making) -> None:
    """Make a mask, in a thread. Only this thread has the matcher until the mask is there."""
    matcher: Matcher | None = making.sequence.matcher
    assert matcher is not None
    try:
        matcher.accept(making.token)
        making.sequence.mask = matcher.mask()
    except RequestError as e:
        making.error = e
