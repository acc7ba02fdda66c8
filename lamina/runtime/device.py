"""A device computes on a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, TypeVarTuple

from lamina.runtime.spans import Place, Recorder

if TYPE_CHECKING:
    import torch

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class Device(Protocol):
    """Runs the operations of a node, one after the other.

    Everything that computes on a node, and everything that copies between what it computed and what is sent, is an
    operation. ``loop`` is the event loop on which coroutines wait for operations; the lanes of links belong to it too,
    so between two operations it sees what has arrived. The node's own loop does control; it may be the same loop.
    """

    loop: asyncio.AbstractEventLoop
    torch_device: torch.device
    """Where the tensors of operations lie."""
    threads: int
    """The number of threads that compute."""
    cpus: tuple[int, ...] | None
    """The processors that the process is pinned to, if it is."""
    busy_s: float
    """Seconds that operations have taken so far."""
    recorder: Recorder | None
    """It gets the span of every operation, unless it is None."""

    def start(self) -> None:
        """Begin to run ``loop``. A device is started once."""

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, at: Place | None = None) -> tuple[R, float]:
        """Run one operation; called on ``loop``. Returns its result and the seconds from its start to its completion.

        The result is complete: no part of it is still being computed. The call may suspend, and then other coroutines
        run meanwhile, but no other operation. ``at`` says in its span what the operation is part of.
        """

    def close(self) -> None:
        """Stop when no operation runs. The links whose lanes belong to ``loop`` have to be closed before."""
