"""Steps use a model through these protocols: one forward pass, slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.compute.peer_lane import Shape
from lamina.model.slices import Head, Tail


class ForwardSlice(Protocol):
    """A slice is the part of the model between two attention operators: a head that gives q, and a tail that gives k
    and v.

    The last slice is a head alone, which gives logits.
    """

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """Return q [T, Hq, Dk], or logits [S, vocabulary], from the carry of the slice before and its attention o."""

    def tail(self, constants: tuple[Any, ...], kept: tuple[Tensor, ...]) -> Tail:
        """Return k [T, Hkv, Dk], v [T, Hkv, Dv] and the carry, from what the head kept."""


class ForwardPass(Protocol):
    """A forward pass has the L + 1 slices of a model of L layers, or some of them; `lamina.model.slices` implements it.

    All methods are called within operations of the device.
    """

    @property
    def shapes(self) -> Sequence[LayerShape]:
        """Return the attention of each layer, also of those that run elsewhere."""

    @property
    def device(self) -> torch.device:
        """Return where the tensors lie."""

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """Compute what depends only on a step's tokens [T], positions [T] and sampled rows [S], for all its slices."""

    def slice(self, index: int) -> ForwardSlice:
        """Return one of the slices that this node has."""

    def carry_shapes(self, index: int, tokens: int) -> list[Shape]:
        """Return the shapes and types of the tensors in the carry of a slice, for a step of ``tokens`` tokens."""
