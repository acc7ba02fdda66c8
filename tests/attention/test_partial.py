from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention import LayerShape, Partial, add_sinks, attend, merge
from tests.attention.oracle import assert_close, exact_rows

SHAPE = LayerShape(q_heads=4, kv_heads=2, qk_dim=8, v_dim=16, scale=0.5)


def shard(q: Tensor, k: Tensor, v: Tensor, positions: list[int]) -> Partial:
    """All rows of q over some positions of a context that lies before them."""
    return attend(q, k[positions], v[positions], shape=SHAPE, q_start=len(k))


@settings(max_examples=100, deadline=None)
@given(owners=st.lists(st.integers(0, 4), max_size=60), seed=st.integers(0, 99))
def test_any_partition_merges_to_the_whole(owners: list[int], seed: int) -> None:
    """However shards share the positions out, some getting none, they merge to the same in any order and grouping."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 4, 8, generator=generator)
    k = torch.randn(len(owners), 2, 8, generator=generator)
    v = torch.randn(len(owners), 2, 16, generator=generator)
    expected = exact_rows(q, len(owners), k, v, range(len(owners)), SHAPE)
    shards = [shard(q, k, v, [i for i, owner in enumerate(owners) if owner == mine]) for mine in range(5)]
    order = random.Random(seed)
    order.shuffle(shards)

    assert_close(merge(*shards), expected, 1e-5)

    while len(shards) > 1:
        first, second = order.sample(range(len(shards)), 2)
        pair = merge(shards[first], shards[second])
        shards = [pair, *(one for index, one in enumerate(shards) if index not in (first, second))]
    assert_close(shards[0], expected, 1e-5)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_nothing_merges_to_nothing(shards: int) -> None:
    empty = Partial.empty(2, 4, 16, device=torch.device("cpu"))

    o, lse = merge(*[empty] * shards)

    assert not o.any()
    assert (lse == -math.inf).all()


def test_an_empty_shard_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = Partial(torch.randn(2, 4, 16, generator=generator), torch.randn(2, 4, generator=generator))
    empty = Partial.empty(2, 4, 16, device=torch.device("cpu"))

    for merged in (merge(whole), merge(whole, empty), merge(empty, whole)):
        assert torch.equal(merged.o, whole.o)
        assert torch.equal(merged.lse, whole.lse)


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4]), min_size=1, max_size=8))
def test_huge_scores_neither_overflow_nor_vanish(scores: list[float]) -> None:
    """Scores of ±1e4, far beyond what exp can represent, one shard each."""
    shape = LayerShape(q_heads=1, kv_heads=1, qk_dim=1, v_dim=8, scale=1.0)
    q = torch.ones(1, 1, 1)
    k = torch.tensor(scores).view(-1, 1, 1)
    v = torch.randn(len(scores), 1, 8, generator=torch.Generator().manual_seed(len(scores)))
    expected = exact_rows(q, len(scores), k, v, range(len(scores)), shape)

    shards = [attend(q, k[i : i + 1], v[i : i + 1], shape=shape, q_start=len(scores)) for i in range(len(scores))]

    assert_close(merge(*shards), expected, 1e-5)
    assert_close(attend(q, k, v, shape=shape, q_start=len(scores)), expected, 1e-5)


def test_partials_of_the_wire_type_are_merged_in_float32() -> None:
    """What came back as bfloat16 is not summed as bfloat16."""
    first = Partial(torch.full((1, 1, 4), 1.0), torch.zeros(1, 1))
    second = Partial(torch.full((1, 1, 4), 1 / 128), torch.zeros(1, 1))

    o, lse = merge(*(Partial(part.o.bfloat16(), part.lse) for part in (first, second)))

    assert o.dtype == lse.dtype == torch.float32
    assert torch.equal(o, torch.full((1, 1, 4), (1 + 1 / 128) / 2))
    assert lse.item() == pytest.approx(math.log(2))


@settings(max_examples=50, deadline=None)
@given(
    keys=st.integers(0, 30),
    cut=st.integers(0, 30),
    sinks=st.lists(st.floats(-50, 50), min_size=4, max_size=4).map(tuple),
    seed=st.integers(0, 99),
)
def test_sinks_join_once_after_all_shards(keys: int, cut: int, sinks: tuple[float, ...], seed: int) -> None:
    """They take weight and give no value; rows that see nothing else give all of theirs to them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 4, 8, generator=generator)
    k = torch.randn(keys, 2, 8, generator=generator)
    v = torch.randn(keys, 2, 16, generator=generator)
    expected = exact_rows(q, keys, k, v, range(keys), replace(SHAPE, sinks=sinks), sinks=True)
    cut = min(cut, keys)

    whole = merge(shard(q, k, v, list(range(cut))), shard(q, k, v, list(range(cut, keys))))

    assert_close(add_sinks(whole, sinks), expected, 1e-5)
    assert add_sinks(whole, None) is whole
