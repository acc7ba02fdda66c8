"""This module finds the native library, loads it and describes it to ctypes. Calls into it release the GIL."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from functools import cache
from pathlib import Path

from torch import Tensor

from lamina.attention.native.build import LIBRARY
from lamina.errors import CapacityError, ConfigError, UsageError

ABI = 4
"""This number has to equal ``ABI`` in workers.cpp."""

REBUILD = "install g++ and run: python -m lamina.attention.native.build"

MAX_THREADS = 1024


class KernelLayer(Structure):
    """This mirrors the struct ``Layer`` in kernel.h."""

    _fields_ = (
        ("memory", c_void_p),
        ("sinks", c_void_p),
        ("slopes", c_void_p),
        ("kv_heads", c_int32),
        ("group", c_int32),
        ("qk_dim", c_int32),
        ("v_dim", c_int32),
        ("block_tokens", c_int32),
        ("kv_type", c_int32),
        ("input_type", c_int32),
        ("window", c_int32),
        ("chunk", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class KernelStep(Structure):
    """This mirrors the struct ``Step`` in kernel.h: addresses of int64 arrays with one number per run."""

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
    """Load the library from ``LAMINA_NATIVE_LIBRARY``, or from where the package's build put it.

    `ConfigError` if it cannot be loaded, or was built from other sources.
    """
    path = Path(os.environ.get("LAMINA_NATIVE_LIBRARY") or LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise ConfigError(
            f"attention backend native: its library {path} cannot be loaded ({e}); it is compiled when lamina is "
            f"installed on a machine with a C++ compiler; {REBUILD}, or choose the backend torch, which is slower"
        ) from e
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "lamina_abi": (c_int64, ()),
        "lamina_isas": (c_char_p, ()),
        "lamina_workers": (c_void_p, (c_char_p, c_int, POINTER(c_int), c_int)),
        "lamina_close": (None, (c_void_p,)),
        "lamina_layer_bytes": (c_int64, (POINTER(KernelLayer),)),
        "lamina_past": (c_int, (c_void_p, POINTER(KernelLayer), POINTER(KernelStep), *(c_void_p,) * 3)),
        "lamina_finish": (
            c_int,
            (c_void_p, POINTER(KernelLayer), POINTER(KernelLayer), POINTER(KernelStep), *(c_void_p,) * 7),
        ),
        "lamina_append": (c_int, (c_void_p, POINTER(KernelLayer), POINTER(KernelStep), c_void_p, c_void_p)),
        **dict.fromkeys(
            ("lamina_unpack", "lamina_pack"),
            (c_int, (c_void_p, POINTER(KernelLayer), c_void_p, c_int64, c_void_p, c_int64)),
        ),
        "lamina_read": (c_int, (c_void_p, c_void_p, c_int64)),
    }
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            if result is c_int:
                function.errcheck = _status
        found = library.lamina_abi()
    except AttributeError as e:
        raise ConfigError(f"attention backend native: {path} is not a library of this kernel ({e}); {REBUILD}") from e
    if found != ABI << 32 | sizeof(KernelLayer) << 16 | sizeof(KernelStep):
        raise ConfigError(f"attention backend native: {path} was built from other sources than these; {REBUILD}")
    return library


def _status(status: int, function: object, arguments: tuple[object, ...]) -> int:
    if status:
        raise CapacityError("attention backend native: no memory left for the parts of a step; free some and try again")
    return status


def available_isas() -> list[str]:
    """Return the names of the kernels that this machine can run, best first."""
    names: bytes = load().lamina_isas()
    return names.decode().split(",")


def choose_isa() -> str:
    """Return ``LAMINA_ISA``, or the best kernel that this machine can run; `ConfigError` for one that it cannot run."""
    isas = available_isas()
    name = os.environ.get("LAMINA_ISA") or isas[0]
    if name not in isas:
        raise ConfigError(f"LAMINA_ISA: expected one of {', '.join(isas)}, which this machine can run, got {name!r}")
    return name


class Workers:
    """The workers are ``threads`` threads: the calling one, and others, which are pinned to ``cpus`` in turn if given.

    They belong to the thread that calls. `ConfigError` for processors or an instruction set that the machine does not
    have, `CapacityError` if the machine refuses to start a thread.
    """

    def __init__(self, threads: int, cpus: Sequence[int] | None = None) -> None:
        self._handle: int | None = None
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"attention threads: expected 1 to {MAX_THREADS}, got {threads}")
        cpus, available = sorted(cpus or ()), os.sched_getaffinity(0)
        if missing := set(cpus) - available:
            raise ConfigError(f"attention cpus: expected some of {sorted(available)}, got {sorted(missing)} as well")
        self.threads = threads
        self.isa = choose_isa()
        self._process = os.getpid()
        self._handle = load().lamina_workers(self.isa.encode(), threads, (c_int * len(cpus))(*cpus), len(cpus))
        if not self._handle:
            raise CapacityError(f"attention threads: this machine refuses to start {threads} threads; ask for fewer")

    @property
    def handle(self) -> int:
        """The calls of the library take this handle.

        `UsageError` after `close`, and in a forked process, which has no threads.
        """
        if self._handle is None:
            raise UsageError("the attention threads were closed; make a new backend")
        if os.getpid() != self._process:
            raise UsageError("attention threads do not survive a fork; make the backend in the process that uses it")
        return self._handle

    def read(self, tensor: Tensor) -> None:
        """Read every byte of a contiguous tensor once, an equal part in each thread, to measure the memory.

        `UsageError` unless the tensor has whole pages of 4 KiB.
        """
        if tensor.nbytes % 4096 or not tensor.is_contiguous():
            raise UsageError(f"expected a contiguous tensor of a multiple of 4096 bytes, got {tensor.nbytes}")
        load().lamina_read(self.handle, tensor.data_ptr(), tensor.nbytes)

    def close(self) -> None:
        """End the threads. A second call does nothing."""
        if self._handle is not None and os.getpid() == self._process:
            load().lamina_close(self._handle)
        self._handle = None

    def __del__(self) -> None:
        self.close()
