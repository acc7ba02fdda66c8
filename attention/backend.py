"""Every attention backend implements the interface `Backend`, and `create_backend` makes one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from lamina.attention.layout import KVLayout, LayerShape, plain_parts
from lamina.attention.rows import Rows
from lamina.errors import ConfigError, UsageError, install_extra

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.attention.cache import KVCache
    from lamina.attention.partial import Partial
    from lamina.attention.placement import Integers
    from lamina.attention.pool import ExtentPool, MemoryRange

log = logging.getLogger("lamina.attention")

BACKENDS: Mapping[str, tuple[str, str]] = {
    "native": ("lamina.attention.native_backend", "NativeBackend"),
    "flashinfer": ("lamina.attention.flashinfer.backend", "FlashInferBackend"),
    "torch": ("lamina.attention.torch_backend", "TorchBackend"),
}
"""Each name stands for a class in a module."""

INPUTS = ("float32", "bfloat16", "float16")
"""These are the types of q, k and v."""


class Plan(Protocol):
    """A plan holds what a backend worked out about the rows of one step.

    It is valid for the backend that made it, until a sequence of the step is released, or until planning a later step
    frees blocks that the windows of this one reach. Using it after that raises `UsageError`.
    """

    @property
    def rows(self) -> Rows: ...


class Backend(Protocol):
    """A backend attends with a step's rows over a `KVCache`: it plans a step once and runs it once per layer.

    `past` needs only q, so it may run before k and v of the new tokens exist; `finish` then adds what depends on them.
    A step is idempotent: run again with the same rows, it overwrites what it stored. q, k and v may be float32,
    bfloat16 or float16, whichever type is stored. A backend is made by a `BackendFactory`.
    """

    name: str
    cache: KVCache

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Store keys and values, rounded to the layout's type. k: [T, Hkv, Dk]; v: [T, Hkv, Dv].

        A position below the watermark is overwritten; it is skipped if its block is published, or was freed behind a
        window. `CapacityError` for positions beyond a reservation; `UsageError` where positions between the watermark
        and the start of a run would be left out.
        """
        ...

    def plan(self, rows: Rows, *, store: bool = True) -> Plan:
        """Work out what is the same for all layers. Errors are those of `KVCache.place`.

        Without ``store``, the plan serves `past` alone, and the rows need no reserved space.
        """
        ...

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        """Attend to the positions before the start of each row's run. q: [T, Hq, Dk].

        `UsageError` where one of these positions is not stored yet, or the plan is no longer valid.
        """
        ...

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        """Store k and v, attend to them as stored, causally within each run, and merge the result with ``past``.

        q: [T, Hq, Dk]; k: [T, Hkv, Dk]; v: [T, Hkv, Dv]. The sinks of the layer, which `past` leaves out, join here.
        Errors are those of `append`; `UsageError` also for a plan that is no longer valid.
        """
        ...

    def read(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        """Copy what full blocks hold in a layer to ``plain``, uint8 [n, bytes], in the form of `plain_parts`.

        ``blocks``, int64 [n], are byte offsets in the memory, as block tables have them. ``plain`` is contiguous and
        lies on the CPU. What is read is what every other backend stores with `write`, bit for bit.
        """
        ...

    def write(self, layer: int, blocks: Integers, plain: Tensor) -> None:
        """Store in blocks what `read`, of any backend with the same layout, has returned of a layer."""
        ...

    def close(self) -> None:
        """End the threads. No other method may be called afterwards."""
        ...


class BackendFactory(Protocol):
    """A factory makes backends of one kind: every backend class is one, and a caller may bring its own."""

    name: str

    def layer_bytes(self, shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of one layer in a block of ``block_tokens`` positions, stored as ``dtype``.

        `ConfigError` for a shape that the backend cannot store.
        """
        ...

    def __call__(self, cache: KVCache, *, threads: int = 1, cpus: Sequence[int] | None = None) -> Backend:
        """Make a backend over ``cache`` that computes with ``threads`` threads, pinned to ``cpus`` if given.

        `ConfigError` names what the backend cannot do.
        """
        ...


def create_backend(
    backend: str | BackendFactory,
    layout: KVLayout,
    home: MemoryRange | ExtentPool,
    *,
    threads: int = 1,
    cpus: Sequence[int] | None = None,
) -> Backend:
    """Make a backend over a new cache in ``home``, which belongs to that cache alone from now on.

    ``backend`` is a name in `BACKENDS`, or the caller's own factory. A range of memory becomes a pool with extents that
    suit the layout. Errors are those of `require_backend`, the factory and `KVCache`.
    """
    from lamina.attention.cache import KVCache
    from lamina.attention.pool import ExtentPool, fit_extent

    factory = require_backend(backend)
    if not isinstance(home, ExtentPool):
        sizes = [
            sum(factory.layer_bytes(layout.layers[layer], layout.dtype, layout.block_tokens) for layer in group.layers)
            for group in layout.groups
        ]
        home = ExtentPool(home, extent_bytes=fit_extent(home.nbytes, sizes))
    return factory(KVCache(layout, home, factory.layer_bytes), threads=threads, cpus=cpus)


def require_backend(backend: str | BackendFactory) -> BackendFactory:
    """Return the factory with this name, and a factory as it is. What a named backend needs is imported here.

    `ConfigError` for an unknown name, and for a backend that cannot be imported.
    """
    if not isinstance(backend, str):
        return backend
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    module, name = BACKENDS[backend]
    try:
        factory: BackendFactory = getattr(import_module(module), name)
    except (ImportError, OSError) as error:
        raise ConfigError(f"attention backend {backend!r} is not available here: {error}") from error
    return factory


def default_backend(device: str = "cpu") -> str:
    """Return the name of the fastest backend for a torch device; log a warning if that is only the reference."""
    fastest = "flashinfer" if device.startswith("cuda") else "native"
    try:
        require_backend(fastest)
        if fastest == "flashinfer" and find_spec("flashinfer") is None:
            raise ConfigError(f"the package flashinfer is not installed; {install_extra('flashinfer')}")
    except ConfigError as error:
        log.warning("event=attention_fallback backend=torch reason=%r", str(error))
        return "torch"
    return fastest


def check_key_value(layer: int, shape: LayerShape, tokens: int, k: Tensor, v: Tensor, device: str = "cpu") -> None:
    """Raise `UsageError` unless k is [tokens, Hkv, Dk] and v is [tokens, Hkv, Dv], of a type in `INPUTS`, on the torch
    device of the cache."""
    _check(layer, "k", k, (tokens, shape.kv_heads, shape.qk_dim), INPUTS, device)
    _check(layer, "v", v, (tokens, shape.kv_heads, shape.v_dim), INPUTS, device)


def check_query(layer: int, shape: LayerShape, tokens: int, q: Tensor, device: str = "cpu") -> None:
    """Raise `UsageError` unless q is [tokens, Hq, Dk], of a type in `INPUTS`, on the torch device of the cache."""
    _check(layer, "q", q, (tokens, shape.q_heads, shape.qk_dim), INPUTS, device)


def check_past(layer: int, shape: LayerShape, tokens: int, past: Partial, device: str = "cpu") -> None:
    """Raise `UsageError` unless ``past`` has the shapes and types that `Backend.past` returns for this many rows, on
    the torch device of the cache."""
    _check(layer, "o", past.o, (tokens, shape.q_heads, shape.v_dim), ("float32",), device)
    _check(layer, "lse", past.lse, (tokens, shape.q_heads), ("float32",), device)


def check_plain(layer: int, cache: KVCache, blocks: Integers, plain: Tensor) -> None:
    """Raise `UsageError` unless plain is [blocks, bytes], contiguous, for these blocks of a layer of the cache."""
    nbytes = sum(plain_parts(cache.shape(layer), cache.layout.dtype, cache.layout.block_tokens))
    _check(layer, "blocks", plain, (len(blocks), nbytes), ("uint8",), "cpu")
    if not plain.is_contiguous():
        raise UsageError(f"layer {layer}: expected blocks that lie one after the other, got strides {plain.stride()}")


def _check(layer: int, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Sequence[str], device: str) -> None:
    if tensor.shape != shape:
        raise UsageError(f"layer {layer}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
    if str(tensor.dtype).removeprefix("torch.") not in dtypes:
        raise UsageError(f"layer {layer}: expected {name} of type {' or '.join(dtypes)}, got {tensor.dtype}")
    if str(tensor.device) != device:
        raise UsageError(f"layer {layer}: expected {name} on {device}, where the cache is, got it on {tensor.device}")
