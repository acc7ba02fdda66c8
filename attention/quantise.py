"""Every backend stores 8-bit keys and values exactly as defined here, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""The largest magnitude of a vector becomes this number."""

SMALLEST = 1e-30
"""A vector whose magnitudes are all below this is stored as zeros: its scale would be subnormal, or 0."""


def quantise(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Return numbers of type ``dtype`` in the shape of x, [..., D], and a float32 scale for each vector, [...].

    scale = largest magnitude / LARGEST, number = x / scale, rounded to nearest even. A vector of zeros has the scale 0.
    A vector with a NaN or an infinity has the scale NaN, so that all of it reads as NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    scale = largest / LARGEST[dtype]
    scale = torch.where(largest < SMALLEST, 0.0, torch.where(largest.isfinite(), scale, torch.nan))
    number = (x / scale.unsqueeze(-1)).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    number = number.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == "int8":
        number = number.round()
    return number.to(getattr(torch, dtype)), scale


def dequantise(number: Tensor, scale: Tensor) -> Tensor:
    """Return the values in float32: number [..., D] times scale [...]."""
    return number.float() * scale.unsqueeze(-1)
