"""Measure requests as their clients see them, on the node's loop."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass

from lamina.errors import LaminaError
from lamina.front.sequence import Sequence
from lamina.metrics import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram

log = logging.getLogger("lamina.front")


@dataclass(slots=True)
class Times:
    """Holds when a request got how far, in seconds of the loop's clock."""

    arrived_s: float
    admitted_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan

    @property
    def queued_s(self) -> float:
        """Return the seconds from its arrival to its admission."""
        return self.admitted_s - self.arrived_s

    @property
    def prompt_s(self) -> float:
        """Return the seconds from its admission to its first token."""
        return self.first_s - self.admitted_s

    @property
    def answer_s(self) -> float:
        """Return the seconds from its first token to its last."""
        return self.last_s - self.first_s


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

    def admitted(self, times: Times, now_s: float) -> None:
        """A request has got space; one that got it before has lost it meanwhile."""
        if math.isnan(times.admitted_s):
            times.admitted_s = now_s
            self.queue_time.observe(times.queued_s)

    def generated(self, sequence: Sequence, times: Times, now_s: float) -> None:
        """A request has got one more token."""
        if math.isnan(times.first_s):
            times.first_s = now_s
            self.time_to_first_token.observe(now_s - times.arrived_s)
            self.prompt_tokens += len(sequence.prompt)
        else:
            self.inter_token_latency.observe(now_s - times.last_s)
        times.last_s = now_s

    def ended(self, sequence: Sequence, times: Times, reason: str) -> None:
        """A request was answered whole."""
        self.finished[reason] += 1
        self.latency.observe(times.last_s - times.arrived_s)
        if name := sequence.request.name:
            log.info(
                "event=answered request=%r reason=%s prompt_tokens=%d shared_tokens=%d tokens=%d preemptions=%d "
                "queued_s=%.4f prompt_s=%.4f answer_s=%.4f",
                name,
                reason,
                len(sequence.prompt),
                sequence.found,
                len(sequence.output),
                sequence.preemptions,
                times.queued_s,
                times.prompt_s,
                times.answer_s,
            )

    def failed_with(self, error: LaminaError, name: str) -> None:
        """The request called ``name`` has failed, or was refused."""
        self.failed[type(error).__name__] += 1
        if name:
            log.warning("event=unanswered request=%r kind=%s reason=%r", name, type(error).__name__, str(error))

    def left(self, sequence: Sequence) -> None:
        """A request was cancelled."""
        self.cancelled += 1
        if name := sequence.request.name:
            log.info("event=cancelled request=%r tokens=%d", name, len(sequence.output))
