"""Blocks that move from one cache to another, and sequences that are made of blocks that are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lamina.attention import Backend, ExtentPool, KVCache, KVLayout, LayerShape, Memory, Rows, Run
from lamina.attention.layout import SCALED, plain_parts
from lamina.attention.placement import Integers
from lamina.errors import CapacityError, UsageError
from tests.attention.backends import TORCH, Target, every_target, every_type, examples
from tests.attention.oracle import assert_close, dequantised, exact_rows
from tests.attention.readback import Stored, read
from tests.attention.steps import Step, steps
from tests.attention.test_cache import FULL, SLIDING, WIDE, layer_bytes, make, store, table_of
from tests.attention.test_stored import PLAIN, assert_same_stored, part, unwindowed

TRANSFER = 7


def plain_of(backend: Backend, layer: int, blocks: Integers) -> Tensor:
    """What blocks hold in a layer, in the plain form; whatever `read` leaves out is 0xAA."""
    layout = backend.cache.layout
    nbytes = sum(plain_parts(layout.layers[layer], layout.dtype, layout.block_tokens))
    plain = torch.full((len(blocks), nbytes), 0xAA, dtype=torch.uint8)
    backend.read(layer, blocks, plain)
    return plain


def copy(source: Backend, target: Backend, blocks: list[Integers], into: list[Integers]) -> None:
    """Copy blocks, given by group, from one cache into another."""
    for layer in range(len(source.cache.layout.layers)):
        plain = plain_of(source, layer, blocks[source.cache.group_of(layer)])
        target.write(layer, into[target.cache.group_of(layer)], plain)


def parsed(plain: Tensor, shape: LayerShape, layout: KVLayout) -> Stored:
    """The positions of blocks in the plain form, as `plain_parts` describes it."""
    dtype, size, heads = getattr(torch, layout.dtype), layout.block_tokens, shape.kv_heads
    rows = [(dtype, (heads, shape.qk_dim)), (dtype, (heads, shape.v_dim))]
    rows += [(torch.float32, (heads,))] * 2 if layout.dtype in SCALED else []
    parts, start = [], 0
    for (of, row), nbytes in zip(rows, plain_parts(shape, layout.dtype, size), strict=True):
        used = size * int(np.prod(row)) * of.itemsize
        parts.append(plain[:, start : start + used].contiguous().view(of).view(-1, *row))
        start += nbytes
    return Stored(*parts)


@every_type
@settings(max_examples=examples(8), deadline=None)
@given(data=st.data())
def test_moved_blocks_are_the_same_bits(target: Target, dtype: str, data: st.DataObject) -> None:
    """From every backend to the reference and back again, whatever their blocks look like."""
    step = unwindowed(data.draw(steps(target, dtype, work=4e6, longest=600)))
    size = step.layout.block_tokens
    full = [(run.sequence, run.start // size) for run in step.rows.runs if run.start >= size]
    if not full:
        return
    sequence, complete = data.draw(st.sampled_from(full))
    first = data.draw(st.integers(0, complete - 1))
    count = data.draw(st.integers(1, complete - first))
    span = range(first * size, (first + count) * size)
    with (
        step.prepared(target) as source,
        TORCH.open(step.layout, count * size) as middle,
        target.open(step.layout, count * size) as end,
    ):
        before = [read(source, sequence, layer, span.start, span.stop) for layer in step.layers]
        blocks = source.cache.full_blocks(sequence, first, count)
        for layer in step.layers:
            plain = plain_of(source, layer, blocks[source.cache.group_of(layer)])
            assert_same_stored(parsed(plain, step.layout.layers[layer], step.layout), before[layer])
        for one, other in ((source, middle), (middle, end)):
            other.cache.transfers.expect(TRANSFER, count)
            copy(one, other, blocks, blocks := other.cache.transfers.blocks(TRANSFER))
            assert other.cache.derive(0, count * size, transfer=TRANSFER) == count * size
            for layer in step.layers:
                assert_same_stored(read(other, 0, layer, 0, count * size), before[layer])
        for layer in step.layers:  # nothing else was touched
            assert_same_stored(read(source, sequence, layer, span.start, span.stop), before[layer])


@every_type
@settings(max_examples=examples(8), deadline=None)
@given(data=st.data())
def test_a_derived_sequence_attends_to_what_it_consists_of(target: Target, dtype: str, data: st.DataObject) -> None:
    """Blocks of another cache, then those of its parent that were not left out, its tail, and new tokens."""
    step = unwindowed(data.draw(steps(target, dtype, work=4e6, longest=400)))
    size = step.layout.block_tokens
    run = step.rows.runs[0]
    first = data.draw(st.integers(0, run.start // size))
    count = data.draw(st.integers(0, run.start // size - first))
    extra = data.draw(st.integers(0, 3))
    left = run.start - count * size
    elsewhere = Step(step.layout, ((extra + 1) * size,), (1,), seed=step.seed + 1)
    total = extra * size + left + run.count
    with step.prepared(target) as backend, elsewhere.prepared(TORCH) as other:
        for more in step.rows.runs[1:]:
            backend.cache.release(more.sequence)
        transfer = None
        if extra:
            backend.cache.transfers.expect(TRANSFER, extra)
            transfer = TRANSFER
            copy(other, backend, other.cache.full_blocks(0, 1, extra), backend.cache.transfers.blocks(TRANSFER))
        complete = backend.cache.derive(99, total, parent=0, without=(first, count), transfer=transfer)
        assert complete == extra * size + left
        rows = Rows((Run(99, complete, run.count),))
        plan = backend.plan(rows)
        for layer, shape in enumerate(step.layout.layers):
            own = dequantised(read(backend, 0, layer, 0, run.start)) if run.start else _nothing(shape)
            moved = dequantised(read(other, 0, layer, size, (extra + 1) * size)) if extra else _nothing(shape)
            inputs = step.inputs(layer)
            q, new = inputs.q[: run.count], (inputs.k[0][run.start :], inputs.v[0][run.start :])
            past = backend.past(plan, layer, q)
            whole = backend.finish(plan, layer, q, *new, past)
            stored = dequantised(read(backend, 99, layer, complete, complete + run.count))
            k, v = (
                torch.cat([m, o[: first * size], o[(first + count) * size :], n])
                for m, o, n in zip(moved, own, stored, strict=True)
            )
            tolerance = target.tolerance(dtype, shape.v_dim)
            assert_close(past, exact_rows(q, complete, k, v, range(complete), shape), tolerance)
            assert_close(whole, exact_rows(q, complete, k, v, range(len(k)), shape, sinks=True), tolerance)


def _nothing(shape: LayerShape) -> tuple[Tensor, Tensor]:
    k, v = (torch.zeros(0, shape.kv_heads, dim, dtype=torch.float64) for dim in (shape.qk_dim, shape.v_dim))
    return k, v


@every_target
def test_full_blocks_of_a_derived_sequence_are_not_overwritten(target: Target) -> None:
    """What comes for positions below the watermark is dropped, but in the block that is not full."""
    layout = KVLayout(layers=(PLAIN,), dtype="float32")
    size = layout.block_tokens
    step = Step(layout, (2 * size + 5,), (1,), device=target.device)
    other = Step(layout, (2 * size + 5,), (1,), seed=1, device=target.device)
    with target.open(layout, 6 * size) as backend:
        step.fill(backend)
        before = read(backend, 0, 0, 0, 2 * size + 5)
        backend.cache.derive(1, 3 * size, parent=0)
        _, (k,), (v,) = other.inputs(0)

        backend.append(0, Rows((Run(1, 0, len(k)),)), k, v)

        now = read(backend, 1, 0, 0, len(k))
        assert_same_stored(part(now, slice(0, 2 * size)), part(before, slice(0, 2 * size)))
        assert torch.equal(now.k[2 * size :].cpu(), k[2 * size :].cpu())


@every_target
def test_blocks_of_another_size_are_refused(target: Target) -> None:
    layout = KVLayout(layers=(PLAIN,), dtype="float32")
    with target.open(layout, 64) as backend:
        backend.cache.transfers.expect(TRANSFER, 2)
        (blocks,) = backend.cache.transfers.blocks(TRANSFER)
        nbytes = sum(plain_parts(PLAIN, "float32", layout.block_tokens))
        for plain in (torch.zeros(2, nbytes - 64, dtype=torch.uint8), torch.zeros(1, nbytes, dtype=torch.uint8)):
            with pytest.raises(UsageError, match=rf"layer 0: expected blocks of shape \[2, {nbytes}\]"):
                backend.write(0, blocks, plain)
        with pytest.raises(UsageError, match="expected blocks that lie one after the other"):
            backend.read(0, blocks, torch.zeros(2, 2 * nbytes, dtype=torch.uint8)[:, :nbytes])


# -- the account


def test_blocks_behind_windows_stay_where_they_are() -> None:
    cache = make(4, layers=(FULL, SLIDING))
    cache.reserve(0, 4)

    for operation in (lambda: cache.derive(1, 4, parent=0), lambda: cache.full_blocks(0, 0, 1)):
        with pytest.raises(UsageError, match="cannot be moved or derived, as attention depends on positions"):
            operation()


def test_only_full_blocks_are_left_out() -> None:
    """A layer that is behind decides, and nothing has changed after a refusal."""
    cache = make(8, layers=(FULL, WIDE))
    cache.reserve(0, 12)
    store(cache, 0, Run(0, 0, 9))
    store(cache, 1, Run(0, 0, 7))
    free = cache.free_tokens

    for without, stop in (((1, 1), 2), ((0, 2), 2), ((2, 1), 3)):
        with pytest.raises(UsageError, match=f"sequence 0 has 1 full blocks; expected {stop} at least"):
            cache.derive(1, 12, parent=0, without=without)
    assert cache.free_tokens == free
    assert cache.derive(1, 12, parent=0, without=(0, 1)) == 3
    assert [cache.filled(1, layer) for layer in (0, 1)] == [5, 3]
    assert table_of(cache, 1, 0)[:2].tolist() == table_of(cache, 0, 0)[1:3].tolist()


def test_what_is_derived_from_nothing_is_refused() -> None:
    cache = make(4, layers=(FULL,))
    cache.reserve(0, 8)
    store(cache, 0, Run(0, 0, 8))
    cache.transfers.expect(TRANSFER, 1)
    free = cache.free_tokens

    for wanted, words in (
        ({}, "sequence 1 is derived from neither a parent nor a transfer"),
        ({"parent": 5}, "sequence 5 holds no reservation"),
        ({"transfer": 8}, "transfer 8 is not expected"),
        ({"parent": 0, "transfer": TRANSFER, "tokens": 8}, "sequence 1 has 3 blocks of 4, but space for 8 tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            cache.derive(1, wanted.pop("tokens", 12), **wanted)
    assert cache.free_tokens == free
    assert list(cache.sequences) == [0]
    with pytest.raises(UsageError, match="transfer 7 is expected already"):
        cache.transfers.expect(TRANSFER, 1)
    with pytest.raises(CapacityError, match="transfer 8 needs 2 blocks of KV cache, 1 are free"):
        cache.transfers.expect(8, 2)


@dataclass
class Derivable:
    """What the model knows of a sequence: its blocks, each a list of what its positions hold, and its watermark."""

    tokens: int
    blocks: list[list[int]]
    filled: int = 0
    frozen: int = 0


class MovesMachine(RuleBasedStateMachine):
    """Any use of one cache by sequences that are reserved, derived, published and released, and by transfers.

    The model has the blocks as objects, which several sequences may hold; what is written to a position is a number
    that is never used again. Of one kind of layers, the count of free blocks is exact.
    """

    @initialize(
        block_tokens=st.integers(1, 4),
        extents=st.integers(4, 24),
        layers=st.sampled_from([(FULL,), (FULL, FULL), (FULL, WIDE)]),
    )
    def start(self, block_tokens: int, extents: int, layers: tuple[LayerShape, ...]) -> None:
        layout = KVLayout(layers=layers, dtype="float32", block_tokens=block_tokens)
        self.size, self.layers = block_tokens, len(layers)
        self.cache = KVCache(layout, ExtentPool(Memory(extents * 384), extent_bytes=384), layer_bytes)
        self.held: dict[int, Derivable] = {}
        self.moving: dict[int, list[list[int]]] = {}
        self.written: dict[tuple[int, int], int] = {}
        """By byte offset of a block and position in it: what the first layer holds there."""
        self.last = 0
        self.published: dict[bytes, list[int]] = {}

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    @property
    def capacity(self) -> int:
        return self.cache.capacity_tokens // self.size

    @property
    def free(self) -> int:
        """Blocks that nobody holds and that are set aside for nobody."""
        taken = {id(block) for held in self.held.values() for block in held.blocks}
        taken |= {id(block) for blocks in self.moving.values() for block in blocks}
        promised = sum(self.blocks_for(held.tokens) - len(held.blocks) for held in self.held.values())
        return self.capacity - len(taken) - promised

    def new(self) -> int:
        self.last += 1
        return self.last

    def key(self, block: list[int]) -> bytes:
        return repr(block).encode().ljust(16, b".")[-16:]

    @rule(sequence=st.integers(0, 5), tokens=st.integers(1, 20))
    def reserve(self, sequence: int, tokens: int) -> None:
        if sequence in self.held:
            return
        fits = self.blocks_for(tokens) <= self.free
        try:
            self.cache.reserve(sequence, tokens)
        except CapacityError:
            assert not fits or len(self.cache.groups) > 1
        else:
            assert fits
            self.held[sequence] = Derivable(tokens, [])

    @rule(transfer=st.integers(0, 3), blocks=st.integers(1, 5))
    def expect(self, transfer: int, blocks: int) -> None:
        if transfer in self.moving:
            with pytest.raises(UsageError, match=f"transfer {transfer} is expected already"):
                self.cache.transfers.expect(transfer, blocks)
            return
        fits = blocks <= self.free
        try:
            self.cache.transfers.expect(transfer, blocks)
        except CapacityError:
            assert not fits or len(self.cache.groups) > 1
            return
        assert fits
        self.moving[transfer] = [[self.new() for _ in range(self.size)] for _ in range(blocks)]
        offsets = self.cache.transfers.blocks(transfer)[0].tolist()
        for offset, block in zip(offsets, self.moving[transfer], strict=True):
            for within, number in enumerate(block):
                self.written[offset, within] = number

    @precondition(lambda self: self.moving)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.moving)))
        self.cache.transfers.forget(transfer)
        del self.moving[transfer]

    @precondition(lambda self: self.held or self.moving)
    @rule(data=st.data(), sequence=st.integers(0, 9), more=st.integers(-3, 9))
    def derive(self, data: st.DataObject, sequence: int, more: int) -> None:
        if sequence in self.held:
            return
        parent = data.draw(st.none() | st.sampled_from(sorted(self.held)) if self.held else st.none())
        transfer = data.draw(st.none() | st.sampled_from(sorted(self.moving)) if self.moving else st.none())
        known = None if parent is None else self.held[parent]
        full = 0 if known is None else known.filled // self.size
        first = data.draw(st.integers(0, full))
        count = data.draw(st.integers(0, full - first))
        kept = [] if known is None else known.blocks[:first] + known.blocks[first + count :]
        moved = [] if transfer is None else self.moving[transfer]
        filled = len(moved) * self.size + (0 if known is None else known.filled - count * self.size)
        tokens = max(1, filled + more)
        possible = (known or moved) and filled <= tokens and len(moved) + len(kept) <= self.blocks_for(tokens)
        fits = self.blocks_for(tokens) - len(moved) - len(kept) <= self.free
        before = self.cache.free_tokens
        try:
            found = self.cache.derive(sequence, tokens, parent=parent, without=(first, count), transfer=transfer)
        except UsageError:
            assert not possible
            assert self.cache.free_tokens == before
        except CapacityError:
            assert possible
            assert not fits or len(self.cache.groups) > 1
            assert self.cache.free_tokens == before
        else:
            assert possible
            assert fits
            assert found == filled
            self.held[sequence] = Derivable(tokens, moved + kept, filled, filled // self.size * self.size)
            self.moving.pop(transfer, None)  # type: ignore[arg-type]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 6), back=st.sampled_from([0, 0, 0, 2, 9]))
    def append(self, data: st.DataObject, count: int, back: int) -> None:
        """One sequence goes on, or overwrites. A last block that is not full and is shared has one writer."""
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[sequence]
        start = max(0, held.filled - back)
        stop = min(held.tokens, start + count)
        if start >= stop:
            return
        others = {id(b) for s, o in self.held.items() if s != sequence for b in o.blocks[o.filled // self.size :]}
        others |= {id(b) for s, o in self.held.items() if s != sequence for b in o.blocks if len(b) < self.size}
        tail = held.blocks[start // self.size :]
        if any(id(block) in others for block in tail):
            return  # the front lets only one of both go on
        placement = store(self.cache, 0, Run(sequence, start, stop - start))
        for layer in range(1, self.layers):
            store(self.cache, layer, Run(sequence, start, stop - start))
        assert placement.frozen.tolist() == [held.frozen]
        while len(held.blocks) < self.blocks_for(stop):
            held.blocks.append([])
        (table,) = placement.tables(0)
        for position in range(start, stop):
            if position < held.frozen:
                continue
            block, within, number = held.blocks[position // self.size], position % self.size, self.new()
            block[within : within + 1] = [number]
            self.written[int(table[position // self.size]), within] = number
        held.filled = max(held.filled, stop)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[sequence]
        count = data.draw(st.integers(0, held.filled // self.size))
        keys = [self.key(block) for block in held.blocks[:count]]
        self.cache.publish(sequence, keys)
        held.frozen = max(held.frozen, count * self.size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        self.cache.release(sequence)
        del self.held[sequence]

    @invariant()
    def every_sequence_has_what_it_consists_of(self) -> None:
        for sequence, held in getattr(self, "held", {}).items():
            assert self.cache.complete(sequence) == held.filled
            table = table_of(self.cache, sequence, 0)
            for position in range(held.filled):
                within = position % self.size
                content = self.written[int(table[position // self.size]), within]
                assert content == held.blocks[position // self.size][within]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "held"):
            return
        assert set(self.cache.sequences) == set(self.held)
        assert len(self.cache.transfers) == len(self.moving)
        if len(self.cache.groups) == 1:
            assert self.cache.free_tokens == self.free * self.size
        elif not self.held and not self.moving:
            assert self.cache.free_tokens == self.cache.capacity_tokens

    def teardown(self) -> None:
        """Nothing has leaked: when all is released, the cache can be filled to the last block, twice."""
        if not hasattr(self, "held"):
            return
        for sequence in self.held:
            self.cache.release(sequence)
        for transfer in self.moving:
            self.cache.transfers.forget(transfer)
        for sequence in (98, 99):
            self.cache.reserve(sequence, self.cache.capacity_tokens)
            for layer in range(self.layers):
                store(self.cache, layer, Run(sequence, 0, self.cache.capacity_tokens))
            self.cache.release(sequence)


TestMoves = MovesMachine.TestCase
TestMoves.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
