"""Attention over a paged KV cache: computes and stores, and knows no network, no event loop and no model.

`Memory` is taken once, lent by `Loans`, and cut into a `Pool`. `KVLayout` says what is stored, `KVCache` keeps account
of where, and a `Backend` stores it and attends over it: planned once per step, run once per layer. `attend` is the same
attention over dense tensors, and `merge` joins the `Partial` results of any partition.

Importing this package is cheap; torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.attention.backend import Backend, Plan, Stored, create_backend, default_backend
    from lamina.attention.cache import KVCache
    from lamina.attention.dense import attend
    from lamina.attention.layout import KVLayout, LayerGroup, LayerShape, window_blocks
    from lamina.attention.partial import Partial, add_sinks, merge
    from lamina.attention.pool import Loans, Memory, Pool, Range
    from lamina.attention.rows import Rows, Run

__all__ = [
    "Backend",
    "KVCache",
    "KVLayout",
    "LayerGroup",
    "LayerShape",
    "Loans",
    "Memory",
    "Partial",
    "Plan",
    "Pool",
    "Range",
    "Rows",
    "Run",
    "Stored",
    "add_sinks",
    "attend",
    "create_backend",
    "default_backend",
    "merge",
    "window_blocks",
]

_MODULES = {
    "Backend": "backend",
    "KVCache": "cache",
    "KVLayout": "layout",
    "LayerGroup": "layout",
    "LayerShape": "layout",
    "Loans": "pool",
    "Memory": "pool",
    "Partial": "partial",
    "Plan": "backend",
    "Pool": "pool",
    "Range": "pool",
    "Rows": "rows",
    "Run": "rows",
    "Stored": "backend",
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
