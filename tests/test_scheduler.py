"""The scheduler keeps its promises in whatever order sequences arrive, end, are preempted or are cancelled."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.attention import ExtentPool, KVCache, KVLayout, LayerShape, Memory, Rows, Run, window_blocks
from lamina.errors import CapacityError
from lamina.front.blocks import BlockManager
from lamina.front.cost import CostModel
from lamina.front.prefix import PrefixKeys
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, ReservationRequest, ScheduledStep, Sequence
from lamina.front.waiting import FIRST_COME_EVERY, WaitingQueue
from lamina.wire.requests import Request

BLOCK = 4
STOP = 99
KEYS = PrefixKeys(model="m", dtype="float32", kv_dtype="float32", block_tokens=BLOCK)


def make(prompt: int | list[int], max_tokens: int, **more: Any) -> Sequence:
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    return Sequence(Request(tokens, max_tokens, **more), tokens, max_tokens, frozenset({STOP}))


def scheduler(*, blocks: int = 64, **changes: Any) -> Scheduler:
    limits = {"batches": 1, "max_batch": 4, "prefill_tokens": 8, "max_waiting": 8, "ahead_blocks": 1}
    return Scheduler(**{**limits, "block_manager": BlockManager({0: blocks, 3: blocks + 1}, BLOCK), **changes})


@dataclass
class Nodes:
    """What memory nodes know.

    ``space`` and ``stored`` count, by sequence id, the positions with space and those that are stored; ``found`` has
    the keys of published blocks, and ``last`` is the largest id so far.
    """

    blocks: int
    space: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    found: set[bytes] = field(default_factory=set)
    last: int = -1

    def tell(self, changes: CacheChanges) -> None:
        for publication in changes.published:
            assert publication.id in self.space
            assert len(publication.keys) * BLOCK <= self.stored[publication.id]
            self.found.update(publication.keys)
        for id_ in changes.released:
            self.space.pop(id_, None)  # it may not have been asked for yet
            self.stored.pop(id_, None)

    def reserve(self, request: ReservationRequest) -> int:
        """Reserve space; returns how many leading positions are shared."""
        if request.reserved:
            assert self.space[request.id] < request.tokens
            self.space[request.id] = request.tokens
            shared = 0
        else:
            assert request.id > self.last
            self.last, self.space[request.id] = request.id, request.tokens
            blocks = next((i for i, key in enumerate(request.keys) if key not in self.found), len(request.keys))
            shared = self.stored[request.id] = blocks * BLOCK
        assert sum(-(-tokens // BLOCK) for tokens in self.space.values()) <= self.blocks
        return shared

    def store(self, step: ScheduledStep) -> None:
        """Store the rows of a step."""
        for row in step.decode:
            self.stored[row.sequence.id] = row.position + 1
        for chunk in step.prompts:
            self.stored[chunk.sequence.id] = chunk.start + len(chunk.tokens)


class WindowedNodes(Nodes):
    """A memory node with the real cache of a model whose layers all have a window.

    Prefilled positions arrive as late as possible: when a planned step already waits for them.
    """

    def __init__(self, blocks: int, window: int) -> None:
        super().__init__(blocks)
        shape = LayerShape(q_heads=1, kv_heads=1, qk_dim=1, v_dim=1, scale=1.0, window=window)
        layout = KVLayout(layers=(shape, shape), dtype="float32", block_tokens=BLOCK)
        pool = ExtentPool(Memory(128 * blocks), extent_bytes=256 if blocks % 2 == 0 else 128)
        self.cache = KVCache(layout, pool, lambda *_: 64)
        assert self.cache.capacity_tokens == blocks * BLOCK
        self.coming: list[tuple[int, Run]] = []
        """Prefilled runs under way, each with its layer, in the order of the layers."""

    def tell(self, changes: CacheChanges) -> None:
        for publication in changes.published:
            if self.cache.complete(publication.id) >= BLOCK * len(publication.keys):
                self.cache.publish(publication.id, publication.keys, publication.first)
        for id_ in changes.released:
            if self.space.pop(id_, None):
                del self.stored[id_]
                self.cache.release(id_)
                self.coming = [(layer, run) for layer, run in self.coming if run.sequence != id_]

    def reserve(self, request: ReservationRequest) -> int:
        self.space[request.id] = request.tokens
        if request.reserved:
            self.cache.extend(request.id, request.tokens)
            return 0
        shared = self.stored[request.id] = self.cache.reserve(
            request.id, request.tokens, ahead=request.ahead, keys=request.keys
        )
        return shared

    def store(self, step: ScheduledStep) -> None:
        runs = [Run(row.sequence.id, row.position, 1) for row in step.decode]
        for chunk in step.prompts:
            run = Run(chunk.sequence.id, chunk.start, len(chunk.tokens))
            if chunk.remote:
                runs.append(run)
            else:
                self.coming += [(layer, run) for layer in (0, 1)]
        if runs:
            placement = self.cache.place(Rows(tuple(runs)))
            self.arrive(len(self.coming))
            for layer in (0, 1):
                self.cache.advance(layer, placement)
        super().store(step)

    def arrive(self, count: int) -> None:
        for layer, run in self.coming[:count]:
            self.cache.advance(layer, self.cache.place(Rows((run,)), attend=False))
        del self.coming[:count]


class Cluster:
    """A scheduler, memory nodes, and steps in flight. Every token is a function of its sequence and position."""

    def __init__(self, scheduler: Scheduler, batches: int, nodes: Nodes, **limits: int) -> None:
        self.scheduler = scheduler
        self.nodes = nodes
        self.steps: list[ScheduledStep | None] = [None] * batches
        self.ids: list[list[int]] = [[] for _ in range(batches)]
        self.requested: list[ReservationRequest] = []
        self.submitted: list[Sequence] = []
        self.live: list[Sequence] = []
        """The sequences that are neither answered nor cancelled."""
        self.answered = 0
        self.limits = limits

    def token(self, sequence: Sequence) -> int:
        """The next token of a sequence."""
        return self.token_at(sequence, sequence.context)

    @staticmethod
    def token_at(sequence: Sequence, position: int) -> int:
        return STOP if (7 * sequence.arrival + position) % 97 == 96 else (sequence.arrival + position) % 3

    def submit(self, sequence: Sequence) -> None:
        self.scheduler.submit(sequence)
        self.submitted.append(sequence)
        self.live.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self.live.remove(sequence)

    def begin(self, slot: int) -> bool:
        """Begin the next step of a slot; False if there is none."""
        assert self.steps[slot] is None
        first = min((s for s in self.live if s.slot >= 0), key=lambda s: s.rank, default=None)
        step = self.scheduler.next_step(slot)
        assert first is None or first.slot >= 0  # the first by rank is never preempted
        if step is None:
            return False
        self.nodes.tell(step.changes)
        self.requested += step.changes.reservations
        self.check(step)
        if step.has_rows:
            self.steps[slot] = step
            self.ids[slot] = [s.id for s in _sequences(step)]
        return True

    def check(self, step: ScheduledStep) -> None:
        busy = {id(s) for other in self.steps if other for s in _sequences(other)}
        assert not busy & {id(s) for s in _sequences(step)}
        assert sum(len(c.tokens) for c in step.prompts) <= self.limits["prefill_tokens"]
        assert sum(len(c.tokens) for c in step.prompts if c.remote) <= self.limits["remote_tokens"]
        assert len(step.decode) + len(step.prompts) <= self.limits["max_batch"]
        for row in step.decode:
            s = row.sequence
            assert (row.position, row.token) == (s.context - 1, s.output[-1])
            assert self.nodes.stored[s.id] == row.position < self.nodes.space[s.id]
        for chunk in step.prompts:
            s = chunk.sequence
            stop = chunk.start + len(chunk.tokens)
            assert chunk.tokens == (s.prompt + s.output)[chunk.start : stop] != []
            assert self.nodes.stored[s.id] == chunk.start < stop <= self.nodes.space[s.id]

    def answer(self, which: int = 0) -> None:
        """Let the memory nodes answer a reservation. The answers for one sequence come in order."""
        request = self.requested.pop(which)
        current = request.is_current
        assert current or request.id not in self.nodes.space
        self.scheduler.confirm(request, self.nodes.reserve(request) if current else 0)

    def end(self, slot: int) -> None:
        step, self.steps[slot] = self.steps[slot], None
        assert step
        assert self.ids[slot] == [s.id for s in _sequences(step)]  # no sequence leaves in the middle of a step
        self.nodes.store(step)
        outcome = self.scheduler.finish(slot, step, [self.token(s) for s in step.sampled])
        self.nodes.tell(outcome.changes)
        assert all(not s.cancelled for s, _, _ in outcome.tokens)
        for s in outcome.finished:
            self.live.remove(s)
            self.answered += 1
            expected = [self.token_at(s, position) for position in range(len(s.prompt), len(s.prompt) + s.max_tokens)]
            if STOP in expected:
                expected = expected[: expected.index(STOP) + 1]
            assert s.output == expected

    def settle(self) -> None:
        """Run until every sequence is over: all that were not cancelled are answered, and all space is free."""
        idle = 0
        while idle < 3:
            idle += 1
            while self.requested:
                self.answer()
            for slot in range(len(self.steps)):
                if self.steps[slot]:
                    self.end(slot)
                    idle = 0
                idle = 0 if self.begin(slot) else idle
        assert not self.live
        assert not self.nodes.space
        assert self.scheduler.free_blocks == self.nodes.blocks
        assert self.scheduler.running == self.scheduler.waiting == 0


def _sequences(step: ScheduledStep) -> Iterator[Sequence]:
    for part in (*step.decode, *step.prompts):
        yield part.sequence


def cluster(*, batches: int = 1, blocks: int = 64, window: int | None = None, **more: int) -> Cluster:
    limits = {"prefill_tokens": 8, "max_batch": 4, "remote_tokens": 0, **more}
    block_manager = BlockManager({0: blocks, 3: blocks + 1}, BLOCK, window=window)
    nodes = WindowedNodes(blocks, window) if window else Nodes(blocks)
    return Cluster(
        scheduler(batches=batches, block_manager=block_manager, prefix=KEYS, **limits), batches, nodes, **limits
    )


def start(s: Scheduler, slot: int = 0) -> ScheduledStep:
    """The next step of a slot with rows, after all reservations have been confirmed."""
    step = s.next_step(slot)
    while step and not step.has_rows:
        for request in step.changes.reservations:
            s.confirm(request)
        step = s.next_step(slot)
    assert step
    for request in step.changes.reservations:
        s.confirm(request)
    return step


# -- prompts and decoding


def test_prompts_go_in_chunks_and_decode_goes_on() -> None:
    """A long prompt takes several steps, each with the decode rows of the others."""
    s = scheduler()
    short, long = make(3, 9), make(12, 2)
    s.submit(short)
    s.submit(long)

    first = start(s)
    assert [(c.sequence.arrival, c.start, len(c.tokens), c.completes) for c in first.prompts] == [
        (0, 0, 3, True),
        (1, 0, 5, False),
    ]
    s.finish(0, first, [7])

    second = start(s)
    assert [(r.sequence.arrival, r.token, r.position) for r in second.decode] == [(0, 7, 3)]
    assert [(c.start, len(c.tokens), c.completes) for c in second.prompts] == [(5, 7, True)]
    assert second.sampled == [short, long]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """The oldest prompt gets half of the budget, the next one half of the rest; no token is left over."""
    s = scheduler(prefill_tokens=16, max_batch=8)
    for prompt in (40, 2, 40, 40):
        s.submit(make(prompt, 1))

    step = start(s)

    assert [(c.sequence.arrival, len(c.tokens)) for c in step.prompts] == [(0, 8), (1, 2), (2, 3), (3, 3)]


def test_space_is_reserved_before_it_is_needed() -> None:
    """No step waits for a confirmation: the step that requests more still has space, and the next has the new space."""
    s = scheduler()
    sequence = make(3, 30)
    s.submit(sequence)
    step = s.next_step(0)
    assert step
    assert not step.prompts
    assert [(r.tokens, r.reserved) for r in step.changes.reservations] == [(8, 0)]
    assert s.next_step(0) is None
    s.confirm(step.changes.reservations[0])

    requests: list[ReservationRequest] = []
    for _ in range(20):
        step = s.next_step(0)
        assert step
        assert step.has_rows
        requests += step.changes.reservations
        s.finish(0, step, [1])
        for request in step.changes.reservations:
            s.confirm(request)

    assert [r.tokens for r in requests] == [12, 16, 20, 24]
    assert not any(r.is_new for r in requests)


# -- admission


def test_a_request_larger_than_the_cache_is_refused_with_the_numbers() -> None:
    """A sequence that could never run is refused at once, with its tokens and those of the cache."""
    with pytest.raises(CapacityError, match=r"needs 300 tokens of KV cache \(200 prompt \+ 100 new\).*hold 256"):
        scheduler().submit(make(200, 100))


def test_a_full_queue_says_when_to_try_again() -> None:
    """The refusal says when to retry, in the message and as a number."""
    s = scheduler(max_waiting=2)
    for _ in range(2):
        s.submit(make(1, 1))

    with pytest.raises(CapacityError, match="2 requests are waiting already, the limit is 2; retry in 7 s") as caught:
        s.submit(make(1, 1), retry_after_s=7.0)

    assert caught.value.retry_after_s == 7.0


def test_order_of_arrival_is_kept() -> None:
    """A small request does not overtake a large one that waits for space."""
    s = scheduler(blocks=5)
    for prompt, max_tokens in ((4, 4), (12, 8), (1, 1)):
        s.submit(make(prompt, max_tokens))

    step = start(s)

    assert [c.sequence.arrival for c in step.prompts] == [0]
    assert s.waiting == 2


def test_the_highest_priority_is_next() -> None:
    """Sequences are admitted by priority, and those of the same priority in the order of their arrival."""
    s = scheduler(max_batch=3)
    for priority in (0, 5, -1, 5, 0):
        s.submit(make(1, 1, priority=priority))

    assert [c.sequence.arrival for c in start(s).prompts] == [0, 1, 3]
    assert s.waiting == 2


def test_low_priority_does_not_starve() -> None:
    """The n-th oldest sequence is admitted after n times `FIRST_COME_EVERY` admissions, however many rank above it."""
    queue: WaitingQueue[Sequence] = WaitingQueue()
    low = [make(1, 1) for _ in range(3)]
    for i, sequence in enumerate(low):
        sequence.arrival = i
        queue.push(sequence)
    admitted: list[Sequence] = []
    for i in range(3 * FIRST_COME_EVERY):
        sequence = make(1, 1, priority=9)
        sequence.arrival = 3 + i
        queue.push(sequence)
        head = queue.head()
        assert head
        queue.take(head)
        admitted.append(head)

    assert [admitted.index(s) for s in low] == [n * FIRST_COME_EVERY - 1 for n in (1, 2, 3)]


def test_ten_thousand_wait_and_half_of_them_leave() -> None:
    """Submitting and cancelling thousands of sequences takes no time that grows with the square of their number."""
    s = scheduler(max_waiting=10_000)
    waiting = [make(1, 1, priority=i % 3) for i in range(10_000)]
    began = time.monotonic()
    for sequence in waiting:
        s.submit(sequence)
    for sequence in random.Random(1).sample(waiting, 5_000):
        assert s.cancel(sequence)
    assert s.waiting == 5_000
    while s.waiting:
        step = start(s)
        s.finish(0, step, [1] * len(step.sampled))
    assert time.monotonic() - began < 20
    assert s.free_blocks == 64


# -- preemption


def run_until_preempted(s: Scheduler) -> ScheduledStep:
    """Run step by step, every token 1, until a sequence is preempted; returns the step."""
    while True:
        step = start(s)
        if s.preemptions:
            return step
        s.finish(0, step, [1] * len(step.sampled))


def test_the_youngest_is_preempted_and_comes_back_with_its_output() -> None:
    """The space of the youngest sequence is released; later all its tokens are prefilled, under another id."""
    s = scheduler(blocks=8, prefill_tokens=64)
    old, young = make(6, 20), make(6, 20)
    s.submit(old)
    s.submit(young)

    step = run_until_preempted(s)

    assert [r.sequence for r in step.decode] in ([], [old])
    assert (s.running, s.waiting, young.slot) == (1, 1, -1)
    had = list(young.output)
    assert had
    while not old.finish_reason:
        s.finish(0, step, [1] * len(step.sampled))
        step = start(s)
    assert [(c.sequence, c.start, c.tokens, c.completes) for c in step.prompts] == [
        (young, 0, young.prompt + had, True)
    ]
    assert step.sampled == [young]


def test_the_lowest_priority_is_preempted_first() -> None:
    """The lowest priority is preempted even if it arrived first, and no more sequences than necessary are preempted."""
    s = scheduler(blocks=12, prefill_tokens=64)
    low, high, middle = make(6, 20, priority=-2), make(6, 20), make(6, 20, priority=-1)
    s.submit(low)
    s.finish(0, start(s), [1])
    s.submit(high)
    s.submit(middle)

    run_until_preempted(s)

    assert (low.slot, high.slot, middle.slot) == (-1, 0, 0)


def test_the_lowest_rank_sits_out_and_keeps_its_space() -> None:
    """The sequence of the lowest rank is not preempted for its own needs; it goes on when the others are done."""
    c = cluster(blocks=19, prefill_tokens=64, ahead_blocks=6)
    c.submit(make(6, 26))  # has 8 blocks from the beginning
    c.submit(make(20, 30))  # has 11, and needs 13 before the other is done
    c.settle()
    assert (c.answered, c.scheduler.preemptions) == (2, 0)


def test_a_late_confirmation_counts_for_nothing() -> None:
    """A confirmation from before a preemption gives the sequence no space when it is admitted again."""
    s = scheduler(blocks=8, prefill_tokens=64)
    old, young = make(6, 22), make(6, 20)
    s.submit(old)
    s.submit(young)
    late: list[ReservationRequest] = []
    steps = 0
    while not old.finish_reason:
        step = s.next_step(0)
        assert step
        for request in step.changes.reservations:
            if request.sequence is young and request.reserved:
                late.append(request)
            else:
                s.confirm(request)
        if step.has_rows:
            s.finish(0, step, [1] * len(step.sampled))
            steps += 1
    assert (s.preemptions, len(late)) == (1, 1)
    s.confirm(late[0])

    step = s.next_step(0)

    assert step
    assert [request.sequence for request in step.changes.reservations] == [young]
    assert not step.prompts


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_all_sequences_get_through_a_cache_for_one(batches: int) -> None:
    """Sequences that could each fill the cache do not preempt each other for ever."""
    c = cluster(batches=batches, blocks=8, max_waiting=30)
    for i in range(30):
        c.submit(make(1 + i % 9, 20, priority=i % 2))
    c.settle()
    assert c.answered == 30


# -- several batches


def measured() -> CostModel:
    """The cost model of a machine with 1 ms of compute per row and 10 us of attention per token of context."""
    cost = CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        for context in (100, 1000):
            cost.observe(rows, 0, rows * context, compute_s=1e-3 * rows, attention_s=1e-5 * rows * context)
    return cost


def decoding(s: Scheduler, slots: int, contexts: list[int]) -> None:
    """Let sequences with prompts of these lengths decode, with all slots between two steps."""
    for context in contexts:
        s.submit(make(context, 500))
    rows = 0
    while rows < len(contexts):
        rows = 0
        for slot in range(slots):
            if step := s.next_step(slot):
                for request in step.changes.reservations:
                    s.confirm(request)
                if step.has_rows:
                    s.finish(slot, step, [1] * len(step.sampled))
                rows += len(step.decode)


def test_slots_are_balanced_by_time_and_not_by_count() -> None:
    """A slot with one long context has as much work as one with many short contexts."""
    s = scheduler(batches=2, blocks=4000, max_batch=32, prefill_tokens=4096, max_waiting=99, cost=measured())

    decoding(s, 2, [3000] + [100] * 15)

    first, second = s.loads
    works = [s.cost.cost(load).alone_s for load in (first, second)]
    assert max(works) < 1.2 * min(works)
    assert abs(first.rows - second.rows) > 4


def test_slots_are_compared_by_their_next_steps() -> None:
    """A slot in the middle of a step counts with the contexts that it will have after the step."""
    s = scheduler(batches=2, blocks=4000, max_batch=32, prefill_tokens=4096, max_waiting=99, cost=measured())
    decoding(s, 2, [100, 100])
    less, more = sorted((0, 1), key=lambda slot: s.loads[slot].context_tokens)
    assert s.loads[less].context_tokens + 1 == s.loads[more].context_tokens
    if step := s.next_step(less):
        s.finish(less, step, [1])
    assert s.next_step(more)
    assert s.loads[less] == s.loads[more]

    s.submit(new := make(50, 10))
    step = s.next_step(less)

    assert step
    assert [request.sequence for request in step.changes.reservations if not request.reserved] == [new]


def test_prompts_take_more_batches_where_compute_nodes_are_idle() -> None:
    """Decoding alone is as fast in one batch as in two; but two nodes prefill the prompts of two batches at once."""
    cost = CostModel(compute_nodes=2)
    for rows in (1, 2, 4, 8, 16):
        for prompt in (0, 64):
            cost.observe(rows, prompt, rows * 100, 1e-3 + 1e-4 * prompt, attention_s=1e-6 * rows)
    s = scheduler(batches=2, blocks=4000, max_batch=32, prefill_tokens=64, max_waiting=99, cost=cost)
    decoding(s, 2, [10] * 8)
    for slot in (0, 1, 0, 1):
        if (step := s.next_step(slot)) and step.has_rows:
            s.finish(slot, step, [1] * len(step.sampled))
    assert sorted(load.rows for load in s.loads) == [0, 8]

    assert s.batches_in_use == 1
    for _ in range(4):
        s.submit(make(600, 10))
    for slot in (0, 1):
        if step := s.next_step(slot):
            for request in step.changes.reservations:
                s.confirm(request)
            if step.has_rows:
                s.finish(slot, step, [1] * len(step.sampled))
        s.next_step(slot)

    assert s.batches_in_use == 2


def test_one_batch_flies_where_two_gain_nothing() -> None:
    """Sequences of two slots come together in one, where compute takes the same time for any number of rows and
    attention almost none."""
    s = scheduler(batches=2, blocks=4000, max_batch=32, prefill_tokens=4096, max_waiting=99)
    decoding(s, 2, [10] * 8)
    assert [load.rows for load in s.loads] == [4, 4]

    for rows in (1, 2, 4, 8, 16):
        s.cost.observe(rows, 0, rows * 10, compute_s=1e-2, attention_s=1e-5 * rows)
    moves = [step.moved for slot in range(2) if (step := s.next_step(slot))]

    assert s.batches_in_use == 1
    assert any(moves)
    assert [load.rows for load in s.loads] == [8, 0]


def test_two_batches_fly_where_that_hides_the_attention() -> None:
    """Sequences move to the empty slot, and the step says so, because that slot may be asleep."""
    s = scheduler(batches=2, blocks=4000, max_batch=32, prefill_tokens=4096, max_waiting=99)
    for rows in (1, 2, 4, 8, 16):
        s.cost.observe(rows, 0, rows * 100, compute_s=1e-2, attention_s=1e-5 * rows)
    decoding(s, 2, [10] * 8)
    assert [load.rows for load in s.loads] == [8, 0]

    for _ in range(300):
        for rows in (1, 2, 4, 8, 16):
            s.cost.observe(rows, 0, rows * 100, compute_s=1e-3 * rows, attention_s=1e-3 * rows)
    step = s.next_step(0)

    assert step
    assert step.moved
    assert [load.rows for load in s.loads] == [4, 4]
    assert len(step.decode) == 4


# -- sharing


def test_a_prompt_starts_behind_what_it_shares() -> None:
    """A prompt whose blocks are all found starts behind them, and at least its last token is computed."""
    c = cluster(remote_tokens=3, prefill_tokens=16)
    prompt = [i % 5 for i in range(16)]
    c.submit(make(prompt, 2))
    c.settle()
    c.submit(make([*prompt, 1], 2))
    c.begin(0)
    c.answer()
    c.begin(0)

    (chunk,) = c.steps[0].prompts if c.steps[0] else ()
    assert (chunk.start, chunk.tokens, chunk.remote, chunk.completes) == (16, [1], True, True)
    c.settle()
    assert (c.scheduler.prompt_tokens, c.scheduler.shared_tokens) == (33, 16)

    c.submit(make(prompt, 2))
    c.begin(0)
    assert len(c.requested[0].keys) == 3
    c.settle()


def test_sequences_that_do_not_share_are_left_alone() -> None:
    """A sequence with another salt, or without ``share_prefix``, shares with no other, and no other with it."""
    for settings_ in ({"share_prefix": False}, {"salt": "a"}):
        c = cluster(remote_tokens=3)
        for more in ({}, settings_, {}):
            c.submit(make(12, 2, **more))
            c.settle()
        assert c.scheduler.shared_tokens == 8


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    """After a preemption only the blocks that the memory nodes have dropped are prefilled again."""
    c = cluster(blocks=8, prefill_tokens=64, remote_tokens=64)
    for prompt in (1, 2, 3, 4):
        c.submit(make([prompt] * prompt, 25))
    c.settle()
    assert c.scheduler.preemptions
    assert c.scheduler.shared_tokens > 0


# -- anything, in any order


class Traffic(RuleBasedStateMachine):
    """Random requests, steps, confirmations and cancellations of several batches at once."""

    @initialize(
        batches=st.integers(1, 3),
        blocks=st.integers(4, 24),
        prefill_tokens=st.integers(1, 9),
        remote_tokens=st.sampled_from([0, 0, 2, 9]),
        ahead_blocks=st.integers(1, 3),
    )
    def start(self, batches: int, blocks: int, prefill_tokens: int, remote_tokens: int, ahead_blocks: int) -> None:
        self.batches, self.blocks = batches, blocks
        self.c = cluster(
            batches=batches,
            blocks=blocks,
            prefill_tokens=prefill_tokens,
            max_batch=3,
            remote_tokens=remote_tokens,
            ahead_blocks=ahead_blocks,
        )

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30), new=st.integers(1, 30), low=st.booleans())
    def submit(self, prompt: list[int], new: int, low: bool) -> None:
        sequence = make(prompt, new, priority=-int(low))
        if -(-(len(prompt) + new) // BLOCK) <= self.blocks and self.c.scheduler.waiting < 8:
            self.c.submit(sequence)
        else:
            with pytest.raises(CapacityError):
                self.c.submit(sequence)

    @rule(slot=st.integers(0, 2))
    def go_on(self, slot: int) -> None:
        slot %= self.batches
        if self.c.steps[slot]:
            self.c.end(slot)
        else:
            self.c.begin(slot)

    @precondition(lambda self: self.c.requested)
    @rule()
    def answer(self) -> None:
        self.c.answer()

    @precondition(lambda self: self.c.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.c.cancel(data.draw(st.sampled_from(self.c.live)))

    @precondition(lambda self: self.c.nodes.found)
    @rule()
    def forget_what_was_shared(self) -> None:
        self.c.nodes.found.clear()

    @rule(rows=st.integers(1, 4), compute=st.floats(0, 1), attention=st.floats(0, 1))
    def learn(self, rows: int, compute: float, attention: float) -> None:
        self.c.scheduler.cost.observe(rows, 0, 9 * rows, compute, attention)

    def blocks_of(self, sequence: Sequence) -> int:
        """The blocks that a running sequence holds."""
        return -(-sequence.reserved // BLOCK)

    @invariant()
    def space_is_accounted_for(self) -> None:
        running = [s for s in self.c.submitted if s.slot >= 0]
        held = sum(map(self.blocks_of, running))
        assert self.c.scheduler.free_blocks == self.blocks - held >= 0
        assert self.c.scheduler.running == len(running)
        assert self.c.scheduler.waiting == len(self.c.live) - sum(not s.cancelled for s in running)
        for slot, load in enumerate(self.c.scheduler.loads):
            own = [s for s in running if s.slot == slot]
            assert (load.rows, load.context_tokens) == (len(own), sum(s.context for s in own))

    def teardown(self) -> None:
        if hasattr(self, "c"):
            self.c.settle()


Traffic.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestTraffic = Traffic.TestCase


class WindowedTraffic(Traffic):
    """The same with a window in all layers: the memory node has the space that the scheduler counts on."""

    @initialize(
        batches=st.integers(1, 3),
        blocks=st.integers(4, 24),
        prefill_tokens=st.integers(1, 9),
        remote_tokens=st.sampled_from([0, 2, 9]),
        ahead_blocks=st.integers(1, 3),
        window=st.integers(1, 20),
    )
    def start(  # type: ignore[override]
        self, batches: int, blocks: int, prefill_tokens: int, remote_tokens: int, ahead_blocks: int, window: int
    ) -> None:
        self.batches, self.blocks, self.window = batches, blocks, window
        self.c = cluster(
            batches=batches,
            blocks=blocks,
            prefill_tokens=prefill_tokens,
            max_batch=3,
            remote_tokens=remote_tokens,
            ahead_blocks=ahead_blocks,
            window=window,
        )

    @rule(count=st.integers(1, 9))
    def arrive(self, count: int) -> None:
        assert isinstance(self.c.nodes, WindowedNodes)
        self.c.nodes.arrive(count)

    def blocks_of(self, sequence: Sequence) -> int:
        most = window_blocks(self.window, len(sequence.tokens) + 1, BLOCK)
        return min(super().blocks_of(sequence), most)


WindowedTraffic.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestWindowedTraffic = WindowedTraffic.TestCase


def test_windows_let_more_sequences_in() -> None:
    """With a window, sequences with long answers hold less than all their tokens, so that more of them run."""
    running = []
    for window in (None, 8):
        c = cluster(blocks=40, window=window, max_batch=32, max_waiting=32, prefill_tokens=64)
        for _ in range(16):
            c.submit(make(4, 120))
        most = 0
        while c.live:
            c.begin(0)
            while c.requested:
                c.answer()
            if c.steps[0]:
                if min(len(s.output) for s in c.live if s.slot >= 0) > 30:
                    most = max(most, c.scheduler.running)
                c.end(0)
        running.append(most)
        c.settle()
    assert running[1] >= 2 * running[0] > 0


@pytest.mark.slow
def test_ten_thousand_random_cancels_leave_nothing() -> None:
    """Sequences cancelled at any moment, even in a step or before a confirmation, leave no space behind."""
    chosen = random.Random(2)
    c = cluster(batches=3, blocks=40, max_batch=6, max_waiting=64, remote_tokens=4)
    cancelled = 0
    while cancelled < 10_000:
        while len(c.live) < 30:
            prompt = [chosen.randrange(2) for _ in range(chosen.randint(1, 20))]
            c.submit(make(prompt, chosen.randint(1, 90), priority=chosen.randrange(3)))
        slot = chosen.randrange(3)
        if c.steps[slot]:
            c.end(slot)
        else:
            c.begin(slot)
        while c.requested and chosen.random() < 0.7:
            c.answer()
        if c.live and chosen.random() < 0.1:
            c.cancel(chosen.choice(c.live))
            cancelled += 1
    c.settle()
    assert c.answered > 100
    assert c.scheduler.preemptions > 100


def test_prompts_beyond_the_budget_go_on_from_the_memory_nodes() -> None:
    """The compute node keeps prompts up to its budget; the chunks after that read their past from the memory nodes."""
    s = scheduler(prefill_tokens=8, remote_tokens=4, prefill_kv_tokens=10)
    first, second = make(14, 2), make(6, 2)
    s.submit(first)
    s.submit(second)
    chunks: list[tuple[int, int, int, bool]] = []
    while step := s.next_step(0):
        for request in step.changes.reservations:
            s.confirm(request)
        chunks += [(c.sequence.arrival, c.start, len(c.tokens), c.remote) for c in step.prompts]
        if step.has_rows:
            s.finish(0, step, [1] * len(step.sampled))

    assert [c[1:] for c in chunks if c[0] == 0] == [(0, 4, False), (4, 6, False), (10, 4, True)]
    assert all(remote for arrival, _, _, remote in chunks if arrival == 1)
    assert s.free_blocks == 64


def test_without_a_place_to_keep_chunks_only_the_first_one_stays() -> None:
    """Without ``keep_chunks`` only the first chunk of a prompt is local, and the others read their past remotely."""
    s = scheduler(prefill_tokens=8, remote_tokens=4, keep_chunks=False)
    s.submit(make(18, 2))
    chunks: list[tuple[int, int, bool]] = []
    while step := s.next_step(0):
        for request in step.changes.reservations:
            s.confirm(request)
        chunks += [(c.start, len(c.tokens), c.remote) for c in step.prompts]
        if step.has_rows:
            s.finish(0, step, [1] * len(step.sampled))

    assert chunks == [(0, 8, False), (8, 4, True), (12, 4, True), (16, 2, True)]
