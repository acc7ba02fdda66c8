"""Measure requests as their clients see them, on the node's loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from lamina.front.sequence import ReservationRequest, Sequence, StepOutcome
from lamina.metrics import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram

log = logging.getLogger("lamina.front")


class _Times:
    """Holds when something happened to a request that is not over, in seconds of the loop's clock."""

    __slots__ = ("admitted_s", "arrived_s", "first_s", "last_s")

    def __init__(self, now: float) -> None:
        self.arrived_s = now
        self.admitted_s: float | None = None
        self.first_s = self.last_s = 0.0


class Meter:
    """Counts requests by their ends, and how long they take. Times come in from the owner's clock.

    A token costs one entry of a histogram and no lock; whatever reads the counts does so on the same loop.
    """

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(REQUEST_BUCKETS)
        self.inter_token_latency = Histogram(TOKEN_BUCKETS)
        self.queue_time = Histogram(REQUEST_BUCKETS)
        self.latency = Histogram(REQUEST_BUCKETS)
        """Of requests that were answered whole, from their arrival to their last token."""
        self.prompt_tokens = 0
        """The tokens of prompts whose first token was generated."""
        self.finished: Counter[str] = Counter(stop=0, length=0)
        """Requests that were answered whole, by finish reason."""
        self.failed: Counter[str] = Counter(RequestError=0, CapacityError=0, NodeError=0)
        """Requests that failed or were refused, by the class of the error."""
        self.cancelled = 0
        self._times: dict[Sequence, _Times] = {}

    def arrived(self, sequence: Sequence, now: float) -> None:
        """A request has come."""
        self._times[sequence] = _Times(now)

    def admitted(self, reservations: Iterable[ReservationRequest], now: float) -> None:
        """Space is reserved; for a new sequence, that is its admission."""
        for request in reservations:
            if request.is_new and (times := self._times.get(request.sequence)) and times.admitted_s is None:
                times.admitted_s = now
                self.queue_time.observe(now - times.arrived_s)

    def generated(self, outcome: StepOutcome, now: float) -> None:
        """A step has brought tokens."""
        for entry in outcome.tokens:
            times = self._times.get(sequence := entry[0])
            if times is None:
                continue
            if not times.last_s:
                times.first_s = now
                self.time_to_first_token.observe(now - times.arrived_s)
                self.prompt_tokens += len(sequence.prompt)
            else:
                self.inter_token_latency.observe(now - times.last_s)
            times.last_s = now

    def ended(self, sequence: Sequence, reason: str, now: float) -> None:
        """A request was answered whole."""
        times = self._times.pop(sequence, None)
        if times is None:
            return
        self.finished[reason] += 1
        self.latency.observe(now - times.arrived_s)
        if name := sequence.request.name:
            log.info(
                "event=answered request=%r reason=%s prompt_tokens=%d shared_tokens=%d tokens=%d preemptions=%d "
                "queued_s=%.4f prompt_s=%.4f answer_s=%.4f",
                name,
                reason,
                len(sequence.prompt),
                sequence.shared,
                len(sequence.output),
                sequence.preemptions,
                (admitted_s := times.admitted_s or times.arrived_s) - times.arrived_s,
                times.first_s - admitted_s,
                times.last_s - times.first_s,
            )

    def failed_with(self, error: Exception, sequence: Sequence | None = None, name: str = "") -> None:
        """A request has failed, or the one called ``name`` was refused before there was a sequence."""
        if sequence is not None:
            name = sequence.request.name
            if self._times.pop(sequence, None) is None:
                return
        self.failed[type(error).__name__] += 1
        if name:
            log.warning("event=unanswered request=%r kind=%s reason=%r", name, type(error).__name__, str(error))

    def left(self, sequence: Sequence) -> None:
        """A request was cancelled."""
        if self._times.pop(sequence, None):
            self.cancelled += 1
            if name := sequence.request.name:
                log.info("event=cancelled request=%r tokens=%d", name, len(sequence.output))

    def refused(self, sequence: Sequence) -> None:
        """A request was refused when it had just come; whoever tells the client counts the error."""
        self._times.pop(sequence, None)
