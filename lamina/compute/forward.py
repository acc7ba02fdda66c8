"""The forward pass of a model, slice by slice, as steps use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lamina.attention import LayerShape
from lamina.compute.peer_lane import Shape
from lamina.model.slices import Head, Tail


class ForwardSlice(Protocol):
    """The part of the model between two attention operators: a head that gives q, and a tail that gives k and v.

    The last slice is a head alone and gives logits.
    """

    def head(self, constants: tuple[Any, ...], carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """q [T, Hq, Dk], or logits [S, vocabulary], from the carry of the slice before and its attention o."""

    def tail(self, constants: tuple[Any, ...], kept: tuple[Tensor, ...]) -> Tail:
        """k [T, Hkv, Dk], v [T, Hkv, Dv] and the carry, from what the head kept."""


class ForwardPass(Protocol):
    """A model of L layers as L + 1 slices, of which a node may have only some; `lamina.model.slices` has one.

    All methods are called within operations of the device.
    """

    @property
    def shapes(self) -> Sequence[LayerShape]:
        """The attention of each layer, also of those that run elsewhere."""

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """What depends on a step's tokens [T], positions [T] and sampled rows [S] alone, for all its slices."""

    def slice(self, index: int) -> ForwardSlice:
        """One of the slices that this node has."""

    def carry_shapes(self, index: int, tokens: int) -> list[Shape]:
        """What the carry of a slice consists of, for a step of so many tokens."""
