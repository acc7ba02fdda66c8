"""Attention over a paged KV cache: computes and stores, and knows no network, no event loop and no model.

`KVLayout` says what is stored, `KVCache` stores it, a `Backend` attends over it: planned once per step, run
once per layer. `attend` is the same attention over dense tensors, and `merge` joins the `Partial` results of
any partition.

Importing this package is cheap; torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.attention.backend import Backend, Plan, create_backend
    from lamina.attention.cache import KVCache
    from lamina.attention.dense import attend
    from lamina.attention.layout import KVLayout, LayerShape
    from lamina.attention.partial import Partial, merge
    from lamina.attention.rows import Rows, Run

__all__ = [
    "Backend",
    "KVCache",
    "KVLayout",
    "LayerShape",
    "Partial",
    "Plan",
    "Rows",
    "Run",
    "attend",
    "create_backend",
    "merge",
]

_MODULES = {
    "Backend": "backend",
    "KVCache": "cache",
    "KVLayout": "layout",
    "LayerShape": "layout",
    "Partial": "partial",
    "Plan": "backend",
    "Rows": "rows",
    "Run": "rows",
    "attend": "dense",
    "create_backend": "backend",
    "merge": "partial",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
