"""A compute node keeps the keys and values of prompts while it prefills them.

The chunks of a prompt attend here to the chunks before them, so that no decode step waits for quadratic work on a
memory node. The keys and values go from here to the memory nodes, layer by layer, and are dropped when every memory
node has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention import LayerShape, add_sinks, attend


class PromptKV:
    """Holds keys and values of one prompt of ``tokens`` tokens: k [tokens, Hkv, Dk] and v [tokens, Hkv, Dv] of each
    layer that runs here."""

    def __init__(
        self, sequence: int, tokens: int, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sequence = sequence
        self.is_over = False
        """Whether the sequence is over, so that what was not sent yet need not be sent."""
        self._tokens = tokens
        self._layers = layers
        self._dtype, self._device = dtype, device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep k and v of the positions from ``start``."""
        if layer not in self._kept:
            shape = self._layers[layer]
            self._kept[layer] = self._empty(shape.kv_heads, shape.qk_dim), self._empty(shape.kv_heads, shape.v_dim)
        own_k, own_v = self._kept[layer]
        own_k[start : start + len(k)] = k
        own_v[start : start + len(v)] = v

    def attend(self, layer: int, start: int, q: Tensor) -> Tensor:
        """Return o [T, Hq, Dv] in float32 of the queries q [T, Hq, Dk] at the positions from ``start``."""
        stop = start + len(q)
        shape = self._layers[layer]
        k, v = self._kept[layer]
        whole = attend(q, k[:stop], v[:stop], shape=shape, q_start=start)
        return add_sinks(whole, shape.sinks).o

    def read(self, layer: int, start: int, count: int, heads: range) -> tuple[Tensor, Tensor]:
        """Return k and v of ``count`` positions from ``start``, of the KV heads ``heads`` alone."""
        span, own = slice(start, start + count), slice(heads.start, heads.stop)
        k, v = self._kept[layer]
        return k[span, own], v[span, own]

    def _empty(self, heads: int, dim: int) -> Tensor:
        return torch.empty(self._tokens, heads, dim, dtype=self._dtype, device=self._device)
