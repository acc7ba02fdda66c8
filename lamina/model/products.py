"""Matrix products with weights that are packed once, for the CPU: the operator ``lamina::product``.

oneDNN packs bfloat16 weights into panels, and ``products.cpp`` multiplies with them: as fast as oneDNN's own kernels
for many rows, and up to twice as fast for few. The result of a row does not depend on the other rows, to the bit. The
kernel is compiled when it is first needed and kept in the user's cache. oneDNN itself multiplies if the processor lacks
the bfloat16 instructions of AVX-512, and for more than 16 rows if the processor has AMX, which is faster.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.attention.native.build import BuildError, compiler
from lamina.model.cache import cache_folder

log = logging.getLogger("lamina.model")

_SOURCE = Path(__file__).with_name("products.cpp")
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"]

_PANEL = 64
"""The number of outputs in a panel."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20

_libc = ctypes.CDLL(None)
_onednn = torch.ops.mkldnn


class _Panels:
    """The address and the layout of a packed weight, and the kernel for it."""

    __slots__ = ("address", "function", "inputs", "max_rows", "outputs", "stored")

    def __init__(self, kernel: _Kernel, address: int, stored: int, shape: torch.Size) -> None:
        self.function, self.max_rows = kernel
        self.address = address
        self.stored = stored
        self.outputs, self.inputs = shape


_Kernel = tuple[Callable[..., None], int]


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether packing pays for this type: for bfloat16, if the processor has instructions for it."""
    there = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return there and bool(_onednn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """Pack ``weight`` [outputs, inputs] for ``lamina::product``, into an opaque tensor of the same size."""
    packed: Tensor = _onednn._reorder_linear_weight(weight.contiguous(), 1)
    address, nbytes = int(_onednn.data_ptr(packed)), int(_onednn._nbytes(packed))
    _into_huge_pages(address, nbytes)
    kernel = _kernel()
    stored = _stored_inputs(weight, address, nbytes) if kernel else None
    packed.panels = _Panels(kernel, address, stored, weight.shape) if kernel and stored else None  # type: ignore[attr-defined]
    return packed


def _stored_inputs(weight: Tensor, address: int, nbytes: int) -> int | None:
    """Return the padded inputs of a panel if oneDNN used the layout of ``products.cpp`` for ``weight``, else None.

    oneDNN does not guarantee a layout, so the first and the last panel are compared. If the number of inputs is odd,
    the kernel reads one more number, which must be 0.
    """
    outputs, inputs = weight.shape
    odd = inputs % 2
    panels = -(-outputs // _PANEL)
    numbers = torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=weight.dtype)
    for padding in (_PANEL, _PANEL // 2):
        stored = -(-inputs // padding) * padding
        if panels * _PANEL * stored > len(numbers):
            continue
        found = numbers[: panels * _PANEL * stored].view(panels, stored // 2, _PANEL, 2)
        some = (slice(0, min(_PANEL, outputs)), slice((panels - 1) * _PANEL, outputs))
        if all(
            found[i]
            .transpose(0, 1)
            .reshape(_PANEL, stored)[: s.stop - s.start, : inputs + odd]
            .equal(torch.nn.functional.pad(weight[s], (0, odd)))
            for i, s in zip((0, panels - 1), some, strict=True)
        ):
            return stored
    return None


def _into_huge_pages(address: int, nbytes: int) -> None:
    """Ask the system for huge pages, with which products of few rows are a third faster."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if length > 0:
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


@functools.cache
def _kernel() -> _Kernel | None:
    """Return the compiled kernel and the most rows for which it is the fastest; None if it cannot be used."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (BuildError, OSError) as e:
        log.warning("event=no_kernel part=products reason=%r", f"{e}; products will be slower")
        return None
    library.lamina_product_rows.restype = ctypes.c_int64
    rows: int = library.lamina_product_rows()
    function = library.lamina_product
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_int]
    return (function, rows) if rows else None


def _built() -> Path:
    name = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    library = cache_folder("products") / f"{name}.so"
    if not library.exists():
        made = library.with_name(f".{name}.{os.getpid()}")
        # The OpenMP library is the one that torch has loaded, so that both use the same threads.
        done = subprocess.run([compiler(), *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"the C++ compiler failed on {_SOURCE}: {done.stderr.strip()[:2000]}")
        made.replace(library)
    return library


_library = torch.library.Library("lamina", "FRAGMENT")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """Multiply x [..., inputs] by a weight from `pack` and add bias [outputs]; the result is [..., outputs]."""
    panels: _Panels | None = weight.panels
    out: Tensor
    if panels is None or (rows := x.numel() // panels.inputs) > panels.max_rows:
        out = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return out
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], panels.outputs))
    panels.function(
        panels.address,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows,
        panels.inputs,
        panels.stored,
        panels.outputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# Packed tensors have another dispatch key than x, so the operator is registered for all keys.
_library.impl("product", _product, "CompositeExplicitAutograd")


def _fake_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("lamina::product", _fake_product, lib=_library)
