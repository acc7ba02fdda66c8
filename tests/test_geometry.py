"""Heads are divided without remainder or overlap, and nothing on the hot path can be misread."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.attention import LayerShape, Run
from lamina.errors import ConfigError, ProtocolError
from lamina.transport import RemoteRegion
from lamina.wire.codec import decode, encode
from lamina.wire.geometry import Geometry, shard_by_heads, split_heads
from lamina.wire.plan import ChunkHeader, StepPlan, plan_bytes, unpack_plan
from lamina.wire.tags import Kind, Tag, pack
from lamina.wire.tenants import Attach


@given(st.integers(1, 128), st.integers(1, 16))
def test_heads_are_split_evenly_but_for_one(kv_heads: int, nodes: int) -> None:
    """In order, all of them, once: 8 heads on 3 nodes are 3 + 3 + 2."""
    ranges = split_heads(kv_heads, nodes)

    assert [head for r in ranges for head in r] == list(range(kv_heads))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert [len(r) for r in split_heads(8, 3)] == [3, 3, 2]


def test_query_heads_follow_their_kv_heads() -> None:
    """A memory node gets the queries that read its keys."""
    layer = LayerShape(q_heads=32, kv_heads=8, qk_dim=64, v_dim=64, scale=0.125)

    shards = shard_by_heads([layer], ["m0", "m1", "m2"])

    assert [s.q[0] for s in shards] == [range(12), range(12, 24), range(24, 32)]
    assert [(s.layers[0].q_heads, s.layers[0].kv_heads) for s in shards] == [(12, 3), (12, 3), (8, 2)]
    sinks = dataclasses.replace(layer, sinks=tuple(map(float, range(32))))
    assert [s.layers[0].sinks for s in shard_by_heads([sinks], ["m0", "m1"])] == [sinks.sinks[:16], sinks.sinks[16:]]
    with pytest.raises(
        ConfigError, match=r"8 KV heads in a layer, which cannot be split over 9 .*partition = \"requests\""
    ):
        shard_by_heads([layer], [f"m{i}" for i in range(9)])


@given(st.sampled_from(Kind), st.integers(0, 31), st.integers(0, 1023), st.integers(0, 2**31))
def test_tags_come_back(kind: Kind, slot: int, layer: int, step: int) -> None:
    """With the low bits of the step."""
    packed = pack(kind, slot, layer, step)

    assert 0 <= packed < 2**32
    assert Tag.unpack(packed) == (kind, slot, layer, step % 2**14)


def test_an_unknown_kind_is_refused() -> None:
    """There are eight values and six kinds."""
    with pytest.raises(ProtocolError, match="unknown kind 7"):
        Tag.unpack(7 << 29)


RUNS = st.lists(
    st.builds(Run, st.integers(0, 2**63), st.integers(0, 2**31), st.integers(1, 3)),
    max_size=10,
    unique_by=lambda run: run.sequence,
).map(tuple)


@given(RUNS, st.data())
def test_plans_come_back(runs: tuple[Run, ...], data: st.DataObject) -> None:
    """Whatever the sequences and positions."""
    cut = data.draw(st.integers(0, len(runs)))
    storing, reading = runs[:cut], runs[cut:]
    whole = data.draw(st.integers(0, sum(run.count for run in storing)))
    answers = data.draw(st.sampled_from([(), (1, 0, 65535)]))
    plan = StepPlan(storing, reading, whole, answers)
    packed = memoryview(plan.packed.ljust(plan_bytes(30, 3), b"\0"))

    assert len(packed) == plan_bytes(30, 3)
    if runs:
        assert unpack_plan(packed, 30, 3) == plan
        with pytest.raises(ProtocolError, match="step plan"):
            unpack_plan(packed, plan.rows - 1, 3)
        if answers:
            with pytest.raises(ProtocolError, match="names receivers"):
                unpack_plan(packed, 30, 4)


@given(st.binary(min_size=plan_bytes(4, 2), max_size=plan_bytes(4, 2)))
def test_any_bytes_are_a_plan_or_refused(data: bytes) -> None:
    """By an error of this project, never by a crash."""
    try:
        plan = unpack_plan(memoryview(data), 4, 2)
    except ProtocolError:
        return
    assert 1 <= plan.rows <= 4
    assert plan.whole <= plan.stored_rows


def test_chunk_headers_come_back() -> None:
    """Packed at the start of a bulk buffer."""
    header = ChunkHeader(2**50, 1000, 2**31, 64)

    assert ChunkHeader.unpack(memoryview(header.pack())) == header


def test_messages_are_checked_when_they_arrive() -> None:
    """Types, bounds and the shapes of layers."""
    layer = LayerShape(q_heads=4, kv_heads=2, qk_dim=8, v_dim=8, scale=1.0)
    attach = Attach(
        tenant="c0",
        token=bytes(16),
        term=1,
        model="x",
        dtype="float32",
        kv_dtype="int8",
        block_tokens=16,
        layers=[layer],
        slots=1,
        max_rows=4,
        outputs=RemoteRegion(1, "o", 64),
    )
    plain = encode(attach)

    assert decode(plain, Attach) == attach
    for change in (
        {"slots": 0},
        {"dtype": "int8"},
        {"kv_dtype": "int3"},
        {"layers": []},
        {"extra": 1},
        {"token": b"short"},
        {"term": -1},
        {"lease": 1e9},
        {"outputs": [1, "o"]},
    ):
        with pytest.raises(ProtocolError, match="'Attach'"):
            decode({**plain, **change}, Attach)
    with pytest.raises(ProtocolError, match="kv_heads"):
        decode({**plain, "layers": [{**plain["layers"][0], "kv_heads": 3}]}, Attach)


def test_parts_of_regions_do_not_share_cache_lines() -> None:
    """And hold the largest layer."""
    layers = tuple(LayerShape(q_heads=q, kv_heads=1, qk_dim=d, v_dim=d + 1, scale=1.0) for q, d in ((1, 3), (5, 7)))
    geometry = Geometry(layers, "bfloat16", slots=2, max_rows=3)

    assert geometry.query_bytes % 64 == 0
    assert geometry.query_bytes >= 3 * 5 * 7 * 2
    assert geometry.key_value_bytes >= 3 * 15 * 2
    assert geometry.output_bytes >= 3 * 5 * 8 * 2
