"""`Cuda` has everything that needs a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import ConfigError


class Cuda:
    """One CUDA device receives arrays, records events and captures graphs here; tests without a device replace this."""

    def __init__(self, device: torch.device) -> None:
        """Raise `ConfigError` for another device, or one of a compute capability below 8.0."""
        if device.type != "cuda":
            raise ConfigError(
                f"attention backend flashinfer: expected memory on a CUDA device, got {device}; "
                f"use the backend native or torch there"
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ConfigError(
                f"attention backend flashinfer: expected a device of compute capability 8.0 or later, got "
                f"{'.'.join(map(str, capability))}; use the backend torch there"
            )
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the device without waiting for the copy."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """Record an event behind everything that was launched so far."""
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record()
        return event

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture ``launch`` as a graph: it runs the same kernels over the same memory, at the cost of one launch.

        Graphs share the memory of their temporary tensors, so ``launch`` has to put its results into tensors that last.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                launch()  # kernels are compiled and loaded now, which a capture cannot record
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                launch()
        return graph.replay
