"""Sequences change where they lie, and every step still finds each position of its past once, whatever happens."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.errors import CapacityError, MoveError
from lamina.front.blocks import BlockManager
from lamina.front.cost import CostModel
from lamina.front.pool import Movable, NodeLoad, propose
from lamina.front.prefix import PrefixKeys
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, ReservationRequest, ScheduledStep, Sequence, Transfer
from lamina.front.tables import IN_ORDER, part_of
from lamina.wire.placement import Placement, RemoteRun, route
from lamina.wire.requests import Request

BLOCK = 4
KEYS = PrefixKeys(model="m", dtype="float32", kv_dtype="float32", block_tokens=BLOCK)


def make(prompt: int | list[int], max_tokens: int, **more: Any) -> Sequence:
    tokens = [(i + 7 * prompt) % 50 for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(Request(tokens, max_tokens, **more), tokens, max_tokens, frozenset())


# -- memory nodes

Block = list[tuple[int, int]]
"""The positions that are stored in a block, and their tokens."""


@dataclass
class Table:
    """What a memory node has of a sequence: its blocks, and for how many it has set space aside."""

    blocks: list[Block]
    space: int

    @property
    def positions(self) -> list[tuple[int, int]]:
        return [position for block in self.blocks for position in block]

    def store(self, at: int, position: int, token: int) -> None:
        if at == len(self.positions):
            if not self.blocks or len(self.blocks[-1]) == BLOCK:
                self.blocks.append([])
            self.blocks[-1].append((position, token))
        assert self.positions[at] == (position, token)
        assert len(self.blocks) <= self.space


@dataclass
class MemoryNode:
    """A memory node that keeps account of its blocks as a real one does, and knows what is in them."""

    capacity: int
    tables: dict[int, Table] = field(default_factory=dict)
    brought: dict[int, list[Block]] = field(default_factory=dict)
    """What transfers have brought, or will bring, by the number of their object."""
    found: dict[bytes, Block] = field(default_factory=dict)

    def reserve(self, id_: int, tokens: int, keys: list[bytes]) -> int:
        """Set space aside; returns how many positions are shared."""
        space = -(-tokens // BLOCK)
        if id_ in self.tables:
            assert self.tables[id_].space <= space
            self.tables[id_].space = space
            self.check()
            return 0
        shared = next((i for i, key in enumerate(keys) if key not in self.found), len(keys))
        self.tables[id_] = Table([list(self.found[key]) for key in keys[:shared]], space)
        self.check()
        return shared * BLOCK

    def derive(
        self, id_: int, tokens: int, parent: int | None, without: tuple[int, int] | None, brought: int | None
    ) -> int:
        assert id_ not in self.tables
        blocks = list(self.tables[parent].blocks) if parent is not None else []
        if without is not None:
            assert all(len(block) == BLOCK for block in blocks[without[0] : sum(without)])
            del blocks[without[0] : sum(without)]
        if brought is not None:
            blocks = self.brought.pop(brought) + blocks
        self.tables[id_] = Table([block for block in blocks if block], -(-tokens // BLOCK))
        self.check()
        return len(self.tables[id_].positions)

    def check(self) -> None:
        """No more blocks are held than there are; those that sequences share count once."""
        held = {id(block) for table in self.tables.values() for block in table.blocks}
        held |= {id(block) for blocks in self.brought.values() for block in blocks}
        promised = sum(table.space - len(table.blocks) for table in self.tables.values())
        assert all(table.space >= len(table.blocks) for table in self.tables.values())
        assert len(held) + promised <= self.capacity


class Cluster:
    """A scheduler and memory nodes. Every token is a function of its sequence and position."""

    def __init__(self, capacity: dict[int, int], *, partition: Any = "requests", batches: int = 1, **more: Any) -> None:
        self.nodes = {member: MemoryNode(blocks) for member, blocks in capacity.items()}
        self.capacity = capacity
        limits = {"max_batch": 6, "prefill_tokens": 64, "ahead_blocks": 1, "max_waiting": 99, "remote_tokens": 8}
        self.manager = BlockManager(capacity, BLOCK, partition, moves=True)
        self.manager._stripe = 2 * BLOCK  # stripes that short sequences have as well
        self.scheduler = Scheduler(batches=batches, block_manager=self.manager, prefix=KEYS, **{**limits, **more})
        self.steps: list[ScheduledStep | None] = [None] * batches
        self.requested: list[ReservationRequest] = []
        self.transfers: list[Transfer] = []
        self.live: list[Sequence] = []
        self.answered = 0

    def submit(self, sequence: Sequence) -> Sequence:
        self.scheduler.submit(sequence)
        self.live.append(sequence)
        return sequence

    @property
    def running(self) -> list[Sequence]:
        return [s for s in self.live if s.slot >= 0]

    @staticmethod
    def token(sequence: Sequence) -> int:
        return (sequence.arrival + sequence.context) % 3

    # -- what the memory nodes are told

    def tell(self, changes: CacheChanges) -> None:
        for publication in changes.published:
            for member in publication.placement.all_members:
                table = self.nodes[member].tables.get(publication.id)
                if table is None:
                    continue  # it was lost
                runs = publication.order.runs_on(
                    publication.placement, member, publication.keys, BLOCK, publication.first
                )
                for first, keys in runs:
                    for key, block in zip(keys, table.blocks[first : first + len(keys)], strict=True):
                        assert len(block) == BLOCK
                        assert publication.keys[block[0][0] // BLOCK - publication.first] == key
                        self.nodes[member].found.setdefault(key, block)
        for id_ in changes.released:
            for node in self.nodes.values():
                node.tables.pop(id_, None)
        for transfer in changes.dropped:
            self.transfers = [t for t in self.transfers if t is not transfer]
            self.nodes[transfer.target].brought.pop(id(transfer), None)
        for transfer in changes.transfers:
            table = self.nodes[transfer.source].tables[transfer.id]
            blocks = table.blocks[transfer.first : transfer.first + transfer.blocks]
            assert [len(block) for block in blocks] == [BLOCK] * transfer.blocks
            assert [p for block in blocks for p, _ in block] == [p for a, b in transfer.ranges for p in range(a, b)]
            self.nodes[transfer.target].brought[id(transfer)] = [list(block) for block in blocks]
            self.nodes[transfer.target].check()
            self.transfers.append(transfer)
        self.requested += changes.reservations

    def answer(self, which: int = 0, *, refuse: bool = False) -> None:
        """Let the memory nodes answer a reservation."""
        request = self.requested.pop(which)
        if not request.is_current:
            return
        if request.succession is not None:
            if refuse:
                self.tell(self.scheduler.refuse(request))
                return
            self.succeed(request)
            self.tell(self.scheduler.confirm(request))
            return
        place = request.placement
        found = {}
        keys = request.keys
        while True:
            for member in place.all_members:
                tokens = place.held(member, request.tokens)
                if tokens > place.held(member, request.reserved):
                    found[member] = self.nodes[member].reserve(request.id, tokens, place.keys_on(member, keys, BLOCK))
            shared = place.usable(len(keys) * BLOCK, found)
            if all(n == place.held(member, shared) for member, n in found.items()):
                break
            keys = keys[: shared // BLOCK]
            for node in self.nodes.values():
                node.tables.pop(request.id, None)
        self.tell(self.scheduler.confirm(request, shared))

    def succeed(self, request: ReservationRequest) -> None:
        told = request.succession
        assert told is not None
        for member, tokens in request.placement.shares(request.tokens).items():
            if not tokens:
                continue
            transfer = told.transfer
            without = (transfer.first, transfer.blocks) if transfer and member == transfer.source else None
            brought = id(transfer) if transfer and member == transfer.target else None
            parent = told.parent if member in told.members else None
            there = self.nodes[member].derive(request.id, tokens, parent, without, brought)
            assert there == request.placement.held(member, told.stored)

    def end_transfer(self, which: int = 0, *, fails: bool = False) -> None:
        transfer = self.transfers.pop(which)
        if fails:
            del self.nodes[transfer.target].brought[id(transfer)]
        self.scheduler.mover.transferred(transfer, MoveError("no") if fails else None)

    # -- steps

    def begin(self, slot: int = 0) -> bool:
        first = min(self.running, key=lambda s: s.rank, default=None)
        parts = first is not None and bool(first.placement.moved)
        step = self.scheduler.next_step(slot)
        assert first is None or parts or first.slot >= 0  # the first by rank is not preempted, unless it lies in parts
        if step is None:
            return False
        self.tell(step.changes)
        if step.has_rows:
            self.steps[slot] = step
        return True

    def end(self, slot: int = 0) -> None:
        step, self.steps[slot] = self.steps[slot], None
        assert step is not None
        runs = [RemoteRun(r.sequence.id, r.sequence.placement, r.position, 1) for r in step.decode]
        runs += [
            RemoteRun(c.sequence.id, c.sequence.placement, c.start, len(c.tokens)) for c in step.prompts if c.remote
        ]
        sequences = [r.sequence for r in step.decode] + [c.sequence for c in step.prompts if c.remote]
        rows = [(s, p) for s, run in zip(sequences, runs, strict=True) for p in range(run.start, run.start + run.count)]
        self.attend(runs, sequences)
        for member, told in route(runs).items():
            numbers = iter(told.rows)
            for run in told.plan.storing:
                for i in range(run.count):
                    sequence, position = rows[next(numbers)]
                    token = (sequence.prompt + sequence.output)[position]
                    self.nodes[member].tables[run.sequence].store(run.start + i, position, token)
        for chunk in step.prompts:
            if chunk.remote:
                continue
            place = chunk.sequence.placement
            for start, count in place.divide(chunk.start, len(chunk.tokens)):
                for member in place.owners(start):
                    for p in range(start, start + count):
                        at, token = place.held(member, p), chunk.tokens[p - chunk.start]
                        self.nodes[member].tables[chunk.sequence.id].store(at, p, token)
        outcome = self.scheduler.finish(slot, step, [self.token(s) for s in step.sampled])
        self.tell(outcome.changes)
        for s in outcome.finished:
            self.live.remove(s)
            self.answered += 1
            start = len(s.prompt)
            assert s.output == [(s.arrival + p) % 3 for p in range(start, start + s.max_tokens)]

    def attend(self, runs: list[RemoteRun], sequences: list[Sequence]) -> None:
        """Every run finds each position before it once, with the right tokens."""
        seen: dict[int, list[tuple[int, int]]] = {run.sequence: [] for run in runs}
        for member, told in route(runs).items():
            for run in (*told.plan.storing, *told.plan.reading):
                seen[run.sequence] += self.nodes[member].tables[run.sequence].positions[: run.start]
        for run, sequence in zip(runs, sequences, strict=True):
            tokens = sequence.prompt + sequence.output
            assert sorted(seen[run.sequence]) == [(p, tokens[p]) for p in range(run.start)]

    def run(self, steps: int) -> None:
        """So many steps of slot 0, with all that is asked answered at once."""
        for _ in range(steps):
            self.begin()
            while self.requested:
                self.answer()
            if self.steps[0]:
                self.end()

    def settle(self) -> None:
        """Run until every sequence is over; then all space is free."""
        idle = 0
        while idle < 40:
            idle += 1
            while self.requested:
                self.answer()
            while self.transfers:
                self.end_transfer()
            for slot in range(len(self.steps)):
                if self.steps[slot]:
                    self.end(slot)
                    idle = 0
                idle = 0 if self.begin(slot) and self.steps[slot] else idle
        assert not self.live
        for member, node in self.nodes.items():
            assert not node.tables
            assert not node.brought
            assert self.manager.free_on(member) == node.capacity


# -- what a sequence does when its node is full


def test_sequences_that_outgrow_their_node_go_on_on_another() -> None:
    """Nothing is preempted while another node has space, and nothing is copied. Without moves one gives way."""
    preemptions = []
    for moves in (True, False):
        c = Cluster({1: 20, 2: 20})
        c.manager.can_move = moves
        for prompt, new in ((8, 40), (36, 24), (7, 40)):  # the first and the third lie on one node
            c.submit(make(prompt, new))
        c.settle()
        assert c.answered == 3
        assert (c.scheduler.mover.redirections > 0) == moves
        preemptions.append(c.scheduler.preemptions)
    assert preemptions[0] == 0 < preemptions[1]


def test_a_request_takes_space_on_several_nodes_if_none_has_enough() -> None:
    """It does not wait until one of them has, nor keep those behind it from being admitted."""
    c = Cluster({1: 20, 2: 20, 3: 20})
    for _ in range(3):
        c.submit(make(40, 12))
    big = c.submit(make(60, 4))
    c.run(3)

    assert big.slot == 0
    assert len(big.placement.all_members) == 3 - (big.placement.all_members == (1, 2))
    assert len(big.placement.all_members) > 1
    c.settle()
    assert c.answered == 4


def test_the_first_goes_on_when_all_nodes_are_full() -> None:
    """Those of a lower rank give way on any node, not only where it grows."""
    c = Cluster({1: 12, 2: 10, 3: 10}, max_batch=6)
    for n in range(8):
        c.submit(make(6 + n, 30))
    c.settle()

    assert c.answered == 8
    assert c.scheduler.mover.redirections > 0


# -- transfers


def decoding(c: Cluster, *sequences: Sequence) -> None:
    for sequence in sequences:
        c.submit(sequence)
    c.run(6)
    assert all(s.is_settled for s in sequences)


def move(c: Cluster, sequence: Sequence, source: int, target: int, blocks: int) -> Transfer:
    changes = CacheChanges()
    c.scheduler.mover.begin(sequence, source, target, blocks, changes)
    c.tell(changes)
    assert sequence.transfer is not None
    return sequence.transfer


def test_blocks_move_while_the_sequence_goes_on() -> None:
    """It gets tokens under its id until they are there, then under another one; what moved is free at the source."""
    c = Cluster({1: 30, 2: 30})
    s = make(40, 40)
    decoding(c, s)
    (source,) = s.placement.members
    target = 3 - source
    before, free, tokens = s.id, c.manager.free_on(source), len(s.output)
    move(c, s, source, target, 8)
    assert c.manager.free_on(target) == 22

    c.run(3)
    assert (s.id, len(s.output)) == (before, tokens + 3)
    c.end_transfer()
    c.begin()
    assert s.successor is not None
    assert c.steps[0] is None  # the sequence sits out
    c.run(2)

    assert s.id > before
    assert len(s.output) > tokens + 3
    assert s.placement == Placement((source,), moved=((0, 32, target),))
    assert c.manager.free_on(source) >= free + 6
    assert (c.scheduler.mover.moves, c.scheduler.mover.moved_blocks, c.scheduler.mover.failures) == (1, 8, 0)
    c.settle()


@pytest.mark.parametrize("what", ["fails", "refused", "cancelled", "target", "source", "preempted"])
def test_whatever_goes_wrong_leaves_the_sequence_as_it_was(what: str) -> None:
    """Blocks come free on both nodes, and the answer is the same."""
    c = Cluster({1: 30, 2: 30, 3: 30})
    s = make(40, 40)
    decoding(c, s)
    (source,) = s.placement.members
    target = source % 3 + 1
    placement, before = s.placement, s.id
    move(c, s, source, target, 8)
    if what == "fails":
        c.end_transfer(fails=True)
    else:
        c.end_transfer()
        c.begin()
        assert s.successor is not None
        if what == "refused":
            c.answer(refuse=True)
        elif what == "cancelled":
            c.scheduler.cancel(s)
            c.live.remove(s)
        elif what == "preempted":
            c.tell(c.scheduler.evict([s.id]))
        else:
            member = {"target": target, "source": source}[what]
            c.nodes[member] = MemoryNode(30)
            c.tell(c.scheduler.lose(member))
            c.scheduler.gain(member, 30)
    c.run(1)

    assert s.transfer is None
    assert s.successor is None
    assert c.scheduler.mover.moves == 0
    if what in ("fails", "refused", "target"):
        assert (s.placement, s.id) == (placement, before)
        assert c.scheduler.mover.failures == 1
        assert c.manager.free_on(target) == 30
    c.settle()
    assert c.answered == (what != "cancelled")


def test_moved_blocks_are_found_again() -> None:
    """A second request with the same beginning shares what lies together, and a third what was moved as well when it
    is placed there."""
    c = Cluster({1: 40, 2: 40}, max_batch=8)
    s = make(40, 40)
    decoding(c, s)
    (source,) = s.placement.members
    target = 3 - source
    move(c, s, source, target, 3)
    c.end_transfer()
    c.run(3)
    move(c, s, source, target, 2)
    c.end_transfer()
    c.run(3)
    assert s.placement.moved == ((0, 20, target),)
    assert s.order.ranges(s.placement, target, 40) == [(12, 20), (0, 12)]
    c.settle()

    keys = KEYS.keys(s.prompt + s.output)
    assert set(keys[:5]) <= c.nodes[target].found.keys()
    assert set(keys[:19]) <= c.nodes[source].found.keys() | c.nodes[target].found.keys()


def test_a_memory_node_is_drained() -> None:
    """What grows there goes on elsewhere, what lies there moves away, nothing new comes, and every answer is right."""
    c = Cluster({1: 40, 2: 40, 3: 40})
    running = [make(20 + n, 60) for n in range(4)]
    decoding(c, *running)
    c.scheduler.drain(2, 100)
    assert c.scheduler.draining[2] > 0
    late = c.submit(make(20, 40))
    steps = 0
    while c.scheduler.draining[2]:
        c.run(1)
        while c.transfers:
            c.end_transfer()
        steps += 1
        assert steps < 400
    assert all(s.finish_reason is None for s in running)
    assert 2 not in late.placement.all_members
    assert c.scheduler.mover.moves > 0
    assert c.scheduler.preemptions == 0
    c.tell(c.scheduler.lose(2))
    c.nodes.pop(2)
    c.settle()
    assert c.answered == 5


def test_what_finds_no_room_on_the_other_nodes_is_computed_anew() -> None:
    """After the caller's patience; no request fails."""
    c = Cluster({1: 20, 2: 20})
    running = [make(30, 40) for _ in range(2)]
    decoding(c, *running)
    c.scheduler.drain(1, 70)
    c.run(8)
    assert c.scheduler.draining[1] > 0
    c.tell(c.scheduler.evacuate(1))
    assert c.scheduler.draining[1] == 0
    c.tell(c.scheduler.lose(1))
    c.nodes.pop(1)
    c.settle()
    assert (c.answered, c.scheduler.preemptions) == (2, 0)


def test_a_memory_node_that_is_needed_is_not_drained() -> None:
    """Where the others could not hold one request, nothing changes."""
    c = Cluster({1: 20, 2: 30})
    with pytest.raises(CapacityError, match="can hold 80 tokens of one request, fewer than the context of 100"):
        c.scheduler.drain(2, 100)
    assert c.scheduler.draining == {}


# -- in which order blocks come in tables


@given(
    st.integers(0, 3),
    st.integers(0, 19),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 8), st.integers(1, 8)), max_size=8),
)
def test_the_front_knows_the_order_of_every_table(
    stripes: int, known: int, moves: list[tuple[int, int, int, int]]
) -> None:
    """Against tables that are made as memory nodes make them: what is brought comes first."""
    place, order, blocks = Placement((0, 1, 2), stripes * BLOCK) if stripes else Placement((0,)), IN_ORDER, 20
    tables = {m: [b for b in range(blocks) if m in place.owners(b * BLOCK)] for m in range(3)}
    for source, target, first, count in moves:
        taken = tables[source][first : first + count]
        if not taken or source == target:
            continue
        del tables[source][first : first + count]
        tables[target] = taken + tables[target]
        ranges = part_of(order.ranges(place, source, blocks * BLOCK), first * BLOCK, count * BLOCK)
        place, order = place.relocated(ranges, target), order.moved(ranges, source, target)

    keys = [bytes([b]) for b in range(blocks)]
    for member, table in tables.items():
        found = order.ranges(place, member, blocks * BLOCK)
        assert [p // BLOCK for start, stop in found for p in range(start, stop, BLOCK)] == table
        for first in (0, known):
            runs = order.runs_on(place, member, keys[first:], BLOCK, first)
            assert all(key == keys[table[n + i]] for n, run in runs for i, key in enumerate(run))
            assert sorted(key for _, run in runs for key in run) == sorted(keys[b] for b in table if b >= first)
        assert place.held(member, blocks * BLOCK) == len(table) * BLOCK


# -- what is worth moving


def measured(attention_s: float = 1e-5) -> CostModel:
    """A millisecond of compute for each row, and this for each position of context."""
    cost = CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        for context in (100, 1000):
            cost.observe(rows, 0, rows * context, 1e-3 * rows, attention_s * rows * context, 0.0)
    return cost


class State:
    """Memory nodes and the sequences on them, by their whole blocks; what is planned happens at once."""

    def __init__(self, capacity: dict[int, int], sequences: list[dict[int, int]], kept: int = 0) -> None:
        self.capacity, self.kept = capacity, kept
        self.blocks = [Counter(held) for held in sequences]
        self.sequences = [make(4, 900) for _ in sequences]
        for number, (sequence, held) in enumerate(zip(self.sequences, sequences, strict=True)):
            sequence.placement, sequence.arrival = Placement((max(held, key=lambda m: (held[m], m)),)), number

    def plan(
        self, cost: CostModel, *, draining: tuple[int, ...] = (), most: int = 1
    ) -> list[tuple[int, int, int, int]]:
        nodes = {}
        for member, total in self.capacity.items():
            held = [blocks[member] for blocks in self.blocks]
            used, rows = sum(held), sum(map(bool, held))
            nodes[member] = NodeLoad(total, total - used, rows, used * BLOCK, kept=self.kept * rows)
        movable = [
            Movable(s, {m: n for m, n in b.items() if n}) for s, b in zip(self.sequences, self.blocks, strict=True)
        ]
        found = propose(nodes, movable, cost, rows=len(movable), block_tokens=BLOCK, draining=draining, most=most)
        return [(self.sequences.index(s), source, target, n) for s, source, target, n in found]

    def move(self, sequence: int, source: int, target: int, blocks: int) -> None:
        self.blocks[sequence][source] -= blocks
        self.blocks[sequence][target] += blocks
        for member, total in self.capacity.items():
            assert sum(held[member] for held in self.blocks) <= total


def test_a_slow_node_moves_its_longest_sequence_to_the_emptiest() -> None:
    """As much as makes the two of them equally fast, to a power of two."""
    state = State({1: 400, 2: 400, 3: 400}, [{1: 100}, {1: 200}, {2: 100}, {3: 40}])

    assert state.plan(measured()) == [(1, 1, 3, 128)]
    assert state.plan(measured(), most=2)[1:] == []  # one transfer at a time for each node


def test_nothing_moves_where_little_is_gained() -> None:
    """Where attention takes next to no time, or all nodes have the same to do."""
    assert State({1: 400, 2: 400}, [{1: 300}, {2: 40}]).plan(measured(1e-9)) == []
    assert State({1: 400, 2: 400}, [{1: 100}, {2: 95}]).plan(measured()) == []


def test_a_full_node_gives_to_one_with_space() -> None:
    """Also where that makes nothing faster, as one of its sequences would soon have to go elsewhere; but not where it
    makes the steps slower."""
    small_and_full = State({1: 50, 2: 400}, [{1: 50}, {2: 60}], kept=4)
    assert small_and_full.plan(measured(1e-9)) == [(0, 1, 2, 32)]
    assert small_and_full.plan(measured()) == []


def test_what_drains_moves_first() -> None:
    """Whatever it costs, and only what does not grow there; as much as fits."""
    state = State({1: 400, 2: 60, 3: 50}, [{1: 100}, {2: 50}, {1: 30, 3: 20}])
    state.sequences[2].placement = Placement((3,), moved=((0, 120, 1),))
    assert state.plan(measured(), draining=(1,)) == [(2, 1, 3, 30)]
    state.sequences[0].placement = Placement((2,), moved=((0, 400, 1),))
    assert state.plan(measured(), draining=(1,)) == [(0, 1, 3, 30)]


@given(st.data())
def test_nothing_moves_to_and_fro(data: st.DataObject) -> None:
    """If nothing else changes, moves come to an end, whatever there is at first and however much they gain."""
    capacity = {m: data.draw(st.integers(1, 300)) for m in range(data.draw(st.integers(2, 4)))}
    left, sequences = dict(capacity), []
    for _ in range(data.draw(st.integers(0, 8))):
        member = data.draw(st.sampled_from(sorted(left)))
        if left[member]:
            sequences.append({member: data.draw(st.integers(1, left[member]))})
            left[member] -= sequences[-1][member]
    state = State(capacity, sequences, kept=data.draw(st.integers(0, 3)))
    cost = measured(data.draw(st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3])))

    for _ in range(60):
        planned = state.plan(cost, most=2)
        if not planned:
            return
        assert len({m for _, source, target, _ in planned for m in (source, target)}) == 2 * len(planned)
        for sequence, source, target, blocks in planned:
            state.move(sequence, source, target, blocks)
    raise AssertionError("blocks move for ever")


# -- any order of events


class Traffic(RuleBasedStateMachine):
    """Random requests, steps, transfers, answers and losses of several batches at once."""

    @initialize(
        batches=st.integers(1, 2),
        blocks=st.lists(st.integers(6, 24), min_size=2, max_size=4),
        partition=st.sampled_from(["requests", "tokens"]),
        ahead=st.integers(1, 2),
    )
    def start(self, batches: int, blocks: list[int], partition: str, ahead: int) -> None:
        capacity = dict(enumerate(blocks, start=1))
        self.c = Cluster(capacity, partition=partition, batches=batches, ahead_blocks=ahead)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=40), new=st.integers(1, 40), low=st.booleans())
    def submit(self, prompt: list[int], new: int, low: bool) -> None:
        if len(prompt) + new <= self.c.manager.max_context:
            self.c.submit(make(prompt, new, priority=-int(low)))

    @rule(slot=st.integers(0, 1), steps=st.integers(1, 9))
    def go_on(self, slot: int, steps: int) -> None:
        slot %= len(self.c.steps)
        for _ in range(steps):
            if self.c.steps[slot]:
                self.c.end(slot)
            else:
                self.c.begin(slot)
            if steps > 2:
                while self.c.requested:
                    self.c.answer()

    @precondition(lambda self: self.c.requested)
    @rule(refuse=st.sampled_from([False, False, True]))
    def answer(self, refuse: bool) -> None:
        self.c.answer(refuse=refuse)

    def movable(self) -> list[tuple[Sequence, int, int]]:
        """Sequences that can move whole blocks, with the member that has them, and how many."""
        return [
            (s, member, tokens // BLOCK)
            for s in self.c.running
            if self.c.scheduler.mover.can_begin(s)
            for member, tokens in s.placement.shares(s.stored).items()
            if tokens >= BLOCK
        ]

    @precondition(lambda self: self.movable() and len(self.c.manager.members) > 1)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        sequence, source, most = data.draw(st.sampled_from(self.movable()))
        target = data.draw(st.sampled_from([m for m in self.c.manager.members if m != source]))
        changes = CacheChanges()
        self.c.scheduler.mover.begin(sequence, source, target, data.draw(st.integers(1, most)), changes)
        self.c.tell(changes)

    @precondition(lambda self: self.c.transfers)
    @rule(fails=st.sampled_from([False, False, True]))
    def end_transfer(self, fails: bool) -> None:
        self.c.end_transfer(fails=fails)

    @precondition(lambda self: self.c.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.c.live))
        self.c.scheduler.cancel(sequence)
        self.c.live.remove(sequence)

    @rule(member=st.integers(1, 4))
    def lose(self, member: int) -> None:
        """A node is lost, and comes back with nothing."""
        c = self.c
        if member not in c.nodes:
            return
        c.nodes[member] = MemoryNode(c.capacity[member])
        c.tell(c.scheduler.lose(member))
        for slot, step in enumerate(c.steps):
            if step and any(s.evicted for s in _sequences(step)):
                c.steps[slot] = None
                c.tell(c.scheduler.give_up(slot))
        c.scheduler.gain(member, c.capacity[member])

    @rule(member=st.integers(1, 4))
    def drain(self, member: int) -> None:
        most = max((s.max_context for s in self.c.live), default=1)
        if member in self.c.nodes and not self.c.scheduler.draining:
            with contextlib.suppress(CapacityError):
                self.c.scheduler.drain(member, most)

    @precondition(lambda self: self.c.scheduler.draining)
    @rule()
    def evacuate(self) -> None:
        (member,) = self.c.scheduler.draining
        self.c.tell(self.c.scheduler.evacuate(member))

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        """No node has fewer free blocks than the block manager counts."""
        for member, node in self.c.nodes.items():
            node.check()
            assert 0 <= self.c.manager.free_on(member) <= node.capacity

    def teardown(self) -> None:
        if hasattr(self, "c"):
            for member in self.c.scheduler.draining:
                self.c.manager.draining.discard(member)
            self.c.settle()


def _sequences(step: ScheduledStep) -> Iterator[Sequence]:
    for part in (*step.decode, *step.prompts):
        yield part.sequence


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
