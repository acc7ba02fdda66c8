"""Attention in float64, one row and one KV head after the other: what everything else is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}


def exact(q: Tensor, position: int, k: Tensor, v: Tensor, keys: range, shape: LayerShape) -> Partial:
    """One query at ``position`` over those of ``keys`` that it may see. q: [Hq, Dk]; k, v: [context, Hkv, D]."""
    oldest = 0 if shape.window is None else position - shape.window + 1
    seen = [key for key in keys if oldest <= key <= position]
    o = torch.zeros(shape.q_heads, shape.v_dim, dtype=torch.float64)
    lse = torch.full((shape.q_heads,), -math.inf, dtype=torch.float64)
    group = shape.q_heads // shape.kv_heads
    for kv_head in range(shape.kv_heads if seen else 0):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        scores = shape.scale * q[heads] @ k[seen, kv_head].T
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        o[heads] = torch.softmax(scores, dim=-1) @ v[seen, kv_head]
        lse[heads] = torch.logsumexp(scores, dim=-1)
    return Partial(o, lse)


def exact_rows(q: Tensor, start: int, k: Tensor, v: Tensor, keys: range, shape: LayerShape) -> Partial:
    """`exact` for the consecutive positions from ``start``. q: [Q, Hq, Dk], of any type, as are k and v."""
    q, k, v = q.double(), k.double(), v.double()
    rows = [exact(row, start + index, k, v, keys, shape) for index, row in enumerate(q)]
    return Partial(torch.stack([row.o for row in rows]), torch.stack([row.lse for row in rows]))


def assert_close(actual: Partial, expected: Partial, tolerance: float) -> None:
    """Relative L2 error per (token, head), and the error of the logarithm; rows that see nothing are exact."""
    assert actual.o.dtype == actual.lse.dtype == torch.float32
    assert actual.o.shape == expected.o.shape
    assert actual.lse.shape == expected.lse.shape
    empty = expected.lse == -math.inf
    assert torch.equal(actual.lse == -math.inf, empty)
    assert not actual.o[empty].any()

    error = (actual.o.double() - expected.o).norm(dim=-1)
    assert (error <= tolerance * expected.o.norm(dim=-1)).all()  # false for NaN
    error = (actual.lse.double() - expected.lse)[~empty].abs()
    assert (error <= tolerance * expected.lse[~empty].abs().clamp_min(1)).all()
