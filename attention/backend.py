"""The interface that every attention backend implements, and the list of backends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lamina.attention.layout import KVLayout, LayerShape
from lamina.attention.rows import Rows
from lamina.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.attention.cache import KVCache
    from lamina.attention.partial import Partial
    from lamina.attention.pool import Pool, Range

log = logging.getLogger("lamina.attention")

BACKENDS = {
    "native": ("lamina.attention.native_backend", "NativeBackend"),
    "flashinfer": ("lamina.attention.flashinfer_backend", "FlashInferBackend"),
    "torch": ("lamina.attention.torch_backend", "TorchBackend"),
}
"""Name, module and class. Beside the class, the module has the `LayerBytes` of its blocks, ``layer_bytes``."""


INPUTS = ("float32", "bfloat16", "float16")
"""Types of q, k and v."""


class Plan(Protocol):
    """What a backend worked out about the rows of one step.

    Valid for the backend that made it, until a sequence of the step is released, or until a later step of it is planned
    whose windows have left behind what this one's reach; using it then is a `UsageError`.
    """

    @property
    def rows(self) -> Rows: ...


class Stored(NamedTuple):
    """Keys and values as they are stored, the same bits on every backend.

    k: [n, Hkv, Dk] and v: [n, Hkv, Dv] of the layout's type; their scales are float32 [n, Hkv] where the type has some.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Backend(Protocol):
    """Attention of a step's rows over a `KVCache`: planned once per step, run once per layer.

    `past` needs only q and may run before k and v of the new tokens exist; `finish` then adds what depends on
    them. A step is idempotent: run again with the same rows, it overwrites what it stored. q, k and v may be
    float32, bfloat16 or float16, whatever is stored. Made as ``Backend(cache, threads=, cpus=)``: so many threads
    compute, pinned to these processors where there are some; `ConfigError` names what it cannot do.
    """

    name: str
    cache: KVCache

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Store keys and values, rounded to the layout's type. k: [T, Hkv, Dk]; v: [T, Hkv, Dv].

        A position below the watermark is overwritten, unless it is in a published block or went back from behind the
        window; then it is skipped. `CapacityError` beyond a reservation; `UsageError` where positions between
        the watermark and the start of a run would be left out.
        """
        ...

    def plan(self, rows: Rows, *, store: bool = True) -> Plan:
        """Work out what is the same for all layers. Errors are those of `KVCache.place`.

        Without ``store`` the rows only meet the past: the plan is for `past` alone, and needs no space reserved.
        """
        ...

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        """Attention to the positions before the start of each row's run. q: [T, Hq, Dk].

        `UsageError` where one of these positions is not in the cache yet, or the plan is no longer valid.
        """
        ...

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        """Store k and v, attend to them (causally within each run) as stored, and merge with ``past``.

        q: [T, Hq, Dk]; k: [T, Hkv, Dk]; v: [T, Hkv, Dv]. The sinks of the layer, which `past` leaves out, join here.
        Errors are those of `append`; a plan that is no longer valid is a `UsageError`.
        """
        ...

    def export(self, sequence: int, layer: int, start: int, stop: int) -> Stored:
        """A copy of the positions start..stop-1; `UsageError` unless all are there."""
        ...

    def restore(self, sequence: int, layer: int, start: int, stored: Stored) -> None:
        """Store what `export` gave, bit for bit, at the positions from ``start``. Errors are those of `append`."""
        ...

    def close(self) -> None:
        """End the threads. Nothing else may be called afterwards."""
        ...


def create_backend(
    name: str,
    layout: KVLayout,
    home: Range | Pool,
    *,
    threads: int = 1,
    cpus: Sequence[int] | None = None,
) -> Backend:
    """The backend called ``name`` over a new cache in ``home``, whose own that is from now on.

    Memory becomes a pool with extents that suit the layout. What the backend needs is imported now and
    not before. `ConfigError` for an unknown name or a missing backend; errors of the cache are those of `KVCache`.
    """
    from lamina.attention.cache import KVCache
    from lamina.attention.pool import Pool, fit_extent

    module = require_backend(name)
    if not isinstance(home, Pool):
        sizes = [
            sum(module.layer_bytes(layout.layers[layer], layout.dtype, layout.block_tokens) for layer in group.layers)
            for group in layout.groups
        ]
        home = Pool(home, extent_bytes=fit_extent(home.nbytes, sizes))
    cache = KVCache(layout, home, module.layer_bytes)
    backend: Backend = getattr(module, BACKENDS[name][1])(cache, threads=threads, cpus=cpus)
    return backend


def require_backend(name: str) -> ModuleType:
    """The module of the backend called ``name``; `ConfigError` for an unknown name, or where it cannot be imported."""
    if name not in BACKENDS:
        raise ConfigError(f"attention backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    try:
        return import_module(BACKENDS[name][0])
    except (ImportError, OSError) as error:
        raise ConfigError(f"attention backend {name!r} is not available here: {error}") from error


def default_backend(device: str = "cpu") -> str:
    """The fastest backend that is there for a torch device; a warning is logged where that is only the reference."""
    fastest = "flashinfer" if device.startswith("cuda") else "native"
    try:
        require_backend(fastest)
        if fastest == "flashinfer" and find_spec("flashinfer") is None:
            raise ConfigError("the package flashinfer is not installed; install lamina[flashinfer]")
    except ConfigError as error:
        log.warning("event=attention_fallback backend=torch reason=%r", str(error))
        return "torch"
    return fastest


def check_key_value(layer: int, shape: LayerShape, tokens: int, k: Tensor, v: Tensor, device: str = "cpu") -> None:
    """`UsageError` unless k is [tokens, Hkv, Dk] and v [tokens, Hkv, Dv], of a type that comes over the wire, on the
    torch device of the cache."""
    _check(layer, "k", k, (tokens, shape.kv_heads, shape.qk_dim), INPUTS, device)
    _check(layer, "v", v, (tokens, shape.kv_heads, shape.v_dim), INPUTS, device)


def check_query(layer: int, shape: LayerShape, tokens: int, q: Tensor, device: str = "cpu") -> None:
    """`UsageError` unless q is [tokens, Hq, Dk], of a type that comes over the wire, on the cache's device."""
    _check(layer, "q", q, (tokens, shape.q_heads, shape.qk_dim), INPUTS, device)


def check_past(layer: int, shape: LayerShape, tokens: int, past: Partial, device: str = "cpu") -> None:
    """`UsageError` unless ``past`` is what `Backend.past` gives for so many rows, on the cache's device."""
    _check(layer, "o", past.o, (tokens, shape.q_heads, shape.v_dim), ("float32",), device)
    _check(layer, "lse", past.lse, (tokens, shape.q_heads), ("float32",), device)


def _check(layer: int, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Sequence[str], device: str) -> None:
    if tensor.shape != shape:
        raise UsageError(f"layer {layer}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
    if str(tensor.dtype).removeprefix("torch.") not in dtypes:
        raise UsageError(f"layer {layer}: expected {name} of type {' or '.join(dtypes)}, got {tensor.dtype}")
    if str(tensor.device) != device:
        raise UsageError(f"layer {layer}: expected {name} on {device}, where the cache is, got it on {tensor.device}")
