"""A peer that dies or falls silent is found in time; one that was only not listened to is not blamed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import lamina
from lamina.errors import PeerLostError
from lamina.transport import Address, Hello, Lane, Listener, Options, RemoteRegion
from lamina.transport.testing import until_sent

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
        self.listen()

    def listen(self, **more):
        self.link.deliver(on_message=self.messages.put_nowait, on_lost=self.lost.set_result, **more)


@asynccontextmanager
async def peer_process(options, *, host="127.0.0.1", prefix=()):
    """A link to a node in another process, its region, and that process. ``prefix`` is a command that starts it."""
    accepted = asyncio.get_running_loop().create_future()
    local = Address("tcp", host, 0)
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
        arguments = [str(listener.address), options.kind, (options.secret or b"").decode()]
        if options.tls:
            arguments += [str(file) for file in (options.tls.certificate, options.tls.key, options.tls.authority)]
        process = await asyncio.create_subprocess_exec(
            *prefix,
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
            owner.listen(peer_timeout=60.0)
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)

            assert isinstance(error, PeerLostError)
            assert "m1 (memory, tcp://127.0.0.1:" in str(error)
            assert "closed the connection" in str(error) or "is gone" in str(error)

    run(main())


def test_peer_killed_in_mid_write(run, options):
    """So it does while the peer takes a large write, or has taken half of it; nothing is pending afterwards."""

    async def main():
        async with peer_process(options) as (owner, region, process):
            owner.listen(peer_timeout=60.0)
            data = bytes(16 * MIB)
            for lane in Lane:
                for i in range(16):
                    owner.link.write(lane, region, 0, [data], i)
            queued = owner.link.state.pending_bytes
            while owner.link.state.pending_bytes > queued - 20 * MIB:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0)
            process.kill()
            error = await asyncio.wait_for(owner.lost, SLACK)

            assert isinstance(error, PeerLostError)
            assert owner.link.state.error is error
            assert owner.link.state.pending_bytes == 0

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
    """So is one that stops in the middle of a transfer, when the queue is full."""

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
                await asyncio.wait_for(until_sent(owner.link), SLACK)
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


# -- a network that drops everything


class Cable:
    """A network namespace of its own, joined to this one by a cable that can be cut; packets are then dropped."""

    def __init__(self):
        # Several processes may run tests at once.
        block = os.getpid() % (1 << 14)
        self.near, self.far = (f"10.213.{block >> 6}.{(block & 63) * 4 + end}" for end in (1, 2))
        self.name = f"lamina-{os.getpid()}"
        self._device = f"lam{os.getpid() % 100_000}"
        self.prefix = ("ip", "netns", "exec", self.name)

    def lay(self):
        far = ["netns", "exec", self.name, "ip"]
        ip("netns", "add", self.name)
        ip("link", "add", self._device, "type", "veth", "peer", "name", "veth0", "netns", self.name)
        ip("address", "add", f"{self.near}/30", "dev", self._device)
        ip("link", "set", self._device, "up")
        ip(*far, "address", "add", f"{self.far}/30", "dev", "veth0")
        ip(*far, "link", "set", "veth0", "up")

    def cut(self):
        ip("netns", "exec", self.name, "ip", "link", "set", "veth0", "down")

    def remove(self):
        with suppress(subprocess.CalledProcessError):
            ip("netns", "delete", self.name)
        with suppress(subprocess.CalledProcessError):
            ip("link", "delete", self._device)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)  # noqa: S607


@pytest.fixture
def cable():
    if not shutil.which("ip"):
        pytest.skip("no network can be made here: the command ip is missing (iproute2)")
    cable = Cable()
    try:
        cable.lay()
    except subprocess.CalledProcessError as error:
        cable.remove()
        pytest.skip(f"no network can be made here, which only root may do: {error.stderr.strip()}")
    yield cable
    cable.remove()


SECRET = b"sixteen bytes or more"


@pytest.mark.parametrize(
    ("kind", "queue"), [("control", "idle"), ("tcp", "idle"), ("tcp", "busy"), ("tls", "idle"), ("tls", "busy")]
)
def test_silent_network(run, request, cable, kind, queue):
    """A peer whose packets are lost, and ours to it, is found in time, however much is under way to it."""
    options = Options("tcp" if kind == "tls" else kind, secret=SECRET)
    if kind == "tls":
        options = replace(options, tls=request.getfixturevalue("tls"))

    async def main():
        async with peer_process(options, host=cable.near, prefix=cable.prefix) as (owner, region, _):
            loop = asyncio.get_running_loop()
            owner.link.send({"still": "there"})
            assert await owner.messages.get() == {"still": "there"}
            await asyncio.sleep(2 * PEER_TIMEOUT)
            assert not owner.lost.done()
            if queue == "busy":
                for lane in Lane:
                    for i in range(16):
                        owner.link.write(lane, region, 0, [bytes(16 * MIB)], i)
                await asyncio.sleep(0.02)
                assert owner.link.state.pending_bytes
            cable.cut()
            cut = loop.time()
            error = await asyncio.wait_for(owner.lost, PEER_TIMEOUT + HEARTBEAT_PERIOD + SLACK)

            assert isinstance(error, PeerLostError)
            assert f"m1 (memory, tcp://{cable.far}:" in str(error)
            assert loop.time() - cut > PEER_TIMEOUT - 2 * HEARTBEAT_PERIOD
            assert owner.link.state.error is error
            assert owner.link.state.pending_bytes == 0

    run(main())
