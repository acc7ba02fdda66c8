from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lamina.attention import KVCache, KVLayout, LayerShape, Rows, Run
from lamina.errors import CapacityError, UsageError

LAYERS = (
    LayerShape(q_heads=2, kv_heads=2, qk_dim=3, v_dim=1, scale=1.0),
    LayerShape(q_heads=1, kv_heads=1, qk_dim=1, v_dim=2, scale=1.0, window=2),
)


def layout(block_tokens: int = 4) -> KVLayout:
    return KVLayout(layers=LAYERS, dtype="float32", block_tokens=block_tokens)


def marked(layer: int, marks: list[int]) -> tuple[Tensor, Tensor]:
    """k and v whose every number is the row's mark."""
    shape, mark = LAYERS[layer], torch.tensor(marks, dtype=torch.float32).view(-1, 1, 1)
    return mark.expand(-1, shape.kv_heads, shape.qk_dim), mark.expand(-1, shape.kv_heads, shape.v_dim)


def stored(cache: KVCache, layer: int, sequence: int, tokens: int) -> list[int]:
    """The marks of the first ``tokens`` positions, from the keys and the values alike."""
    slots = cache.place(Rows((Run(sequence, 0, tokens),))).slots
    numbers = torch.cat([cache.keys[layer][slots].flatten(1), cache.values[layer][slots].flatten(1)], dim=1)
    assert (numbers == numbers[:, :1]).all()
    return numbers[:, 0].int().tolist()


sequences = range(3)


class CacheMachine(RuleBasedStateMachine):
    """Any use of a cache, beside a model that is a dictionary of lists."""

    @initialize(
        block_tokens=st.integers(1, 5),
        blocks=st.integers(1, 20),
        tokens=st.lists(st.integers(1, 16), min_size=len(sequences), max_size=len(sequences)),
    )
    def start(self, block_tokens: int, blocks: int, tokens: list[int]) -> None:
        self.layout = layout(block_tokens)
        self.blocks = blocks
        self.cache = KVCache(self.layout, blocks * self.layout.bytes_per_block + self.layout.bytes_per_block - 1)
        self.reserved: dict[int, int] = {}
        self.marks: dict[int, tuple[list[int], list[int]]] = {}
        self.next_mark = 0
        for sequence in sequences:
            self.reserve(sequence, tokens[sequence])

    def free_blocks(self) -> int:
        return self.blocks - sum(-(-tokens // self.layout.block_tokens) for tokens in self.reserved.values())

    @rule(sequence=st.sampled_from(sequences), tokens=st.integers(0, 16))
    def reserve(self, sequence: int, tokens: int) -> None:
        refused: AbstractContextManager[object] = nullcontext()
        if sequence in self.reserved or tokens < 1:
            refused = pytest.raises(UsageError, match=f"sequence {sequence}")
        elif -(-tokens // self.layout.block_tokens) > self.free_blocks():
            refused = pytest.raises(CapacityError, match=f"needs {tokens} tokens .* {self.cache.free_tokens} of")
        else:
            self.reserved[sequence] = tokens
            self.marks[sequence] = ([], [])
        with refused:
            self.cache.reserve(sequence, tokens)

    @rule(sequence=st.sampled_from(sequences))
    def release(self, sequence: int) -> None:
        known = sequence in self.reserved
        with nullcontext() if known else pytest.raises(UsageError, match=f"sequence {sequence} holds no reservation"):
            self.cache.release(sequence)
        self.reserved.pop(sequence, None)
        self.marks.pop(sequence, None)

    @precondition(lambda self: self.reserved)
    @rule(layer=st.integers(0, 1), data=st.data(), times=st.integers(1, 2))
    def append(self, layer: int, data: st.DataObject, times: int) -> None:
        """Runs that start a little before, at or after the watermark; what works once works again."""
        mostly_known = st.sampled_from([*self.reserved] * 4 + [max(sequences) + 1])
        drawn = st.tuples(mostly_known, st.sampled_from([0, 0, 0, -1, -3, 1]), st.integers(1, 4))
        runs = data.draw(st.lists(drawn, min_size=1, max_size=2, unique_by=lambda run: run[0]))
        rows = Rows(
            tuple(
                Run(sequence, max(0, len(self.marks.get(sequence, ([], []))[layer]) + offset), count)
                for sequence, offset, count in runs
            )
        )
        k, v = marked(layer, list(range(self.next_mark, self.next_mark + rows.tokens)))
        refused: AbstractContextManager[object] = nullcontext()
        if any(run.sequence not in self.reserved for run in rows.runs):
            refused = pytest.raises(UsageError, match="holds no reservation")
        elif any(run.stop > self.reserved[run.sequence] for run in rows.runs):
            refused = pytest.raises(CapacityError, match=r"reserved for \d+ tokens")
        elif any(run.start > len(self.marks[run.sequence][layer]) for run in rows.runs):
            refused = pytest.raises(UsageError, match="missing")
        else:
            mark = self.next_mark
            for run in rows.runs:
                self.marks[run.sequence][layer][run.start : run.stop] = range(mark, mark + run.count)
                mark += run.count
        for _ in range(times):
            with refused:
                self.cache.append(layer, rows, k, v)
        self.next_mark += rows.tokens

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        assert self.cache.capacity_tokens == self.blocks * self.layout.block_tokens
        assert self.cache.free_tokens == self.free_blocks() * self.layout.block_tokens
        assert set(self.cache.sequences) == set(self.reserved)

    @invariant()
    def no_slot_belongs_to_two(self) -> None:
        slots = [
            slot
            for sequence, tokens in self.reserved.items()
            for slot in self.cache.place(Rows((Run(sequence, 0, tokens),))).slots.tolist()
        ]
        assert len(slots) == len(set(slots))
        assert all(0 <= slot < self.cache.capacity_tokens for slot in slots)

    @invariant()
    def everything_stored_is_there(self) -> None:
        for sequence, layers in self.marks.items():
            for layer, marks in enumerate(layers):
                assert self.cache.filled(sequence, layer) == len(marks)
                if marks:
                    assert stored(self.cache, layer, sequence, len(marks)) == marks

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for sequence in list(self.cache.sequences):
                self.cache.release(sequence)
            assert self.cache.free_tokens == self.cache.capacity_tokens


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_cache_too_small_for_one_block_says_both_numbers() -> None:
    nbytes = layout().bytes_per_block

    with pytest.raises(CapacityError, match=rf"{nbytes - 1} bytes .* 4 tokens take {nbytes} bytes"):
        KVCache(layout(), nbytes - 1)


def test_memory_that_cannot_be_had_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="cannot be had on cpu"):
        KVCache(layout(), 1 << 60)


@pytest.mark.parametrize("layer", [-1, 2])
def test_there_is_no_such_layer(layer: int) -> None:
    cache = KVCache(layout(), layout().bytes_per_block)
    cache.reserve(0, 1)

    with pytest.raises(UsageError, match=f"layer {layer}: expected 0 <= layer < 2"):
        cache.filled(0, layer)
    with pytest.raises(UsageError, match=f"layer {layer}: expected 0 <= layer < 2"):
        cache.append(layer, Rows((Run(0, 0, 1),)), *marked(0, [1]))


def test_overwriting_does_not_lower_the_watermark() -> None:
    """The last chunk of a prompt may come twice, and an old step after newer ones."""
    cache = KVCache(layout(), layout().bytes_per_block)
    cache.reserve(0, 4)
    cache.append(0, Rows((Run(0, 0, 4),)), *marked(0, [1, 2, 3, 4]))

    cache.append(0, Rows((Run(0, 1, 2),)), *marked(0, [5, 6]))

    assert cache.filled(0, 0) == 4
    assert stored(cache, 0, 0, 4) == [1, 5, 6, 4]


def test_a_gap_in_one_run_refuses_them_all() -> None:
    cache = KVCache(layout(), 2 * layout().bytes_per_block)
    for sequence in (0, 1):
        cache.reserve(sequence, 4)
        cache.append(0, Rows((Run(sequence, 0, 1),)), *marked(0, [1]))

    with pytest.raises(UsageError, match=r"sequence 1, layer 0: position 2 comes after 1 stored ones"):
        cache.append(0, Rows((Run(0, 0, 1), Run(1, 2, 1))), *marked(0, [2, 3]))
    assert stored(cache, 0, 0, 1) == [1]


@pytest.mark.parametrize("wrong", ["k", "v"])
def test_tensors_of_the_wrong_shape_are_refused(wrong: str) -> None:
    """Both shapes are checked before anything is written."""
    cache = KVCache(layout(), layout().bytes_per_block)
    cache.reserve(0, 4)
    cache.append(0, Rows((Run(0, 0, 2),)), *marked(0, [1, 2]))
    k, v = marked(0, [3, 4])

    with pytest.raises(UsageError, match=rf"layer 0: expected {wrong} of shape \[2, 2, .\], got \[1, 2, .\]"):
        cache.append(0, Rows((Run(0, 0, 2),)), k[:1] if wrong == "k" else k, v[:1] if wrong == "v" else v)
    assert stored(cache, 0, 0, 2) == [1, 2]


def test_what_is_stored_is_rounded_to_the_type_of_the_layout() -> None:
    half = KVLayout(layers=LAYERS, dtype="bfloat16")
    cache = KVCache(half, half.bytes_per_block)
    cache.reserve(0, 1)

    cache.append(1, Rows((Run(0, 0, 1),)), torch.full((1, 1, 1), 1 / 3), torch.full((1, 1, 2), 1 / 3))

    slot = cache.place(Rows((Run(0, 0, 1),))).slots
    assert torch.equal(cache.keys[1][slot], torch.full((1, 1, 1), 1 / 3).bfloat16())
