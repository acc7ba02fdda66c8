"""What RDMA promises beyond ``Link``: the ports it takes, the memory it sends from, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from lamina.errors import ConnectError, ProtocolError
from lamina.transport import Lane, Options, RdmaOptions, Region, rdma
from lamina.transport.lanes import UpgradeError
from lamina.transport.testing import CHECKS, noise, two_ends, until_sent
from tests.rdma.inside import links
from tests.rdma.inside.cable import disturbed

REPOSITORY = Path(__file__).parents[3]
LIMITED = ("/usr/bin/setpriv", "--bounding-set=-ipc_lock", "/usr/bin/prlimit")
MIB = 1 << 20


# -- ports


def test_offer_of_the_first_port() -> None:
    """Without any wish it is the first active port, by the RoCE v2 GID of its IPv4 address."""
    assert rdma.offer(Options()) == {
        "device": "rxe0",
        "port": 1,
        "link_layer": "ethernet",
        "gid": "0000:0000:0000:0000:0000:ffff:0a4d:0001",
        "gid_index": 1,
        "lid": 0,
        "mtu": 4096,
    }


def test_offer_of_what_was_asked_for() -> None:
    """Device, GID and MTU may be chosen."""
    offer = rdma.offer(Options(rdma=RdmaOptions(device="rxe1", port=1, gid_index=0, mtu=1024)))
    assert (offer["device"], offer["gid_index"], offer["mtu"]) == ("rxe1", 0, 1024)
    assert offer["gid"].startswith("fe80:")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (RdmaOptions(device="mlx5_0"), "there is no RDMA device 'mlx5_0', only rxe0, rxe1"),
        (RdmaOptions(device="rxe1", port=2), "rxe1 has no port 2, only 1 to 1"),
        (RdmaOptions(gid_index=7), r"no RoCE v2 GID of index 7; of this kind it has: 0 \(fe80::.*\), 1 \(10.77.0.1\)"),
    ],
)
def test_refused_ports(wanted: RdmaOptions, reason: str) -> None:
    """What was demanded and is not there is named, and so is what is there."""
    with pytest.raises(UpgradeError, match=reason):
        rdma.offer(Options(rdma=wanted))


def test_refused_mtu() -> None:
    """A demanded MTU above the port's is refused."""
    ip("veth0", "mtu", "1500")
    try:
        with pytest.raises(UpgradeError, match=r"rxe0 port 1 has an MTU of 1024 bytes, and rdma.mtu demands 4096"):
            rdma.offer(Options(rdma=RdmaOptions(device="rxe0", mtu=4096)))
    finally:
        ip("veth0", "mtu", "4200")


def test_refused_port_that_is_down() -> None:
    """A port that is not active is passed over; if it was demanded, the error tells its state."""
    ip("veth0", "down")
    try:
        with pytest.raises(UpgradeError, match="rxe0 port 1 is down, not active"):
            rdma.offer(Options(rdma=RdmaOptions(device="rxe0")))
    finally:
        ip("veth0", "up")
        # Its route went with it.
        route = ("10.77.0.2", "dev", "veth0", "src", "10.77.0.1", "table", "100")
        subprocess.run(["/usr/sbin/ip", "route", "replace", *route], check=True)


def ip(device: str, *change: str) -> None:
    subprocess.run(["/usr/sbin/ip", "link", "set", device, *change], check=True)


def limited(memlock: int, program: str) -> str:
    """What a process prints that may lock only so many bytes of memory."""
    command = (*LIMITED, f"--memlock={memlock}", "--", sys.executable, "-c", program)
    return subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_refused_for_the_limit_of_locked_memory() -> None:
    """Where next to nothing may be locked RDMA is not offered, and the error says what to set."""
    told = limited(
        65536,
        "from lamina.transport import Options, rdma\n"
        "try: rdma.offer(Options())\n"
        "except Exception as error: print(type(error).__name__, error)",
    )
    assert re.match("UpgradeError .*RLIMIT_MEMLOCK is 65536 bytes here: set LimitMEMLOCK=infinity", told)


def test_region_beyond_the_limit_of_locked_memory() -> None:
    """A region that may not be locked cannot be exposed: CapacityError, with both numbers; the link lives on."""
    told = limited(
        80 * MIB,
        "import uvloop\n"
        "from lamina.transport import Region\n"
        "from tests.rdma.inside import links\n"
        "async def main():\n"
        "    near, far = await links.make_pair()\n"
        "    try: near.expose(Region('large', 100 << 20))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "    print(near.state.closed)\n"
        "    near.abort('done'), far.abort('done')\n"
        "uvloop.run(main())",
    )
    assert re.match("CapacityError 104857600 bytes .*RLIMIT_MEMLOCK is 83886080 bytes here: .*\nFalse", told)


def test_no_way_between_the_ports() -> None:
    """Two active ports that do not reach each other: an error where RDMA is demanded, TCP where it is not."""

    async def main() -> None:
        with disturbed("veth0", "loss", "100%", roce_only=True):
            with pytest.raises(ConnectError, match=r"no answer over RDMA from 10\.77\.0\.\d \(rxe\d\)"):
                await links.make_pair()
            near, far = await links.make_pair(
                links.options(links.NEAR, kind="auto"), links.options(links.FAR, kind="auto")
            )
            for link in (near, far):
                link.abort("the test is over")
        # In one process both ends are on one host, so shm comes before.
        assert near.info.transport in ("shm", "tcp")

    uvloop.run(main())


# -- sources


@pytest.mark.parametrize(
    "make",
    [
        lambda data: [Region("source", len(data)).buffer],
        lambda data: [memoryview(bytearray(len(data)))],
        lambda data: [memoryview(mmap.mmap(-1, len(data)))],
        lambda data: [data],
        lambda data: [memoryview(data)[:5], memoryview(bytearray(data))[5:]],
    ],
    ids=["region", "bytearray", "mmap", "bytes", "two"],
)
@pytest.mark.parametrize("nbytes", [100, 8192, 100_000, 3 * MIB])
def test_sources(make: Callable[[bytes], list[memoryview | bytes]], nbytes: int) -> None:
    """Memory of any kind and size is a source, also again after it is gone and its address was used anew."""

    async def main() -> None:
        async with two_ends(links.make_pair, nbytes=4 * MIB) as (left, right):
            for tag in range(4):
                data = noise(nbytes, tag)
                pieces = make(data)
                for piece in pieces:
                    if len(pieces) == 1 and isinstance(piece, memoryview) and not piece.readonly:
                        piece[:] = data
                left.link.write(Lane(tag % 2), left.remote, 7, pieces, tag)
                await until_sent(left.link)
                await right.until_arrived(tag + 1)
                assert right.memory[7 : 7 + nbytes] == data
                del pieces
                gc.collect()

    uvloop.run(main())


def test_many_registered_pieces() -> None:
    """More pieces of a region than one request can gather arrive as one write."""

    async def main() -> None:
        async with two_ends(links.make_pair) as (left, right):
            source = Region("source", MIB)
            source.buffer[:] = noise(MIB)
            pieces = [source.buffer[start : start + 1000] for start in range(0, MIB - 1000, 2000)]
            left.link.write(Lane.DECODE, left.remote, 1, pieces, 1)
            await right.until_arrived(1)
            total = sum(piece.nbytes for piece in pieces)
            assert right.memory[1 : 1 + total] == b"".join(pieces)
            await until_sent(left.link)
            assert left.link.state.bytes_written == (total, 0)

    uvloop.run(main())


# -- queues


@pytest.mark.parametrize("check", [c for c in CHECKS if "many_tags" in c.__name__ or "both_dir" in c.__name__])
def test_shortest_queue(check: Callable[..., object]) -> None:
    """With room for 16 writes all checks of order and amount hold: nothing is posted for which there is no receive."""

    async def make_pair():
        return await links.make_pair(links.options(links.NEAR, queue=16), links.options(links.FAR, queue=16))

    uvloop.run(check(make_pair))


def test_busy_poll() -> None:
    """A loop that looks for arrivals all the time gets them."""

    async def main() -> None:
        ends = [replace(links.options(device), busy_poll=True) for device in (links.NEAR, links.FAR)]
        async with two_ends(lambda: links.make_pair(*ends)) as (left, right):
            for tag in range(20):
                left.write(0, noise(8192, tag), tag)
                await right.until_arrived(tag + 1)
                assert right.memory[:8192] == noise(8192, tag)
            await until_sent(left.link)

    uvloop.run(main())


def test_receives_that_the_peer_cannot_have() -> None:
    """A peer that returns more receives than it ever had ends the link."""

    async def main() -> None:
        async with two_ends(links.make_pair) as (left, right):
            left.link.send_note({"lane": 0, "credits": 2000})
            error = await right.until_lost()
            assert isinstance(error, ProtocolError)
            assert "2000 receives more" in str(error)

    uvloop.run(main())


# -- what is left behind


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def objects_of_verbs() -> str:
    """How many of each kind there are on each device."""
    return subprocess.run(["/usr/bin/rdma", "resource"], check=True, capture_output=True, text=True).stdout


def test_links_leave_nothing() -> None:
    """After 100 links there are no more descriptors, objects of verbs or bytes than after 20."""

    async def main() -> tuple[int, str, int]:
        for number in range(20):
            near, far = await links.make_pair()
            region = Region("region", MIB)
            near.expose(region)
            lost: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            far.deliver(on_lost=lost.set_result)
            if number % 2:
                await near.close()
            else:
                near.abort("now")
            await lost
        await asyncio.sleep(0.1)
        return len(os.listdir("/proc/self/fd")), objects_of_verbs(), resident()

    logging.disable()  # else pytest keeps what is logged, and with it the links
    try:
        first, *_, last = [uvloop.run(main()) for _ in range(5)]
    finally:
        logging.disable(logging.NOTSET)
    assert last[0] <= first[0]
    assert last[1] == first[1]
    assert last[2] - first[2] < 2 * MIB


def test_writes_leave_nothing() -> None:
    """20,000 writes of every kind take no memory that is not given back."""

    async def main() -> None:
        async with two_ends(links.make_pair) as (left, right):
            source = Region("source", MIB).buffer
            small = bytes(1000)
            kinds = ([source[:8000]], [small[:8]], [small], [source[:100], source[500:700], small])

            async def write(count: int) -> int:
                for tag in range(count):
                    left.link.write(Lane.DECODE, left.remote, 0, kinds[tag % 4], tag)
                    if tag % 64 == 63:
                        await until_sent(left.link)
                await right.until_arrived(count)
                right.arrived.clear()
                return resident()

            before = await write(2000)
            assert await write(20_000) - before < MIB

    uvloop.run(main())
