from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.server import Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the programs of all tests."""
    with running(tmp_path_factory.mktemp("clients")) as server:
        yield server
