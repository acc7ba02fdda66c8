"""Run the slices of a model in one process, with attention in between done densely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import Blueprint, SlicedModel, cut_into_slices
from lamina.model.weights import load_weights, read_sinks

CPU = torch.device("cpu")


def cut_checkpoint(path: Path, dtype: str | None = None) -> Blueprint:
    return cut_into_slices(read_sinks(capture(Checkpoint.open(path, dtype))))


def load(blueprint: Blueprint) -> SlicedModel:
    return SlicedModel(blueprint, load_weights(blueprint.capture, blueprint.weights_of(), CPU), CPU)


@torch.no_grad()
def compose(model: SlicedModel, sequences: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """(logits [S, vocabulary] of ``rows`` of the packed ``sequences``, carry of every slice but the last)."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    constants = model.begin(torch.cat(list(sequences)), positions, rows)
    carry: tuple[Tensor, ...] = ()
    carries = []
    o = None
    for piece in model.slices[:-1]:
        q, kept = piece.head(constants, carry, o)
        k, v, carry = piece.tail(constants, kept)
        carries.append(carry)
        o = torch.cat([dense(*qkv, piece.shape) for qkv in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])
    return model.slices[-1].head(constants, carry, o).out, carries


def dense(q: Tensor, k: Tensor, v: Tensor, shape: LayerShape) -> Tensor:
    """Causal attention of one sequence: q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> o [T, Hq, Dv]."""
    assert shape.slopes is None
    group = shape.q_heads // shape.kv_heads
    keys, values = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    query, key = torch.arange(len(q))[:, None], torch.arange(len(k))
    hidden = (key > query) | (key <= query - (shape.window or len(k)))
    if shape.chunk is not None:
        hidden |= key // shape.chunk != query // shape.chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    if shape.sinks is not None:
        scores = torch.cat([scores, torch.tensor(shape.sinks).view(-1, 1, 1).expand(-1, len(q), 1)], -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
