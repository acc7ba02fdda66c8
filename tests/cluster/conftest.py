from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "run the cluster over this transport alone (rdma: in the user-mode kernel of tests/rdma)"
    parser.addoption("--transport", choices=harness.TRANSPORTS, help=about)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``transport`` run over each of two, or over the one that was asked for."""
    if "transport" in metafunc.fixturenames:
        asked = metafunc.config.getoption("transport", None)
        metafunc.parametrize("transport", [asked] if asked else ["tcp", "shm"])


@pytest.fixture(scope="session", autouse=True)
def wired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All nodes reach each other as ``--transport`` says."""
    before = harness.default
    asked = request.config.getoption("transport", None) or "auto"
    harness.default = harness.wire(asked, tmp_path_factory.mktemp("wiring"))
    yield
    harness.default = before


@pytest.fixture(scope="session")
def memory_ports(wired: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Addresses of three memory nodes that serve one compute node after the other."""
    ports = harness.free_ports(3)
    folder = tmp_path_factory.mktemp("memory")
    nodes = [harness.start_memory(folder, port) for port in ports]
    with harness.running(*nodes):
        yield ports
