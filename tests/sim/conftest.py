"""A virtual clock, and a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.sim.loop import VirtualLoop
from tests.families import FAMILIES
from tests.oracle import Oracle


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop(limit_s=3600.0)
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a llama with 4 layers of 4 KV heads."""
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="session")
def oracle(llama: Path) -> Oracle:
    """What `transformers` says of that checkpoint."""
    return Oracle(llama)
