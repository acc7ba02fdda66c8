"""Two processes, each with its own device, over a good and over a bad cable."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lamina.errors import PeerLostError, TransportError
from lamina.transport import Address, Hello, Lane, Link, Listener, Region, RemoteRegion
from lamina.transport.testing import noise, until_sent
from tests.rdma.inside import links
from tests.rdma.inside.cable import disturbed

MIB = 1 << 20
NEAR_ADDRESS = Address.parse("10.77.0.1:0")
PEER_TIMEOUT = 2.0
SLACK = 8.0  # the machine may be busy


class Owner:
    """What the owner of a link sees of it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.tags: asyncio.Queue[tuple[Lane, int]] = asyncio.Queue()
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.lost: asyncio.Future[TransportError] = asyncio.get_running_loop().create_future()
        self.region = Region("answers", MIB)
        self.remote = RemoteRegion(0, "not described yet", 1)
        link.deliver(
            on_tag=lambda lane, tag: self.tags.put_nowait((lane, tag)),
            on_message=self.messages.put_nowait,
            on_lost=self.lost.set_result,
        )

    async def introduce(self) -> None:
        self.remote = RemoteRegion.from_wire((await self.messages.get())["region"])
        await self.ask({"region": self.link.expose(self.region)})

    async def next_tag(self) -> tuple[Lane, int]:
        """The next tag; raises what the link is lost by if that comes first."""
        coming = asyncio.ensure_future(self.tags.get())
        await asyncio.wait([coming, self.lost], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            coming.cancel()
            raise self.lost.result()
        return coming.result()

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.link.send(message)
        return await self.messages.get()


@asynccontextmanager
async def peer_process(queue: int = 1024) -> AsyncIterator[tuple[Owner, asyncio.subprocess.Process]]:
    """A link over RDMA to a node in another process, and that process."""
    accepted: asyncio.Future[Owner] = asyncio.get_running_loop().create_future()
    near = links.options(links.NEAR, peer_timeout=PEER_TIMEOUT, queue=queue)
    hello = Hello("compute", "c0")
    async with (
        asyncio.timeout(60),
        await Listener.open(NEAR_ADDRESS, hello, lambda link: accepted.set_result(Owner(link)), near) as listener,
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.rdma.inside.rdma_peer", str(listener.address.port), str(queue)),
            cwd=Path(__file__).parents[3],
        )
        try:
            owner = await accepted
            await owner.introduce()
            yield owner, process
            owner.link.abort("the test is over")
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def test_round_trips() -> None:
    """What is written comes back, byte for byte, again and again."""

    async def main() -> None:
        async with peer_process() as (owner, _):
            assert owner.link.info.transport == "rdma"
            await owner.ask({"answer": 8192})
            for tag in range(200):
                data = noise(8192, tag)
                owner.link.write(Lane(tag % 2), owner.remote, 0, [data], tag)
                assert await owner.next_tag() == (Lane(tag % 2), tag)
                assert owner.region.buffer[:8192] == data

    uvloop.run(main())


def test_many_tags_through_a_short_queue() -> None:
    """Ten thousand writes that the device cannot take at once are answered in order: receives never run out."""

    async def main() -> None:
        async with peer_process(queue=64) as (owner, _):
            data = noise(80_000)
            for tag in range(10_000):
                owner.link.write(Lane.DECODE, owner.remote, 8 * tag, [data[8 * tag : 8 * tag + 8]], tag)
            assert [await owner.next_tag() for _ in range(10_000)] == [(Lane.DECODE, tag) for tag in range(10_000)]
            answer = await owner.ask({"digest": [0, 80_000]})
            assert answer["digest"] == hashlib.sha256(data).digest()

    uvloop.run(main())


@pytest.mark.parametrize("source", ["region", "bytes"])
def test_large_write(source: str) -> None:
    """64 MiB arrive as they were sent, from registered memory and from other memory."""

    async def main() -> None:
        async with peer_process() as (owner, _):
            staged = Region("staged", 64 * MIB)
            staged.buffer[:] = noise(MIB) * 64
            data = staged.buffer if source == "region" else bytes(staged.buffer)
            owner.link.write(Lane.BULK, owner.remote, 0, [data], 1)
            await until_sent(owner.link)
            assert await owner.next_tag() == (Lane.BULK, 1)
            answer = await owner.ask({"digest": [0, 64 * MIB]})
            assert answer["digest"] == hashlib.sha256(data).digest()

    uvloop.run(main())


def test_peer_killed_in_mid_write() -> None:
    """The end of the peer's process ends the link at once, whatever its device may still acknowledge."""

    async def main() -> None:
        async with peer_process() as (owner, process):
            staged = Region("staged", 64 * MIB)
            for tag in range(4):
                owner.link.write(Lane.BULK, owner.remote, 0, [staged.buffer], tag)
            await asyncio.sleep(0.02)
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)

            assert isinstance(error, PeerLostError)
            assert owner.link.state.error is error
            assert owner.link.state.pending_bytes == 0

    uvloop.run(main())


def test_stopped_peer() -> None:
    """A process that hangs is found by its silence, although its device still takes what is written."""

    async def main() -> None:
        async with peer_process() as (owner, process):
            process.send_signal(signal.SIGSTOP)
            owner.link.write(Lane.BULK, owner.remote, 0, [bytes(16 * MIB)], 1)
            await until_sent(owner.link)
            error = await asyncio.wait_for(owner.lost, PEER_TIMEOUT + SLACK)

            assert isinstance(error, PeerLostError)
            assert "has been silent for 2.0 s" in str(error)

    uvloop.run(main())


def test_lossy_cable() -> None:
    """Packets that get lost in either direction cost time, and nothing else."""

    async def main() -> None:
        async with peer_process() as (owner, _):
            with ExitStack() as cable:
                lost = [cable.enter_context(disturbed(end, "loss", "3%", "delay", "2ms")) for end in ("veth0", "veth1")]
                data = noise(4 * MIB)
                for tag in range(8):
                    part = slice(tag * MIB // 2, (tag + 1) * MIB // 2)
                    owner.link.write(Lane(tag % 2), owner.remote, part.start, [data[part]], tag)
                arrived = [await owner.next_tag() for _ in range(8)]
                assert (await owner.ask({"digest": [0, 4 * MIB]}))["digest"] == hashlib.sha256(data).digest()
                assert lost[0]() > 0
            for lane in Lane:
                assert [tag for of, tag in arrived if of is lane] == list(range(lane, 8, 2))

    uvloop.run(main())


def test_cut_cable() -> None:
    """Where RDMA alone stops working, the device's retries end the link within about ``peer_timeout``."""

    async def main() -> None:
        async with peer_process() as (owner, _):
            with disturbed("veth0", "loss", "100%", roce_only=True):
                owner.link.write(Lane.DECODE, owner.remote, 0, [b"data"], 1)
                error = await asyncio.wait_for(owner.lost, PEER_TIMEOUT + SLACK)

            assert isinstance(error, PeerLostError)
            assert "no answer from its device for 2.0 s" in str(error)

    uvloop.run(main())
