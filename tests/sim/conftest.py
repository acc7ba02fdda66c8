"""A virtual clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lamina.sim.loop import VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop(limit_s=3600.0)
    yield loop
    loop.close()
