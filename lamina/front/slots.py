"""The scheduler balances work between its batch slots. This is pure Python."""

from __future__ import annotations

from collections.abc import Iterator

from lamina.front.cost import CostModel, StepLoad
from lamina.front.sequence import Sequence

MAX_MOVED_SHARE = 0.9
"""A sequence moves to another slot if the longer of the two slots' steps shrinks to this share of its time or less."""


class BatchSlot:
    """Holds the sequences of one batch that may be in flight."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.sequences: list[Sequence] = []
        self.context = 0
        """The tokens of all its sequences together."""
        self.stepping = False
        """Whether one of its steps is in flight."""

    @property
    def load(self) -> StepLoad:
        """Return the slot's next decode step, as if all prompts were prefilled."""
        return StepLoad(rows=len(self.sequences), context_tokens=self.context)

    @property
    def unfilled(self) -> int:
        """Return how many tokens of its sequences are still to be prefilled."""
        return sum(len(s.tokens) - s.prefilled for s in self.sequences)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence join."""
        self.sequences.append(sequence)
        self.context += sequence.context
        sequence.slot = self.index

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence leave."""
        self.sequences.remove(sequence)
        self.context -= sequence.context
        sequence.slot = -1


class SlotBalancer:
    """Holds the slots of all batches, at most ``max_batch`` sequences each, and gives them equal work by ``cost``.

    A step has at most ``prefill_tokens`` tokens of prompts. Sequences go to the first ``in_use`` slots. The cost model
    says how many of them are worth using.
    """

    def __init__(self, count: int, max_batch: int, prefill_tokens: int, cost: CostModel) -> None:
        self.in_use = count
        self._slots = [BatchSlot(index) for index in range(count)]
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._cost = cost

    def __getitem__(self, index: int) -> BatchSlot:
        return self._slots[index]

    def __iter__(self) -> Iterator[BatchSlot]:
        return iter(self._slots)

    @property
    def running(self) -> int:
        """Return how many sequences there are in all slots."""
        return sum(len(slot.sequences) for slot in self._slots)

    def sequences(self) -> Iterator[Sequence]:
        """Return the sequences of all slots."""
        return (sequence for slot in self._slots for sequence in slot.sequences)

    def takes_next(self, slot: BatchSlot) -> bool:
        """Return whether the next sequence joins this slot: it has a free row, and no other one with a free row has
        less work."""
        if slot.index >= self.in_use or len(slot.sequences) >= self._max_batch:
            return False
        return self._work(slot) <= min(map(self._work, self._open_slots()))

    def choose_in_use(self, waiting: int, next_context: int, space: int) -> None:
        """Decide how many slots to use for the sequences that run and, of the ``waiting`` ones, those that there is
        space for: ``space`` tokens, while the next has ``next_context``."""
        most, running = len(self._slots), self.running
        rows = min(running + min(waiting, space // max(1, next_context)), most * self._max_batch)
        if not rows or most == 1:
            return
        mean = sum(slot.context for slot in self._slots) / running if running else next_context
        # What one step of every slot could prefill; in fewer slots that takes several.
        prompt_tokens = min(sum(slot.unfilled for slot in self._slots), most * self._prefill_tokens)
        load = StepLoad(rows, prompt_tokens, round(mean * rows))
        self.in_use = self._cost.batches(load, least=-(-rows // self._max_batch), most=most, present=self.in_use)

    def rebalance(self, slot: BatchSlot) -> bool:
        """Move sequences from a slot, which is between two steps, to slots with less work. Returns whether any moved.

        Only decoding sequences move. The others have keys and values on the compute node, and will decode soon.
        """
        if len(self._slots) == 1:  # else each step would sort its sequences for nothing
            return False
        moved = False
        decoding = [s for s in slot.sequences if s.is_decoding]
        for sequence in sorted(decoding, key=lambda s: s.context, reverse=True):
            others = [other for other in self._open_slots() if other is not slot]
            if not others:
                break
            other = min(others, key=self._work)
            if slot.index < self.in_use:
                if self._work(other)[0] >= MAX_MOVED_SHARE * self._work(slot)[0]:
                    break
                if not self._is_better(slot, other, sequence):
                    continue
            slot.remove(sequence)
            other.add(sequence)
            moved = True
        return moved

    def _open_slots(self) -> list[BatchSlot]:
        """Return the slots in use that have a free row."""
        return [slot for slot in self._slots[: self.in_use] if len(slot.sequences) < self._max_batch]

    def _work(self, slot: BatchSlot) -> tuple[float, int]:
        """Return the cost of a slot's next step. If a step is in flight, contexts will have grown by the next one."""
        load = slot.load
        if slot.stepping:
            load = StepLoad(rows=load.rows, context_tokens=load.context_tokens + load.rows)
        return self._cost.cost(load).alone_s, len(slot.sequences)

    def _is_better(self, slot: BatchSlot, other: BatchSlot, sequence: Sequence) -> bool:
        """Return whether the longer of two slots' steps gets clearly shorter when the sequence moves."""
        rows, context = len(slot.sequences), slot.context
        without = self._cost.cost(StepLoad(rows=rows - 1, context_tokens=context - sequence.context)).alone_s
        rows, context = len(other.sequences), other.context
        with_it = self._cost.cost(StepLoad(rows=rows + 1, context_tokens=context + sequence.context)).alone_s
        return max(without, with_it) < MAX_MOVED_SHARE * self._cost.cost(slot.load).alone_s
