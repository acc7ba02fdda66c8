"""The interface that every attention backend implements, and the list of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lamina.attention.rows import Rows
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.attention.cache import KVCache
    from lamina.attention.partial import Partial


class Plan(Protocol):
    """What a backend worked out about the rows of one step.

    Valid for the backend that made it, until a sequence of the step is released.
    """

    @property
    def rows(self) -> Rows: ...


class Backend(Protocol):
    """Attention of a step's rows over a `KVCache`: planned once per step, run once per layer.

    `past` needs only q and may run before k and v of the new tokens exist; `finish` then adds what depends on
    them. A step is idempotent: run again with the same rows, it overwrites what it stored.
    """

    def plan(self, rows: Rows) -> Plan:
        """Work out what is the same for all layers. `CapacityError` where rows exceed their reservations."""
        ...

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        """Attention to the positions before the start of each row's run. q: [T, Hq, Dk].

        `UsageError` where one of these positions is not in the cache yet.
        """
        ...

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        """Store k and v, attend to them (causally within each run) as stored, and merge with ``past``.

        q: [T, Hq, Dk]; k: [T, Hkv, Dk]; v: [T, Hkv, Dv]. Errors are those of `KVCache.append`.
        """
        ...


def create_backend(name: str, cache: KVCache) -> Backend:
    """The backend called ``name`` over ``cache``; what it needs is imported now and not before."""
    if name not in _FACTORIES:
        raise ConfigError(f"attention backend: expected one of {', '.join(_FACTORIES)}, got {name!r}")
    return _FACTORIES[name](cache)


def _torch(cache: KVCache) -> Backend:
    from lamina.attention.torch_backend import TorchBackend

    return TorchBackend(cache)


_FACTORIES: dict[str, Callable[[KVCache], Backend]] = {"torch": _torch}
