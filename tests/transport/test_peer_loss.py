"""A peer that dies or falls silent is found in time; one that was only not listened to is not blamed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import lamina
from lamina.errors import PeerLostError
from lamina.transport import Address, Hello, Lane, Listener, Options, RemoteRegion

PEER_TIMEOUT = 0.8
HEARTBEAT_PERIOD = PEER_TIMEOUT / 4
SLACK = 5.0  # the machine may be busy
MIB = 1 << 20


class Owner:
    """What the owner of a link sees of it."""

    def __init__(self, link):
        self.link = link
        self.messages = asyncio.Queue()
        self.lost = asyncio.get_running_loop().create_future()
        link.on_message = self.messages.put_nowait
        link.on_lost = self.lost.set_result


@asynccontextmanager
async def peer_process(options):
    """A link to a node in another process, its region, and that process."""
    accepted = asyncio.get_running_loop().create_future()
    local = Address.parse("127.0.0.1:0")
    async with (
        asyncio.timeout(30),
        await Listener.open(
            local,
            Hello("compute", "c0"),
            lambda link: accepted.set_result(Owner(link)),
            replace(options, peer_timeout=PEER_TIMEOUT),
            handshake_timeout=30,
        ) as listener,
    ):
        arguments = [str(listener.address.port), options.kind]
        if options.tls:
            files = options.tls
            arguments += [options.secret.decode(), str(files.certificate), str(files.key), str(files.authority)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).with_name("peer.py"),
            *arguments,
            env={**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])},
        )
        try:
            owner = await accepted
            region = None
            if options.kind != "control":
                region = RemoteRegion.from_wire((await owner.messages.get())["region"])
            yield owner, region, process
            owner.link.abort("the test is over")
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def test_killed_peer(run, options):
    """The kernel closes the connections of a killed process: the link ends at once."""

    async def main():
        async with peer_process(options) as (owner, _, process):
            owner.link.peer_timeout = 60.0
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)

            assert isinstance(error, PeerLostError)
            assert "m1 (memory, tcp://127.0.0.1:" in str(error)
            assert "closed the connection" in str(error) or "is gone" in str(error)

    run(main())


def test_peer_killed_in_mid_write(run, options):
    """So it does while the peer takes a large write, or has taken half of it; who waits for the queue learns of it."""

    async def main():
        async with peer_process(options) as (owner, region, process):
            owner.link.peer_timeout = 60.0
            data = bytes(16 * MIB)
            for lane in Lane:
                for i in range(16):
                    owner.link.write(lane, region, 0, [data], i)
            waiting = asyncio.create_task(owner.link.drain(Lane.BULK))
            queued = owner.link.pending_bytes
            while owner.link.pending_bytes > queued - 20 * MIB:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0)
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)
            await asyncio.wait([waiting])

            assert isinstance(error, PeerLostError)
            assert waiting.exception() is error
            assert owner.link.pending_bytes == 0

    run(main())


def test_stopped_peer(run, options):
    """A process that hangs is found when it has been silent for ``peer_timeout``, and not much before."""

    async def main():
        async with peer_process(options) as (owner, _, process):
            loop = asyncio.get_running_loop()
            stopped = loop.time()
            process.send_signal(signal.SIGSTOP)
            error = await asyncio.wait_for(owner.lost, PEER_TIMEOUT + HEARTBEAT_PERIOD + SLACK)

            assert isinstance(error, PeerLostError)
            assert "has been silent for 0.8 s" in str(error)
            assert loop.time() - stopped > PEER_TIMEOUT - 2 * HEARTBEAT_PERIOD

    run(main())


def test_stopped_peer_with_a_full_queue(run, options):
    """So is one that stops in the middle of a transfer; who waits for the queue learns of it."""

    async def main():
        async with peer_process(options) as (owner, region, process):
            process.send_signal(signal.SIGSTOP)
            data = bytes(16 * MIB)
            for lane in Lane:
                # Shared memory takes as many writes as its ring has room for; the last ones have to wait.
                for i in range(4):
                    owner.link.write(lane, region, 0, [data], i)
                for i in range(2000):
                    owner.link.write(lane, region, 0, [data[:1]], i)
            with pytest.raises(PeerLostError):
                await asyncio.wait_for(owner.link.drain(Lane.BULK), SLACK)
            assert owner.lost.done()

    run(main())


def test_own_stall_is_not_blamed_on_the_peer(run, options):
    """Whoever did not listen for longer than ``peer_timeout`` reads first; and silence of the owners is no end."""

    async def main():
        async with peer_process(options) as (owner, _, _):
            time.sleep(1.5 * PEER_TIMEOUT)  # noqa: ASYNC251 - this is the stall
            await asyncio.sleep(1.5 * PEER_TIMEOUT)
            owner.link.send({"still": "there"})

            assert await owner.messages.get() == {"still": "there"}
            assert not owner.lost.done()

    run(main())


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_control_link(run, stop):
    """A link that only carries messages notices a death and silence as well."""

    async def main():
        async with peer_process(Options(kind="control")) as (owner, _, process):
            owner.link.send({"still": "there"})
            assert await owner.messages.get() == {"still": "there"}
            process.send_signal(stop)

            assert isinstance(await asyncio.wait_for(owner.lost, PEER_TIMEOUT + SLACK), PeerLostError)

    run(main())
