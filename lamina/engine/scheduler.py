"""Decide which sequences run and what each step consists of. Pure Python: no clock, no tensor, no connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from lamina.engine.placement import Placement
from lamina.engine.sampler import Sampling
from lamina.errors import CapacityError


@dataclass(eq=False, slots=True)
class Sequence:
    """One request while it is being answered. Prompt and output are its whole state."""

    id: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    placement: Placement
    """Where its keys and values lie."""
    output: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Prompt tokens that have gone through the slices."""
    cancelled: bool = False

    @property
    def reserved_tokens(self) -> int:
        """Positions that its keys and values can come to take."""
        return len(self.prompt) + self.max_tokens

    @property
    def finish_reason(self) -> str | None:
        if self.output and self.output[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(self.output) >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode row: ``token`` is at ``position``, the one before the token to be chosen."""

    sequence: Sequence
    token: int
    position: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of a prompt, from position ``start``."""

    sequence: Sequence
    start: int
    tokens: list[int]
    remote: bool = False
    """Whether its past lies on memory nodes, rather than here."""

    @property
    def completes(self) -> bool:
        """Whether it ends the prompt, so that a token is sampled from its last row."""
        return self.start + len(self.tokens) == len(self.sequence.prompt)


@dataclass(frozen=True, slots=True)
class Step:
    """What goes through the slices together: decode rows first, then chunks of prompts."""

    decode: tuple[DecodeRow, ...]
    prompts: tuple[PromptChunk, ...]
    admitted: tuple[Sequence, ...]
    """Sequences whose space must be reserved before the step runs."""

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the sampled rows."""
        return [r.sequence for r in self.decode] + [c.sequence for c in self.prompts if c.completes]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished step brought: new tokens in order of the sampled rows, and the sequences that are over."""

    tokens: list[tuple[Sequence, int]]
    finished: list[Sequence]
    cancelled: list[Sequence]


class Scheduler:
    """Continuous batching over ``batches`` slots: sequences join and leave between steps.

    A sequence is admitted when the blocks that it can come to need are free, in the order of arrival, and stays in
    its slot until it is over. Memory nodes hold the same blocks of every sequence, so one count stands for all:
    ``blocks`` of ``block_tokens`` tokens each.
    """

    def __init__(
        self, *, batches: int, max_batch: int, prefill_tokens: int, blocks: int, block_tokens: int, max_waiting: int
    ) -> None:
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._block_tokens = block_tokens
        self._max_waiting = max_waiting
        self._blocks = blocks
        self._free = blocks
        self._slots: list[list[Sequence]] = [[] for _ in range(batches)]
        self._waiting: deque[Sequence] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(map(len, self._slots))

    @property
    def free_blocks(self) -> int:
        return self._free

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. CapacityError if it could never run, or if too many wait."""
        if self._need(sequence) > self._blocks:
            raise CapacityError(
                f"the request needs {sequence.reserved_tokens} tokens of KV cache ({len(sequence.prompt)} prompt + "
                f"{sequence.max_tokens} new), the memory nodes hold {self._blocks * self._block_tokens}; ask for fewer"
            )
        if len(self._waiting) >= self._max_waiting:
            raise CapacityError(
                f"{len(self._waiting)} requests are waiting already, the limit is {self._max_waiting}; retry later"
            )
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence early; True if it was still waiting, else it ends at its next step boundary."""
        sequence.cancelled = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return True
        return False

    def next_step(self, slot: int) -> Step | None:
        """The next step of batch ``slot``, or None while it has nothing to do."""
        running = self._slots[slot]
        admitted = self._admit(slot)
        decode, prompts, budget = [], [], self._prefill_tokens
        for s in running:
            if s.prefilled == len(s.prompt):
                decode.append(DecodeRow(s, s.output[-1], len(s.prompt) + len(s.output) - 1))
            elif budget:
                chunk = PromptChunk(s, s.prefilled, s.prompt[s.prefilled : s.prefilled + budget])
                prompts.append(chunk)
                budget -= len(chunk.tokens)
        return Step(tuple(decode), tuple(prompts), admitted) if running else None

    def refuse(self, slot: int, step: Step, refused: Rows[Sequence]) -> Step:
        """What remains of a step without those of ``step.admitted`` that found no space; they are over."""
        for sequence in refused:
            self._slots[slot].remove(sequence)
            self._free += self._need(sequence)
        return Step(
            step.decode,
            tuple(chunk for chunk in step.prompts if chunk.sequence not in refused),
            tuple(sequence for sequence in step.admitted if sequence not in refused),
        )

    def finish(self, slot: int, step: Step, tokens: Rows[int]) -> Outcome:
        """Take in the tokens of a step's sampled rows, and free what the sequences that are over had reserved."""
        for chunk in step.prompts:
            chunk.sequence.prefilled += len(chunk.tokens)
        fresh = [(s, t) for s, t in zip(step.sampled, tokens, strict=True) if not s.cancelled]
        for sequence, token in fresh:
            sequence.output.append(token)
        running = self._slots[slot]
        cancelled = [s for s in running if s.cancelled]
        finished = [s for s in running if not s.cancelled and s.finish_reason]
        for sequence in cancelled + finished:
            running.remove(sequence)
            self._free += self._need(sequence)
        return Outcome(fresh, finished, cancelled)

    def _admit(self, slot: int) -> tuple[Sequence, ...]:
        """Admit waiting sequences to the slot while it is the least loaded and there is room."""
        running, admitted = self._slots[slot], []
        while (
            self._waiting
            and len(running) < self._max_batch
            and len(running) <= min(map(len, self._slots))
            and self._need(self._waiting[0]) <= self._free
        ):
            sequence = self._waiting.popleft()
            self._free -= self._need(sequence)
            running.append(sequence)
            admitted.append(sequence)
        return tuple(admitted)

    def _need(self, sequence: Sequence) -> int:
        return -(-sequence.reserved_tokens // self._block_tokens)
