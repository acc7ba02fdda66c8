"""A peer that dies or falls silent is found in time; one that was only not listened to is not blamed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

import lamina
from lamina.errors import PeerLostError
from lamina.transport import Address, Hello, Lane, Listener, RemoteRegion

PEER_TIMEOUT = 0.8
HEARTBEAT_PERIOD = PEER_TIMEOUT / 4
SLACK = 5.0  # the machine may be busy


class Owner:
    """What the owner of a link sees of it."""

    def __init__(self, link):
        self.link = link
        self.messages = asyncio.Queue()
        self.lost = asyncio.get_running_loop().create_future()
        link.on_message = self.messages.put_nowait
        link.on_lost = self.lost.set_result


@asynccontextmanager
async def peer_process():
    """A link to a node in another process, and that process."""
    accepted = asyncio.get_running_loop().create_future()
    local = Address.parse("127.0.0.1:0")
    async with (
        asyncio.timeout(30),
        await Listener.open(
            local,
            Hello("compute", "c0"),
            lambda link: accepted.set_result(Owner(link)),
            peer_timeout=PEER_TIMEOUT,
            handshake_timeout=30,
        ) as listener,
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).with_name("peer.py"),
            str(listener.address.port),
            env={**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])},
        )
        try:
            owner = await accepted
            region = RemoteRegion.from_wire((await owner.messages.get())["region"])
            yield owner, region, process
            owner.link.abort("the test is over")
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def test_killed_peer(run):
    """The kernel closes the connections of a killed process: the link ends at once."""

    async def main():
        async with peer_process() as (owner, _, process):
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)

            assert isinstance(error, PeerLostError)
            assert "m1 (memory, tcp://127.0.0.1:" in str(error)
            assert "closed the connection" in str(error) or "is gone" in str(error)

    run(main())


def test_stopped_peer(run):
    """A process that hangs is found when it has been silent for ``peer_timeout``, and not much before."""

    async def main():
        async with peer_process() as (owner, _, process):
            loop = asyncio.get_running_loop()
            stopped = loop.time()
            process.send_signal(signal.SIGSTOP)
            error = await asyncio.wait_for(owner.lost, PEER_TIMEOUT + HEARTBEAT_PERIOD + SLACK)

            assert isinstance(error, PeerLostError)
            assert "has been silent for 0.8 s" in str(error)
            assert loop.time() - stopped > PEER_TIMEOUT - 2 * HEARTBEAT_PERIOD

    run(main())


def test_stopped_peer_with_a_full_queue(run):
    """So is one that stops in the middle of a transfer; who waits for the queue learns of it."""

    async def main():
        async with peer_process() as (owner, region, process):
            process.send_signal(signal.SIGSTOP)
            data = bytes(16 << 20)
            for lane in Lane:
                for i in range(4):
                    owner.link.write(lane, region, 0, [data], i)
            with pytest.raises(PeerLostError):
                await asyncio.wait_for(owner.link.drain(Lane.BULK), SLACK)
            assert owner.lost.done()

    run(main())


def test_own_stall_is_not_blamed_on_the_peer(run):
    """Whoever did not listen for longer than ``peer_timeout`` reads first; and silence of the owners is no end."""

    async def main():
        async with peer_process() as (owner, _, _):
            time.sleep(1.5 * PEER_TIMEOUT)  # noqa: ASYNC251 - this is the stall
            await asyncio.sleep(1.5 * PEER_TIMEOUT)
            owner.link.send({"still": "there"})

            assert await owner.messages.get() == {"still": "there"}
            assert not owner.lost.done()

    run(main())
