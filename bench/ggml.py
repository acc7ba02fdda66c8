"""ggml's FLASH_ATTN_EXT, from the libraries in the Python package ``llama_cpp``; the package itself is not imported."""

from __future__ import annotations

import importlib.util
from ctypes import CDLL, RTLD_GLOBAL, Structure, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lamina.errors import ConfigError

F32, F16 = 0, 1
"""Values of ``enum ggml_type``."""

CONTEXT_BYTES = 256 << 10
"""Enough memory for the descriptions of a few tensors and one small graph."""


class _InitParams(Structure):
    """``ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_4d": (c_void_p, (c_void_p, c_int, *(c_int64,) * 4)),
    "ggml_permute": (c_void_p, (c_void_p, c_void_p, *(c_int,) * 4)),
    "ggml_flash_attn_ext": (c_void_p, (*(c_void_p,) * 5, *(c_float,) * 3)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_free": (None, (c_void_p,)),
}


def unavailable() -> str | None:
    """Return why ggml cannot be used here, or None."""
    try:
        _load()
    except ConfigError as e:
        return str(e)
    return None


@cache
def _load() -> Any:
    """Return the functions that are used here, each from the ggml library that has it."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ConfigError("llama_cpp is not installed")
    folder = Path(found.origin).parent / "lib"
    functions = {}
    try:
        libraries = [CDLL(str(folder / f"lib{name}.so"), mode=RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in _SIGNATURES.items():
            library = next((library for library in libraries if hasattr(library, name)), libraries[0])
            function = functions[name] = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as e:
        raise ConfigError(f"llama_cpp has no ggml library for CPUs that fits: {e}") from e
    return SimpleNamespace(**functions)


class FlashAttention:
    """Attention of one query per sequence in several layers, each a graph of one operation.

    q is float32 [B, Hq, D]; keys and values are float16 [layers, B, context, Hkv, D]. The tensors are read in place.
    """

    def __init__(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, threads: int) -> None:
        self._ggml = _load()
        self._out = torch.empty_like(q)
        self._kept = (q, keys, values)
        self._backend = self._ggml.ggml_backend_cpu_init()
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._buffers: list[int] = []
        self._contexts: list[int] = []
        self._graphs = [self._graph(q, k, v, scale) for k, v in zip(keys, values, strict=True)]

    def run(self, layer: int) -> Tensor:
        """Return the attention in a layer, [B, Hq, D]; the next call overwrites it."""
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graphs[layer])
        assert status == 0, f"ggml_backend_graph_compute returned {status}"
        return self._out

    def close(self) -> None:
        for context in self._contexts:
            self._ggml.ggml_free(context)
        for buffer in self._buffers:
            self._ggml.ggml_backend_buffer_free(buffer)
        self._ggml.ggml_backend_free(self._backend)

    def _graph(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> int:
        ggml = self._ggml
        context = ggml.ggml_init(_InitParams(CONTEXT_BYTES, None, True))
        self._contexts.append(context)
        batch, q_heads, dim = q.shape
        _, tokens, kv_heads, _ = keys.shape
        # ggml lists the innermost dimension first; its attention takes [D, tokens, heads, sequences].
        query = self._tensor(context, q, F32, dim, 1, q_heads, batch)
        k, v = (
            ggml.ggml_permute(context, self._tensor(context, x, F16, dim, kv_heads, tokens, batch), 0, 2, 1, 3)
            for x in (keys, values)
        )
        attention = ggml.ggml_flash_attn_ext(context, query, k, v, None, scale, 0.0, 0.0)
        self._place(attention, self._out)
        graph: int = ggml.ggml_new_graph_custom(context, 8, False)
        ggml.ggml_build_forward_expand(graph, attention)
        return graph

    def _tensor(self, context: int, data: Tensor, kind: int, *shape: int) -> int:
        tensor: int = self._ggml.ggml_new_tensor_4d(context, kind, *shape)
        self._place(tensor, data)
        return tensor

    def _place(self, tensor: int, data: Tensor) -> None:
        """Make ggml's tensor use the memory of torch's."""
        buffer = self._ggml.ggml_backend_cpu_buffer_from_ptr(data.data_ptr(), data.nbytes)
        self._buffers.append(buffer)
        self._ggml.ggml_backend_tensor_alloc(buffer, tensor, data.data_ptr())
