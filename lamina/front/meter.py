"""Measure requests as their clients see them, on the node's loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from lamina.front.sequence import Sequence
from lamina.metrics import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram

log = logging.getLogger("lamina.front")


class EndedRequest(NamedTuple):
    """Describes a request that is over, for traces. Times are seconds."""

    name: str
    traceparent: str
    prompt_tokens: int
    shared_tokens: int
    tokens: int
    preemptions: int
    queued_s: float
    prompt_s: float
    answer_s: float
    reason: str = ""
    error: str = ""
    """Why it was not answered whole."""


class RequestMeter:
    """Counts requests by their ends, and how long they take. Named ones get a line in the log when they end.

    Whatever reads the counts does so on the same loop, so a token costs one entry of a histogram and no lock.
    """

    def __init__(self) -> None:
        self.queue_time = Histogram(REQUEST_BUCKETS)
        self.time_to_first_token = Histogram(REQUEST_BUCKETS)
        self.inter_token_latency = Histogram(TOKEN_BUCKETS)
        self.latency = Histogram(REQUEST_BUCKETS)
        """Of requests that were answered whole, from their arrival to their last token."""
        self.prompt_tokens = 0
        """The tokens of prompts whose first token was generated."""
        self.finished: Counter[str] = Counter(stop=0, length=0)
        """Requests that were answered whole, by finish reason."""
        self.failed: Counter[str] = Counter(RequestError=0, CapacityError=0, NodeError=0)
        """Requests that failed or were refused, by the class of the error."""
        self.cancelled = 0
        self.resumed = 0
        """How often a client came back for an answer."""
        self.on_end: Callable[[EndedRequest], None] | None = None
        """Is told of every request that had arrived at the engine and is over."""

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """Count the first token of a request, so many seconds after its arrival."""
        self.time_to_first_token.observe(seconds)
        self.prompt_tokens += len(sequence.prompt)

    def answered(self, sequence: Sequence, reason: str, queued_s: float, prompt_s: float, answer_s: float) -> None:
        """Count a request that was answered whole."""
        self.finished[reason] += 1
        self.latency.observe(queued_s + prompt_s + answer_s)
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
                queued_s,
                prompt_s,
                answer_s,
            )
        self._tell(sequence, queued_s, prompt_s, answer_s, reason=reason)

    def broken_off(self, sequence: Sequence, error: Exception, lasted_s: float) -> None:
        """Count a request that failed so many seconds after its arrival."""
        self.unanswered(error, sequence.request.name)
        self._tell(sequence, 0.0, 0.0, lasted_s, error=str(error))

    def unanswered(self, error: Exception, name: str) -> None:
        """Count a request that failed or was refused before the engine had it."""
        kind = type(error).__name__
        self.failed[kind] += 1
        if name:
            log.warning("event=unanswered request=%r kind=%s reason=%r", name, kind, str(error))

    def left(self, sequence: Sequence, lasted_s: float) -> None:
        """Count a request whose client has given it up, so many seconds after its arrival."""
        self.cancelled += 1
        if name := sequence.request.name:
            log.info("event=cancelled request=%r tokens=%d", name, len(sequence.output))
        self._tell(sequence, 0.0, 0.0, lasted_s, error="the client gave it up")

    def _tell(
        self,
        sequence: Sequence,
        queued_s: float,
        prompt_s: float,
        answer_s: float,
        *,
        reason: str = "",
        error: str = "",
    ) -> None:
        if self.on_end is None:
            return
        request = sequence.request
        try:
            self.on_end(
                EndedRequest(
                    request.name,
                    request.traceparent,
                    len(sequence.prompt),
                    sequence.found,
                    len(sequence.output),
                    sequence.preemptions,
                    queued_s,
                    prompt_s,
                    answer_s,
                    reason,
                    error,
                )
            )
        except Exception:  # traces must not harm answers
            log.exception("event=trace_failed request=%r", request.name)
