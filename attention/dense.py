"""All torch code shares this arithmetic of attention over dense keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.attention.layout import LayerShape
from lamina.attention.partial import LOWEST, Partial

TILE_SCORES = 1 << 22
"""`attend` computes this many scores at once, 16 MiB of float32, however long the context is."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, shape: LayerShape, q_start: int, k_start: int = 0) -> Partial:
    """Attend causally with the positions from ``q_start`` on to the keys of the positions from ``k_start`` on.

    q: [Q, Hq, Dk]; k: [K, Hkv, Dk]; v: [K, Hkv, Dv], of any floating type. The arithmetic is float32. K may be 0.
    """
    queries, keys = q.shape[0], k.shape[0]
    out = Partial.empty(queries, shape.q_heads, shape.v_dim, device=q.device)
    tile = max(1, TILE_SCORES // (shape.q_heads * max(1, keys)))
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        # Only keys that some query of the tile sees take part, because the product takes most of the time.
        first = q_start + begin
        low = min(max(0, shape.first_visible(first) - k_start), keys)
        high = min(max(low, q_start + end - k_start), keys)
        if low == high:
            continue
        query = torch.arange(first, q_start + end, device=q.device)
        key = torch.arange(k_start + low, k_start + high, device=q.device)
        o, lse = attend_visible(
            q[None, begin:end],
            k[None, low:high],
            v[None, low:high],
            visible_keys(query, key, shape.window, shape.chunk)[None],
            shape,
            distances(query, key)[None],
        )
        out.o[begin:end] = o[0]
        out.lse[begin:end] = lse[0]
    return out


def visible_keys(query: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Return which keys each query sees, bool [..., Q, K], from the positions query: [..., Q] and key: [..., K]."""
    query, key = query.unsqueeze(-1), key.unsqueeze(-2)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    return visible if chunk is None else visible & (key >= query - query % chunk)


def distances(query: Tensor, key: Tensor) -> Tensor:
    """Return ``key - query``, int64 [..., Q, K], for the positions query: [..., Q] and key: [..., K]."""
    return key.unsqueeze(-2) - query.unsqueeze(-1)


def attend_visible(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, shape: LayerShape, distance: Tensor | None = None
) -> Partial:
    """Attend with B independent sets of queries, each over its own K >= 1 keys, in float32.

    q: [B, Q, Hq, Dk]; k: [B, K, Hkv, Dk]; v: [B, K, Hkv, Dv]; visible: bool [B, Q, K]; distance: int64 [B, Q, K],
    needed only for slopes. The result is o: [B, Q, Hq, Dv] and lse: [B, Q, Hq]. Values that are not visible must be
    finite as well: their weight is 0, and 0 times NaN is NaN.
    """
    batch, queries = q.shape[:2]
    group = shape.q_heads // shape.kv_heads
    split = (batch, shape.kv_heads, group, queries)
    folded = (batch, shape.kv_heads, group * queries)

    # All query heads that share a KV head are rows of one product, so keys and values are never repeated.
    rows = (q.float() * shape.scale).view(batch, queries, shape.kv_heads, group, shape.qk_dim)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(*folded, shape.qk_dim)
    scores = rows @ _by_head(k).transpose(-1, -2)
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    scores = scores.view(*split, -1)
    if shape.slopes is not None:
        assert distance is not None
        slopes = torch.tensor(shape.slopes, device=q.device).view(shape.kv_heads, group, 1, 1)
        scores = scores + slopes * distance[:, None, None]
    scores = scores.masked_fill_(~visible[:, None, None], -torch.inf)

    peak = scores.amax(-1, keepdim=True).clamp_min(LOWEST)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    o = weights.view(*folded, -1) @ _by_head(v)
    # Where anything is visible, the peak adds exp(0) and total is >= 1; elsewhere total is 0, and so is o.
    o = o.view(*split, shape.v_dim) / total.clamp_min(1)
    lse = (peak + total.log()).squeeze(-1)
    return Partial(o.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3))


def _by_head(stored: Tensor) -> Tensor:
    """Convert keys or values [B, K, Hkv, D] to float32 [B, Hkv, K, D], contiguous, which makes small products fast."""
    return stored.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
