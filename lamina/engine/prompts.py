"""Keys and values of prompts that are still being prefilled, on the compute node.

A prompt's chunks attend to the chunks before them here, so that nobody's decode waits for quadratic work on a memory
node. From here the keys and values go out layer by layer; when every memory node has them, they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention import LayerShape, add_sinks, attend


class PromptKV:
    """Keys and values of one prompt of ``tokens`` tokens: in each layer k [tokens, Hkv, Dk] and v [tokens, Hkv, Dv]."""

    def __init__(
        self, sequence: int, tokens: int, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sequence = sequence
        self._layers = layers
        self._k = [torch.empty(tokens, s.kv_heads, s.qk_dim, dtype=dtype, device=device) for s in layers]
        self._v = [torch.empty(tokens, s.kv_heads, s.v_dim, dtype=dtype, device=device) for s in layers]

    def store(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep k and v of the positions from ``start``."""
        self._k[layer][start : start + len(k)] = k
        self._v[layer][start : start + len(v)] = v

    def attend(self, layer: int, start: int, q: Tensor) -> Tensor:
        """o [T, Hq, Dv] in float32 of the queries q [T, Hq, Dk] at the positions from ``start``."""
        stop = start + len(q)
        shape = self._layers[layer]
        whole = attend(q, self._k[layer][:stop], self._v[layer][:stop], shape=shape, q_start=start)
        return add_sinks(whole, shape.sinks).o

    def read(self, layer: int, start: int, count: int, heads: range) -> tuple[Tensor, Tensor]:
        """k and v of ``count`` positions from ``start``, of the KV heads ``heads`` alone."""
        span, own = slice(start, start + count), slice(heads.start, heads.stop)
        return self._k[layer][span, own], self._v[layer][span, own]
