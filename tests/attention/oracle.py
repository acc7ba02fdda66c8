"""Attention and rounding in float64: what everything else is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial
from tests.attention.readback import Stored

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3, "float8_e4m3fn": 5e-3, "int8": 5e-3}
"""By the type stored: the error of attention over what is stored, see `assert_close`."""

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}

TILE_SCORES = 1 << 22


def exact_rows(
    q: Tensor, start: int, k: Tensor, v: Tensor, keys: range, shape: LayerShape, *, sinks: bool = False
) -> Partial:
    """The positions from ``start`` over those of ``keys`` that each may see; with ``sinks`` those of the shape join.

    q: [Q, Hq, Dk]; k, v: [context, Hkv, D], indexed by position; all of any type, on any device.
    """
    queries, group = q.shape[0], shape.q_heads // shape.kv_heads
    o = torch.zeros(queries, shape.q_heads, shape.v_dim, dtype=torch.float64)
    lse = torch.full((queries, shape.q_heads), -math.inf, dtype=torch.float64)
    tile = max(1, TILE_SCORES // (shape.q_heads * max(1, len(keys))))
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        first = start + begin
        low = keys.start if shape.window is None else max(keys.start, first - shape.window + 1)
        if shape.chunk is not None:
            low = max(low, first // shape.chunk * shape.chunk)
        high = max(low, min(keys.stop, start + end))
        position = torch.arange(first, start + end).unsqueeze(-1)
        key = torch.arange(low, high)
        visible = key <= position
        if shape.window is not None:
            visible &= key > position - shape.window
        if shape.chunk is not None:
            visible &= key // shape.chunk == position // shape.chunk

        rows = q[begin:end].cpu().double().view(end - begin, shape.kv_heads, group, shape.qk_dim)
        scores = shape.scale * torch.einsum("qhgd,khd->qhgk", rows, k[low:high].cpu().double())
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        scores = scores.flatten(1, 2)
        if shape.slopes is not None:
            slopes = torch.tensor(shape.slopes, dtype=torch.float64).view(1, -1, 1)
            scores = scores + slopes * (key - position).unsqueeze(1)
        scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)
        if sinks and shape.sinks is not None:
            sink = torch.tensor(shape.sinks, dtype=torch.float64).view(1, -1, 1)
            scores = torch.cat([scores, sink.expand(end - begin, -1, 1)], dim=-1)
        lse[begin:end] = scores.logsumexp(-1)
        # Where nothing is seen, the logarithm is -inf, and -inf - -inf would be NaN.
        weights = torch.exp(scores - lse[begin:end].clamp_min(-1e300).unsqueeze(-1))[..., : high - low]
        weights = weights.view(end - begin, shape.kv_heads, group, high - low)
        o[begin:end] = torch.einsum("qhgk,khd->qhgd", weights, v[low:high].cpu().double()).flatten(1, 2)
    return Partial(o, lse)


def join(parts: list[Partial]) -> Partial:
    """The rows of one after the rows of the other."""
    return Partial(torch.cat([part.o for part in parts]), torch.cat([part.lse for part in parts]))


def assert_close(actual: Partial, expected: Partial, tolerance: float) -> None:
    """Relative L2 error per (token, head), and the error of the logarithm; rows that see nothing are exact."""
    assert actual.o.dtype == actual.lse.dtype == torch.float32
    assert actual.o.shape == expected.o.shape
    assert actual.lse.shape == expected.lse.shape
    o, lse = actual.o.cpu().double(), actual.lse.cpu().double()
    empty = expected.lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert not o[empty].any()

    error = (o - expected.o).norm(dim=-1) / expected.o.norm(dim=-1).clamp_min(1e-30)
    worst = error.nan_to_num(math.inf).max().item()
    assert worst <= tolerance, f"o is off by {worst:.2e} in (token, head) {_where(error)}, {tolerance:.0e} is allowed"
    error = ((lse - expected.lse).abs() / expected.lse.abs().clamp_min(1)).masked_fill(empty, 0)
    worst = error.nan_to_num(math.inf).max().item()
    assert worst <= tolerance, f"lse is off by {worst:.2e} in (token, head) {_where(error)}, {tolerance:.0e} is allowed"


def assert_same_bits(actual: Partial, expected: Partial) -> None:
    assert torch.equal(actual.o, expected.o)
    assert torch.equal(actual.lse, expected.lse)


def _where(error: Tensor) -> tuple[int, ...]:
    flat = int(error.nan_to_num(math.inf).argmax())
    return flat // error.shape[1], flat % error.shape[1]


def dequantised(stored: Stored) -> tuple[Tensor, Tensor]:
    """The values of k and v in float64."""
    parts = ((stored.k, stored.k_scale), (stored.v, stored.v_scale))
    k, v = (
        number.cpu().double() if scale is None else number.cpu().double() * scale.cpu().double().unsqueeze(-1)
        for number, scale in parts
    )
    return k, v


def assert_rounded(stored: Tensor, scale: Tensor | None, given: Tensor) -> None:
    """``stored`` is what is to be stored of ``given``: [n, Hkv, D].

    Types without scales are exact. Numbers of 8 bits are reckoned here in float64, where what is a tie may not be one
    in the float32 of the contract, or the other way about: then either neighbour is right.
    """
    if scale is None:
        assert_same_numbers(stored, given.to(stored.dtype))
        return
    largest = LARGEST[str(stored.dtype).removeprefix("torch.")]
    peak = given.double().abs().amax(-1)
    assert torch.allclose(scale.double(), peak / largest, rtol=1e-6, atol=0)
    ratio = (given.double() / (peak / largest).unsqueeze(-1)).nan_to_num(0).clamp(-largest, largest)
    expected = (ratio.round() if stored.dtype == torch.int8 else ratio).to(stored.dtype)
    further = (stored.double() - ratio).abs() - (expected.double() - ratio).abs()
    assert (further <= 1e-6 * ratio.abs()).all()


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """The same bits; where ``expected`` is NaN, any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.itemsize]
    same = actual.contiguous().view(whole) == expected.contiguous().view(whole)
    if actual.dtype.is_floating_point:
        same |= actual.float().isnan() & expected.float().isnan()
    assert same.all()
