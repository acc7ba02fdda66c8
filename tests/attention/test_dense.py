from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.attention import LayerShape, attend, dense, merge
from tests.attention.oracle import TOLERANCE, assert_close, exact_rows

SHAPE = LayerShape(q_heads=6, kv_heads=2, qk_dim=16, v_dim=8, scale=0.25)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(0, 80),
    q_start=st.integers(0, 100),
    k_start=st.integers(0, 100),
    group=st.integers(1, 16),
    window=st.none() | st.integers(1, 120),
    softcap=st.none() | st.floats(0.5, 50),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    sinks=st.booleans(),
    chunk=st.none() | st.integers(1, 120),
    slope=st.none() | st.floats(-0.1, 1),
)
def test_attend_is_the_exact_attention(
    queries: int,
    keys: int,
    q_start: int,
    k_start: int,
    group: int,
    window: int | None,
    softcap: float | None,
    dtype: str,
    sinks: bool,
    chunk: int | None,
    slope: float | None,
) -> None:
    """Keys may lie before, among and after the queries, overlap them in part or not at all. Sinks are left out: of all
    the shards of a row, `attend` does not know which is to count them."""
    shape = replace(
        SHAPE,
        q_heads=2 * group,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=(3.0,) * 2 * group if sinks else None,
        slopes=None if slope is None else tuple(slope * head for head in range(2 * group)),
    )
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, 2 * group, 16, generator=generator).to(getattr(torch, dtype))
    k = torch.randn(k_start + keys, 2, 16, generator=generator).to(getattr(torch, dtype))
    v = torch.randn(k_start + keys, 2, 8, generator=generator).to(getattr(torch, dtype))
    expected = exact_rows(q, q_start, k, v, range(k_start, k_start + keys), shape)

    actual = attend(q, k[k_start:], v[k_start:], shape=shape, q_start=q_start, k_start=k_start)

    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 1, 10, 33])
@pytest.mark.parametrize("tile_scores", [1, 1000, 5000])
def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch, tile_scores: int, window: int | None) -> None:
    """The bound on memory changes the output by rounding at most."""
    shape = replace(SHAPE, window=window)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(40, 6, 16, generator=generator)
    k = torch.randn(70, 2, 16, generator=generator)
    v = torch.randn(70, 2, 8, generator=generator)
    monkeypatch.setattr(dense, "TILE_SCORES", tile_scores)

    assert_close(attend(q, k, v, shape=shape, q_start=30), exact_rows(q, 30, k, v, range(70), shape), 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_may_be_split_by_position(window: int | None) -> None:
    """Past and chunk attended apart, as when the past lives on another node, merge to the attention over both."""
    shape = replace(SHAPE, window=window)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(10, 6, 16, generator=generator)
    k = torch.randn(50, 2, 16, generator=generator)
    v = torch.randn(50, 2, 8, generator=generator)

    past = attend(q, k[:40], v[:40], shape=shape, q_start=40)
    chunk = attend(q, k[40:], v[40:], shape=shape, q_start=40, k_start=40)

    assert_close(merge(past, chunk), exact_rows(q, 40, k, v, range(50), shape), 1e-5)
