"""The native library: found, loaded and described to ctypes. Calls release the GIL."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor

from lamina.attention.native.build import LIBRARY
from lamina.errors import CapacityError, ConfigError


class Layer(Structure):
    """``Layer`` of kernel.h."""

    _fields_ = (
        ("memory", c_void_p),
        ("sinks", c_void_p),
        ("kv_heads", c_int32),
        ("group", c_int32),
        ("qk_dim", c_int32),
        ("v_dim", c_int32),
        ("block_tokens", c_int32),
        ("kv_type", c_int32),
        ("input_type", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class Step(Structure):
    """``Step`` of kernel.h: addresses of int64 arrays, one number per run."""

    _fields_ = (
        ("tables", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("rows", c_void_p),
        ("frozen", c_void_p),
        ("runs", c_int64),
    )


@cache
def load() -> ctypes.CDLL:
    """The library, from ``LAMINA_NATIVE_LIBRARY`` or where the package's build put it; ConfigError without it."""
    path = Path(os.environ.get("LAMINA_NATIVE_LIBRARY") or LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise ConfigError(
            f"attention backend native: its library {path} cannot be loaded ({e}); it is compiled when lamina is "
            "installed on a machine with a C++ compiler. Install g++ and run: python -m lamina.attention.native.build; "
            "or choose the backend torch, which is slower"
        ) from e
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "lamina_isas": (c_char_p, ()),
        "lamina_workers": (c_void_p, (c_char_p, c_int, POINTER(c_int), c_int)),
        "lamina_close": (None, (c_void_p,)),
        "lamina_layer_bytes": (c_int64, (POINTER(Layer),)),
        "lamina_attend": (None, (c_void_p, POINTER(Layer), POINTER(Step), *(c_void_p,) * 5, c_int)),
        "lamina_append": (None, (c_void_p, POINTER(Layer), POINTER(Step), c_void_p, c_void_p)),
        "lamina_copy": (None, (POINTER(Layer), c_void_p, c_int64, c_int64, *(c_void_p,) * 4, c_int64, c_int)),
        "lamina_read": (None, (c_void_p, c_void_p, c_int64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def available_isas() -> list[str]:
    """Names of the kernels that this machine can run, best first."""
    names: bytes = load().lamina_isas()
    return names.decode().split(",")


def choose_isa() -> str:
    """``LAMINA_ISA``, or the best that the machine has; ConfigError for one that it has not."""
    isas = available_isas()
    name = os.environ.get("LAMINA_ISA") or isas[0]
    if name not in isas:
        raise ConfigError(f"LAMINA_ISA: expected one of {', '.join(isas)}, which this machine can run, got {name!r}")
    return name


class Workers:
    """``threads`` threads that attend, the calling one among them, pinned to ``cpus`` in turn if these are given.

    Belongs to the thread that calls it. `ConfigError` for an instruction set that the machine has not,
    `CapacityError` where a thread cannot be had.
    """

    def __init__(self, threads: int, cpus: Sequence[int] | None = None) -> None:
        if threads < 1:
            raise ConfigError(f"attention threads: expected at least 1, got {threads}")
        self.threads = threads
        self.isa = choose_isa()
        cpus = sorted(cpus or ())
        self.handle = load().lamina_workers(self.isa.encode(), threads, (c_int * len(cpus))(*cpus), len(cpus))
        if not self.handle:
            raise CapacityError(f"attention threads: this machine refuses to start {threads} threads; ask for fewer")

    def read(self, tensor: Tensor) -> None:
        """Read every byte of a contiguous tensor once, an equal part in each thread: what memory can deliver."""
        load().lamina_read(self.handle, tensor.data_ptr(), tensor.nbytes)

    def close(self) -> None:
        """End the threads. May be called twice."""
        if self.handle:
            load().lamina_close(self.handle)
            self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()
