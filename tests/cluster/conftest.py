from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests import harness
from tests.oracle import Agreement


@pytest.fixture(scope="session")
def memory_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Addresses of three memory nodes that serve one compute node after the other."""
    ports = harness.free_ports(3)
    folder = tmp_path_factory.mktemp("memory")
    nodes = [harness.start_memory(folder, port) for port in ports]
    with harness.running(*nodes):
        yield ports


@pytest.fixture(scope="session")
def agreement(request: pytest.FixtureRequest) -> Iterator[Agreement]:
    """Ties of all comparisons together, which are reported: more than one in a thousand tokens is no coincidence."""
    agreement = Agreement()
    yield agreement
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stderr.write(f"\n{agreement.tokens} tokens compared with transformers, {len(agreement.ties)} ties\n")
    assert len(agreement.ties) * 1000 <= agreement.tokens, agreement.ties
