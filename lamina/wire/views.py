"""Make tensors over the memory that is written to and sent from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial
from lamina.errors import ProtocolError
from lamina.transport import Link, Region, RemoteRegion
from lamina.wire.geometry import ANSWER_HEADER, PARTIAL_ITEM, aligned
from lamina.wire.plan import StepPlan


def outgoing(link: Link, remote: RemoteRegion, nbytes: int) -> memoryview:
    """Return the memory in which to compute what will be written to ``remote``: the region itself if the transport maps
    it, else memory of this process.

    Raises ProtocolError if the peer's region does not have the ``nbytes`` on which both ends should have agreed.
    """
    if remote.nbytes != nbytes:
        raise ProtocolError(f"{link} exposed region {remote.name!r} of {remote.nbytes} bytes where {nbytes} are needed")
    window = link.window(remote)
    return Region(remote.name, nbytes).buffer if window is None else window


def parts(buffer: memoryview, count: int, nbytes: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the first ``count`` parts of ``nbytes`` each of ``buffer``, as flat tensors."""
    flat = torch.frombuffer(buffer, dtype=dtype)
    size = nbytes // flat.itemsize
    return [flat[i * size : (i + 1) * size] for i in range(count)]


def shaped(part: Tensor, shape: Sequence[int], start: int = 0) -> Tensor:
    """Return a view of the numbers ``start ...`` of a flat part as a tensor of ``shape``."""
    size = 1
    for length in shape:
        size *= length
    return part[start : start + size].view(*shape)


def key_value(part: Tensor, layer: LayerShape, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return k [tokens, Hkv, Dk] and v [tokens, Hkv, Dv], which lie one after the other."""
    k = shaped(part, (tokens, layer.kv_heads, layer.qk_dim), start)
    return k, shaped(part, (tokens, layer.kv_heads, layer.v_dim), start + k.numel())


@dataclass(frozen=True, slots=True)
class StepViews:
    """Holds the rows of a step in the regions between a compute node and a memory node, for layers of one shape.

    ``q`` [rows, Hq, Dk] consists of ``stored_q`` and ``read_q``, of the rows that are stored and of the others. The
    rows that are stored have ``k`` [rows, Hkv, Dk] and ``v`` [rows, Hkv, Dv]. The answer has ``whole`` [rows, Hq, Dv]
    and ``partial``. The other fields are the bytes of each write.
    """

    q: Tensor
    stored_q: Tensor
    read_q: Tensor
    q_bytes: int
    k: Tensor
    v: Tensor
    key_value_bytes: int
    whole: Tensor
    partial: Partial
    answer_bytes: int

    @classmethod
    def of(
        cls, told: StepPlan, layer: LayerShape, query: Tensor, key_values: Tensor, output: Tensor, dtype: torch.dtype
    ) -> StepViews:
        """Make the views from a batch's flat parts of the regions: ``query``, ``key_values``, and ``output`` in
        bytes."""
        q = shaped(query, (told.rows, layer.q_heads, layer.qk_dim))
        k, v = key_value(key_values, layer, told.stored_rows)
        partials = told.rows - told.whole
        whole_stop = ANSWER_HEADER + told.whole * layer.q_heads * layer.v_dim * dtype.itemsize
        whole = shaped(output[ANSWER_HEADER:whole_stop].view(dtype), (told.whole, layer.q_heads, layer.v_dim))
        start = aligned(whole_stop)
        stop = start + partials * layer.q_heads * (layer.v_dim + 1) * PARTIAL_ITEM if partials else whole_stop
        numbers = output[start : max(start, stop)].view(torch.float32)
        o = shaped(numbers, (partials, layer.q_heads, layer.v_dim))
        partial = Partial(o, shaped(numbers, (partials, layer.q_heads), o.numel()))
        return cls(
            q, q[: told.stored_rows], q[told.stored_rows :], q.nbytes, k, v, k.nbytes + v.nbytes, whole, partial, stop
        )
