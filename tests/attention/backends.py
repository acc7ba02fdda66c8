"""What the conformance tests run against: every backend, on every path that this machine can take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from lamina.attention import Backend, KVLayout, Memory, create_backend
from lamina.attention.backend import require_backend
from lamina.attention.layout import ITEM_BYTES
from lamina.attention.native.build import BuildError, compiler
from lamina.errors import LaminaError
from tests.attention.oracle import TOLERANCE


@dataclass(frozen=True)
class Target:
    """A backend and its path, and what layouts it takes. ``missing``: why it cannot run."""

    backend: str
    isa: str | None = None
    device: str = "cpu"
    dtypes: tuple[str, ...] = tuple(ITEM_BYTES)
    block_tokens: tuple[int, ...] = (16, 32, 64)
    dims: tuple[int, ...] = (8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256)
    equal_dims: bool = False
    positions: bool = True
    """Whether layers may have chunks and slopes."""
    rounds_weights: bool = False
    """To bfloat16 or float16, before they meet the values."""
    missing: str | None = None

    def __str__(self) -> str:
        return "-".join([self.backend, *([self.isa] if self.isa else []), *(["cuda"] if self.device != "cpu" else [])])

    def tolerance(self, dtype: str, v_dim: int) -> float:
        """How exact attention over what is stored has to be. The values of a small head may cancel, which leaves little
        to compare the rounding of the weights with."""
        return TOLERANCE[dtype] * (3 if self.rounds_weights and v_dim < 64 and dtype != "float32" else 1)

    def require(self) -> None:
        """Fail where the backend should be there and is not; skip where it cannot be."""
        if self.missing is None:
            return
        try:
            compiler()
        except BuildError as error:
            pytest.skip(f"the native library is not built: {error}")
        pytest.fail(f"the native backend cannot be tested: {self.missing}")

    @contextmanager
    def open(self, layout: KVLayout, tokens: int, *, threads: int = 1) -> Iterator[Backend]:
        """A backend with room for ``tokens`` positions, all in whole blocks. A read of what was never written gives
        NaN: every byte is 0xFF, which is that in all floating types and in all scales."""
        layer_bytes = require_backend(self.backend).layer_bytes
        block = sum(layer_bytes(shape, layout.dtype, layout.block_tokens) for shape in layout.layers)
        blocks = -(-tokens // layout.block_tokens)
        # Groups of layers have blocks of different sizes; what is left over of their extents must not be missed.
        memory = Memory((blocks + blocks // 4 + 8 * len(layout.groups)) * block, device=self.device)
        memory.tensor.fill_(0xFF)
        backend = self.create(layout, memory, threads=threads)
        try:
            yield backend
        finally:
            backend.close()
            memory.close()

    def create(self, layout: KVLayout, memory: Memory, *, threads: int = 1) -> Backend:
        """The backend on this target's path."""
        with pytest.MonkeyPatch.context() as patch:
            if self.isa:
                patch.setenv("LAMINA_ISA", self.isa)
            return create_backend(self.backend, layout, memory, threads=threads)


def _native() -> list[Target]:
    try:
        from lamina.attention.native.library import available_isas

        require_backend("native")
        return [Target("native", isa, rounds_weights=isa == "avx512bf16") for isa in available_isas()]
    except (ImportError, OSError, LaminaError) as error:
        return [Target("native", missing=str(error))]


def _cuda() -> list[Target]:
    if not torch.cuda.is_available():
        return []
    return [
        Target("torch", device="cuda"),
        Target(
            "flashinfer",
            device="cuda",
            dtypes=("bfloat16", "float16"),
            dims=(64, 128, 256),
            equal_dims=True,
            positions=False,
            rounds_weights=True,
        ),
    ]


TORCH = Target("torch", block_tokens=(1, 2, 3, 16, 32, 64))
TARGETS = [TORCH, *_native(), *_cuda()]

every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
every_type = pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(target, dtype, id=f"{target}-{dtype}") for target in TARGETS for dtype in target.dtypes],
)

EFFORT = float(os.environ.get("LAMINA_TEST_EFFORT", "1"))
"""How many examples the searches try, relative to the default."""


def examples(count: int) -> int:
    return max(1, round(count * EFFORT))
