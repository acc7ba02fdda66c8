"""Tensors over the memory that is written to and sent from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.errors import ProtocolError
from lamina.transport import Link, Region, RemoteRegion


def outgoing(link: Link, remote: RemoteRegion, nbytes: int) -> memoryview:
    """Where to compute what will be written to ``remote``: there itself if the transport maps it, else own memory.

    ProtocolError if the peer's region has not the ``nbytes`` on which both ends should have agreed.
    """
    if remote.nbytes != nbytes:
        raise ProtocolError(f"{link} exposed region {remote.name!r} of {remote.nbytes} bytes where {nbytes} are needed")
    window = link.window(remote)
    return Region(remote.name, nbytes).buffer if window is None else window


def parts(buffer: memoryview, count: int, nbytes: int, dtype: torch.dtype) -> list[Tensor]:
    """The first ``count`` parts of ``nbytes`` each of ``buffer``, as flat tensors."""
    flat = torch.frombuffer(buffer, dtype=dtype)
    size = nbytes // flat.itemsize
    return [flat[i * size : (i + 1) * size] for i in range(count)]


def shaped(part: Tensor, shape: Sequence[int], start: int = 0) -> Tensor:
    """A view of the numbers ``start ...`` of a flat part as a tensor of ``shape``."""
    size = 1
    for length in shape:
        size *= length
    return part[start : start + size].view(*shape)


def key_value(part: Tensor, layer: LayerShape, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """k [tokens, Hkv, Dk] and v [tokens, Hkv, Dv], which lie one after the other."""
    k = shaped(part, (tokens, layer.kv_heads, layer.qk_dim), start)
    return k, shaped(part, (tokens, layer.kv_heads, layer.v_dim), start + k.numel())


def partials(part: Tensor, start: int, rows: int, layer: LayerShape) -> tuple[Tensor, Tensor]:
    """o [rows, Hq, Dv] and lse [rows, Hq] in float32, from byte ``start`` of a flat part on."""
    numbers = part.view(torch.uint8)[start : start + rows * layer.q_heads * (layer.v_dim + 1) * 4].view(torch.float32)
    o = shaped(numbers, (rows, layer.q_heads, layer.v_dim))
    return o, shaped(numbers, (rows, layer.q_heads), o.numel())
