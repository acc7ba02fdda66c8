"""What ``uml.py`` promises to the other tests: two devices, and a cable that can be disturbed."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pyverbs
from pyverbs import enums
from pyverbs.device import Context, get_device_list

from tests.rdma.inside.cable import disturbed

ADDRESSES = {"rxe0": "10.77.0.1", "rxe1": "10.77.0.2"}


def test_two_devices_are_ready() -> None:
    """pyverbs lists both devices, and their ports are active with the MTU of RoCE's longest packets."""
    assert sorted(device.name.decode() for device in get_device_list()) == list(ADDRESSES)
    for name in ADDRESSES:
        with Context(name=name) as context:
            port = context.query_port(1)
            assert (port.state, port.active_mtu) == (enums.IBV_PORT_ACTIVE, enums.IBV_MTU_4096)


def test_no_other_debian_package_is_visible() -> None:
    """pyverbs is found in a folder of its own, so that no package of Debian's hides one of the project's."""
    (folder,) = pyverbs.__path__
    assert [entry.name for entry in Path(folder).parent.iterdir()] == ["pyverbs"]


@pytest.fixture
def datagrams() -> Iterator[tuple[Callable[[bytes], int], Callable[[], bytes]]]:
    """Send from 10.77.0.1, and receive at 10.77.0.2."""
    kind = socket.AF_INET, socket.SOCK_DGRAM
    with socket.socket(*kind) as near, socket.socket(*kind) as far:
        near.bind((ADDRESSES["rxe0"], 0))
        far.bind((ADDRESSES["rxe1"], 0))
        far.settimeout(20)
        near.connect(far.getsockname())
        yield near.send, lambda: far.recv(100)


def test_lost_packets_do_not_arrive(datagrams: tuple[Callable[[bytes], int], Callable[[], bytes]]) -> None:
    """What is sent while the cable loses everything never arrives; what is sent afterwards does."""
    send, receive = datagrams
    with disturbed("veth0", "loss", "100%") as lost:
        for _ in range(10):
            send(b"lost")
        assert lost() >= 10
    send(b"arrives")
    assert receive() == b"arrives"


def test_other_packets_pass_where_only_rdma_is_lost(
    datagrams: tuple[Callable[[bytes], int], Callable[[], bytes]],
) -> None:
    """A cable that loses RDMA's packets alone still carries datagrams."""
    send, receive = datagrams
    with disturbed("veth0", "loss", "100%", roce_only=True) as lost:
        send(b"passes")
        assert receive() == b"passes"
        assert lost() == 0


def test_rdma_crosses_the_cable() -> None:
    """Two programs exchange all their messages by RDMA while the cable loses some of its packets, and only RDMA's."""
    pingpong = ("/usr/bin/ibv_rc_pingpong", "--gid-idx=1", "--events", "--size=65536", "--iters=20", "--port=7001")
    with disturbed("veth0", "loss", "3%", roce_only=True) as lost:
        server = subprocess.Popen([*pingpong, "--ib-dev=rxe1"])
        try:
            client = -1
            while client != 0 and server.poll() is None:  # until the server listens
                client = subprocess.run([*pingpong, "--ib-dev=rxe0", ADDRESSES["rxe1"]]).returncode
            assert (client, server.wait()) == (0, 0)
        finally:
            server.kill()
            server.wait()
        assert lost() > 0
