"""A world of its own: one clock, one network and any number of devices, the same for one seed in every run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from lamina.sim.device import ModelledDevice, Seconds
from lamina.sim.link import LinkModel
from lamina.sim.loop import VirtualLoop
from lamina.sim.network import SimNetwork

T = TypeVar("T")

LIMIT_S = 3600.0
"""Virtual seconds that a world lasts unless it is told otherwise: more than a test needs, and a hang ends soon."""
CLEANUP_S = 600.0
"""Virtual seconds that tasks have to end when the world does."""


class World:
    """Owns a loop, a network and devices, and runs coroutines on them.

    ``trace`` has a line for everything that arrived anywhere and for each operation of a device, with its virtual time.
    It is equal for two runs of the same program with one seed, and empty where ``tracing`` is off. ``random`` is for
    the program: its choices come from the seed as well, and do not change those of the network.
    """

    def __init__(
        self, seed: int, *, model: LinkModel | None = None, tracing: bool = True, limit_s: float = LIMIT_S
    ) -> None:
        """``limit_s``: virtual seconds after which a run fails with DeadlockError."""
        self.seed = seed
        self.trace: list[str] = []
        self.random = Random(f"world {seed}")  # noqa: S311 - no secret depends on it
        self.loop = VirtualLoop(limit_s=limit_s)
        self._line = self._add_line if tracing else None
        self.network = SimNetwork(self.loop, seed=seed, model=model, trace=self._line)
        self._runner = asyncio.Runner(loop_factory=lambda: self.loop)

    def device(self, name: str, seconds: Seconds) -> ModelledDevice:
        """A device whose operations take what ``seconds`` says; ``name`` is for the trace."""
        return ModelledDevice(self.loop, seconds, name=name, trace=self._line)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end on the virtual clock. DeadlockError when it would wait for ever."""
        with torch.inference_mode():  # as on the thread of a real device
            return self._runner.run(coroutine)

    def close(self) -> None:
        """Cancel all tasks that are left, and close the loop."""
        self.loop.limit_s = self.loop.time() + CLEANUP_S
        self._runner.close()
        self.loop.close()  # the runner does not, if nothing was run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_line(self, text: str) -> None:
        self.trace.append(f"{self.loop.time():.9f} {text}")
