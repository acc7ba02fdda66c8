"""This package stores keys and values in a paged cache and attends over it. It knows no network, event loop or model.

A node takes its `Memory` once. `QuotaPool` divides it among tenants, and an `ExtentPool` cuts a tenant's range into
extents. `KVLayout` says what is stored, `KVCache` keeps account of where, and a `Backend` stores it and attends over
it: planned once per step, run once per layer. `attend` is the same attention over dense tensors, and `merge` joins the
`Partial` results of any partition.

The package is cheap to import; torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.attention.backend import Backend, BackendFactory, Plan, create_backend, default_backend
    from lamina.attention.cache import KVCache
    from lamina.attention.dense import attend
    from lamina.attention.layout import KVLayout, LayerGroup, LayerShape, window_blocks
    from lamina.attention.partial import Partial, add_sinks, merge
    from lamina.attention.pool import ExtentPool, Memory, MemoryRange, QuotaPool
    from lamina.attention.rows import Rows, Run

__all__ = [
    "Backend",
    "BackendFactory",
    "ExtentPool",
    "KVCache",
    "KVLayout",
    "LayerGroup",
    "LayerShape",
    "Memory",
    "MemoryRange",
    "Partial",
    "Plan",
    "QuotaPool",
    "Rows",
    "Run",
    "add_sinks",
    "attend",
    "create_backend",
    "default_backend",
    "merge",
    "window_blocks",
]

_MODULES = {
    "Backend": "backend",
    "BackendFactory": "backend",
    "KVCache": "cache",
    "KVLayout": "layout",
    "LayerGroup": "layout",
    "LayerShape": "layout",
    "QuotaPool": "pool",
    "Memory": "pool",
    "Partial": "partial",
    "Plan": "backend",
    "ExtentPool": "pool",
    "MemoryRange": "pool",
    "Rows": "rows",
    "Run": "rows",
    "add_sinks": "partial",
    "attend": "dense",
    "create_backend": "backend",
    "default_backend": "backend",
    "merge": "partial",
    "window_blocks": "layout",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
