"""As ``filled``, with q sent after k and v have been computed, to measure what sending it first gains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lamina.bench.filled import main

# ruff: noqa: I001 - ``filled`` sets the environment before torch is there
import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.compute.forward import ForwardPass, ForwardSlice
from lamina.compute.peer_lane import Shape
from lamina.config import ClusterConfig
from lamina.model.slices import Head, Tail
from lamina.node.model import ModelSource, open_checkpoint


class _LateSlice:
    """A slice whose head computes k and v as well, so that q can only be sent when all three are there."""

    def __init__(self, piece: ForwardSlice, *, is_last: bool) -> None:
        self._piece = piece
        self._is_last = is_last
        self._tails: dict[int, Tail] = {}

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        head = self._piece.head(constants, carry, o)
        if not self._is_last:
            self._tails[id(constants)] = self._piece.tail(constants, head.kept)
        return head

    def tail(self, constants: tuple[Any, ...], kept: tuple[Tensor, ...]) -> Tail:
        return self._tails.pop(id(constants))


class LateForward:
    """A forward pass whose queries come late."""

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = forward
        last = len(forward.shapes)
        self._slices = [_LateSlice(forward.slice(i), is_last=i == last) for i in range(last + 1)]

    @property
    def shapes(self) -> Sequence[LayerShape]:
        return self._forward.shapes

    @property
    def device(self) -> torch.device:
        return self._forward.device

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> tuple[Any, ...]:
        return self._forward.begin(token_ids, positions, rows)

    def slice(self, index: int) -> ForwardSlice:
        return self._slices[index]

    def carry_shapes(self, index: int, tokens: int) -> list[Shape]:
        return self._forward.carry_shapes(index, tokens)


class LateModel:
    """A model whose forward pass has late queries."""

    def __init__(self, source: ModelSource) -> None:
        self.facts = source.facts
        self.carry_bytes = source.carry_bytes
        self._source = source

    def load(self, slices: range, device: torch.device) -> ForwardPass:
        return LateForward(self._source.load(slices, device))


def _open(config: ClusterConfig) -> LateModel:
    return LateModel(open_checkpoint(config))


if __name__ == "__main__":
    sys.exit(main(_open))
