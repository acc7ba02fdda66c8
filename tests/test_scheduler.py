"""The scheduler keeps its promises whatever arrives, ends or is cancelled, and in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.engine.placement import Placement
from lamina.engine.sampler import Sampling
from lamina.engine.scheduler import Scheduler, Sequence
from lamina.errors import CapacityError

BLOCK = 4
STOP = 99


def make(id_: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(id_, list(range(prompt)), max_tokens, Sampling(), frozenset({STOP}), Placement((0,)))


def scheduler(**changes: int) -> Scheduler:
    limits = {"batches": 1, "max_batch": 4, "prefill_tokens": 8, "blocks": 64, "block_tokens": BLOCK, "max_waiting": 8}
    return Scheduler(**{**limits, **changes})  # type: ignore[arg-type]


def test_prompts_go_in_chunks_and_decode_goes_on() -> None:
    """A long prompt takes several steps, each with the decode rows of the others."""
    s = scheduler()
    short, long = make(0, 3, 9), make(1, 12, 2)
    s.submit(short)
    s.submit(long)

    first = s.next_step(0)
    assert first
    assert first.admitted == (short, long)
    assert [(c.sequence.id, c.start, len(c.tokens), c.completes) for c in first.prompts] == [
        (0, 0, 3, True),
        (1, 0, 5, False),
    ]
    s.finish(0, first, [7])

    second = s.next_step(0)
    assert second
    assert [(r.sequence.id, r.token, r.position) for r in second.decode] == [(0, 7, 3)]
    assert [(c.start, len(c.tokens), c.completes) for c in second.prompts] == [(5, 7, True)]
    assert second.sampled == [short, long]


def test_a_request_larger_than_the_cache_is_refused_with_the_numbers() -> None:
    """It could never run."""
    with pytest.raises(CapacityError, match=r"needs 300 tokens of KV cache \(200 prompt \+ 100 new\).*hold 256"):
        scheduler().submit(make(0, 200, 100))


def test_order_of_arrival_is_kept() -> None:
    """A small request does not overtake a large one that waits for space."""
    s = scheduler(blocks=4)
    for sequence in (make(0, 4, 4), make(1, 8, 8), make(2, 1, 1)):
        s.submit(sequence)

    step = s.next_step(0)

    assert step
    assert [a.id for a in step.admitted] == [0]
    assert s.waiting == 2


def test_a_refused_sequence_leaves_the_step_and_its_space() -> None:
    """The others of the step go on, and who waited is next."""
    s = scheduler(blocks=6)
    good, refused, waiting = make(0, 4, 4), make(1, 4, 8), make(2, 4, 8)
    for sequence in (good, refused, waiting):
        s.submit(sequence)
    first = s.next_step(0)
    assert first
    assert first.admitted == (good, refused)

    rest = s.refuse(0, first, [refused])

    assert rest.admitted == (good,)
    assert [c.sequence for c in rest.prompts] == [good]
    assert (s.running, s.waiting, s.free_blocks) == (1, 1, 4)
    s.finish(0, rest, [7])
    second = s.next_step(0)
    assert second
    assert second.admitted == (waiting,)


class Traffic(RuleBasedStateMachine):
    """Random requests, steps and cancellations, against counts that are kept here."""

    @initialize(batches=st.integers(1, 3), blocks=st.integers(4, 24), prefill_tokens=st.integers(1, 9))
    def begin(self, batches: int, blocks: int, prefill_tokens: int) -> None:
        self.batches, self.blocks, self.prefill_tokens = batches, blocks, prefill_tokens
        self.scheduler = scheduler(batches=batches, blocks=blocks, prefill_tokens=prefill_tokens, max_batch=3)
        self.live: dict[int, Sequence] = {}
        self.reserved: set[int] = set()
        self.next_id = 0

    @rule(prompt=st.integers(1, 30), max_tokens=st.integers(1, 12))
    def submit(self, prompt: int, max_tokens: int) -> None:
        sequence = make(self.next_id, prompt, max_tokens)
        self.next_id += 1
        fits = self._blocks_of(sequence) <= self.blocks
        room = self.scheduler.waiting < 8
        if fits and room:
            self.scheduler.submit(sequence)
            self.live[sequence.id] = sequence
        else:
            with pytest.raises(CapacityError):
                self.scheduler.submit(sequence)

    @rule(data=st.data(), slot=st.integers(0, 2), stop=st.booleans())
    def step(self, data: st.DataObject, slot: int, stop: bool) -> None:
        slot %= self.batches
        step = self.scheduler.next_step(slot)
        if step is None:
            return
        if step.admitted and data.draw(st.sampled_from([True, False, False, False])):
            refused = data.draw(st.lists(st.sampled_from(step.admitted), unique_by=id, min_size=1))
            step = self.scheduler.refuse(slot, step, refused)
            for sequence in refused:
                del self.live[sequence.id]
        self.reserved |= {s.id for s in step.admitted}
        assert sum(len(c.tokens) for c in step.prompts) <= self.prefill_tokens
        assert len(step.decode) + len(step.prompts) <= 3
        assert {s.id for s in step.sampled} <= self.reserved
        for row in step.decode:
            assert row.position == len(row.sequence.prompt) + len(row.sequence.output) - 1
            assert row.position < row.sequence.reserved_tokens
        # A cancel comes in the middle of the step, where it would meet the engine.
        running = [s.sequence for s in (*step.decode, *step.prompts)]
        if running and data.draw(st.booleans()):
            assert not self.scheduler.cancel(data.draw(st.sampled_from(running)))
        outcome = self.scheduler.finish(slot, step, [STOP if stop else 1] * len(step.sampled))
        assert all(not s.cancelled for s, _ in outcome.tokens)
        for sequence in outcome.finished:
            assert sequence.finish_reason in ("stop", "length")
            assert len(sequence.output) <= sequence.max_tokens
        for sequence in outcome.finished + outcome.cancelled:
            self.reserved.remove(sequence.id)
            del self.live[sequence.id]

    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        waiting = sorted(self.live.keys() - self.reserved)
        if waiting:
            sequence = self.live.pop(data.draw(st.sampled_from(waiting)))
            assert self.scheduler.cancel(sequence)

    @invariant()
    def space_is_accounted_for(self) -> None:
        held = sum(self._blocks_of(self.live[i]) for i in self.reserved)
        assert self.scheduler.free_blocks == self.blocks - held >= 0
        assert self.scheduler.running == len(self.reserved)
        assert self.scheduler.waiting == len(self.live) - len(self.reserved)

    def teardown(self) -> None:
        """Everybody who is not cancelled is answered in the end, and all space comes back."""
        for _ in range(2000):
            if not self.live:
                break
            for slot in range(self.batches):
                step = self.scheduler.next_step(slot)
                if step:
                    self.reserved |= {s.id for s in step.admitted}
                    outcome = self.scheduler.finish(slot, step, [1] * len(step.sampled))
                    for sequence in outcome.finished + outcome.cancelled:
                        self.reserved.remove(sequence.id)
                        del self.live[sequence.id]
        assert not self.live
        assert self.scheduler.free_blocks == self.blocks

    @staticmethod
    def _blocks_of(sequence: Sequence) -> int:
        return -(-sequence.reserved_tokens // BLOCK)


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase
