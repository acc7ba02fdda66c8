"""Shared memory: what the promises of ``Link`` do not say about it."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import random
import signal
import socket
import sys
from collections import deque
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

import lamina
from lamina.errors import PeerLostError, ProtocolError, TransportError
from lamina.transport import Address, Hello, Lane, Listener, Options, Region, RemoteRegion, connect, shm
from lamina.transport.lanes import UpgradeError
from lamina.transport.shm import ring
from lamina.transport.testing import CHECKS, noise, two_ends, until_sent

LOCAL = Address.parse("127.0.0.1:0")
SHM = Options(kind="shm", peer_timeout=10.0)

ECHO = """
import asyncio, sys
from lamina.transport import Address, Hello, Listener, Options, Region, RemoteRegion, connect

options = Options(kind="shm", peer_timeout=3600.0)

def leave(error):
    sys.exit(0)

def answer(link, port=0):
    inbox = Region("inbox", 1 << 20)
    def on_message(message):
        remote = RemoteRegion.from_wire(message["region"])
        link.deliver(on_tag=lambda lane, tag: link.write(lane, remote, 0, [inbox.buffer[:tag]], tag), on_lost=leave)
        if not port:
            link.send({"region": link.expose(inbox)})
        print("linked", flush=True)
    link.deliver(on_message=on_message, on_lost=leave)
    if port:
        link.send({"region": link.expose(inbox)})

async def main(port):
    if port:
        answer(await connect(Address("tcp", "127.0.0.1", port), Hello("memory", "m0"), options, deadline_s=30), port)
        await asyncio.Event().wait()
    async with await Listener.open(Address.parse("127.0.0.1:0"), Hello("memory", "m1"), answer, options) as listener:
        print(listener.address.port, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(int(sys.argv[1])))
"""


@asynccontextmanager
async def echo(port=0):
    """A process that sends every write back, as many bytes as its tag says; and the first line that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ECHO, str(port)),
        env={**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def make_pair(options=SHM):
    accepted = asyncio.get_running_loop().create_future()
    async with await Listener.open(LOCAL, Hello("memory", "m0"), accepted.set_result, options) as listener:
        link = await connect(listener.address, Hello("compute", "c0"), options, deadline_s=10.0)
        return link, await accepted


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance_of_busy_polling(check):
    """Looking all the time instead of sleeping breaks no promise."""
    asyncio.run(check(lambda: make_pair(Options(kind="shm", peer_timeout=10.0, busy_poll=True))))


# -- what is copied, and what is not


def test_window_is_not_copied(run):
    """What was computed into the window is there already: a write of it touches none of its pages."""

    async def main():
        async with two_ends(make_pair, nbytes=8 << 20) as (left, right):
            window = left.link.window(left.remote)
            window[: 1 << 20] = noise(1 << 20)
            used = os.fstat(right.region.fd).st_blocks
            left.link.write(Lane.DECODE, left.remote, 0, [window[: 64 << 10], window[64 << 10 : 128 << 10]], 1)
            left.link.write(Lane.BULK, left.remote, 0, [window], 2)
            await right.until_arrived(2)

            assert bytes(right.memory[: 1 << 20]) == noise(1 << 20)
            assert os.fstat(right.region.fd).st_blocks == used < 4096

    run(main())


def test_part_of_the_window_may_be_written_elsewhere(run):
    """A slice of the window that is meant for another place is copied there, overlapping or not."""

    async def main():
        async with two_ends(make_pair) as (left, right):
            data = noise(3000)
            left.write(0, data, 1)
            window = left.link.window(left.remote)
            left.write(1000, window[:3000], 2)
            await right.until_arrived(2)

            assert bytes(right.memory[:4000]) == data[:1000] + data

    run(main())


# -- the rings


def test_full_ring(run):
    """A peer that does not read makes the link queue, not lose, what comes; nothing is pending when it has read."""

    async def main():
        async with two_ends(make_pair) as (left, right):
            for lane in Lane:
                for tag in range(ring.SLOTS + 100):
                    left.write(8 * tag, tag.to_bytes(8, "little"), tag, lane)
            # Bulk takes turns with the loop, and has not had any.
            assert left.link.state.pending_bytes == 8 * 100 + 8 * (ring.SLOTS + 100)
            assert not right.arrived
            await until_sent(left.link)
            await right.until_arrived(2 * ring.SLOTS + 200)

            for lane in Lane:
                tags = [entry[1] for entry in right.arrived if entry[0] is lane]
                assert tags == list(range(ring.SLOTS + 100))

    run(main())


def test_no_wake_up_is_lost(run):
    """However sleeping and ringing meet, every answer comes. Heartbeats, which also look, are 15 minutes apart."""

    async def main():
        async with asyncio.timeout(100), echo() as (_, port):
            address = Address("tcp", "127.0.0.1", int(port))
            options = Options(kind="shm", peer_timeout=3600.0)
            link = await connect(address, Hello("compute", "c0"), options, deadline_s=30)
            region, remotes, answers = Region("answers", 1 << 20), asyncio.Queue(), deque()
            changed = asyncio.Event()
            link.deliver(
                on_message=remotes.put_nowait, on_tag=lambda lane, tag: (answers.append((lane, tag)), changed.set())
            )
            link.send({"region": link.expose(region)})
            remote = RemoteRegion.from_wire((await remotes.get())["region"])
            rng = random.Random(1)
            for _ in range(2000):
                lane = rng.choice(list(Lane))
                tags = [rng.randrange(2000) for _ in range(rng.choice([1, 1, 1, 2, 5, 20]))]
                for tag in tags:
                    link.write(lane, remote, 0, [bytes(tag)], tag)
                    for _ in range(rng.randrange(300)):
                        pass  # a few microseconds, so that the peer is met at any point
                while len(answers) < len(tags):
                    changed.clear()
                    await changed.wait()
                assert list(answers) == [(lane, tag) for tag in tags]
                answers.clear()
            link.abort("the test is over")

    run(main())


def shared_rings():
    """Every file of rings that this process has open, mapped as anybody of the same user may do."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if "lamina-rings" in os.readlink(entry):
                fd = os.open(entry, os.O_RDWR)
                found[os.fstat(fd).st_ino] = ring.Rings(fd)
                os.close(fd)
    return list(found.values())


@pytest.mark.parametrize("head", [ring.SLOTS + 4, 2, 2**63, 2**64 - 1])
@pytest.mark.parametrize("lane", list(Lane))
def test_impossible_head(run, lane, head):
    """A peer whose counter cannot be loses the link, with both numbers as the reason."""

    async def main():
        async with two_ends(make_pair) as (left, right):
            for tag in range(3):
                left.write(0, b"x", tag, lane)
            await right.until_arrived(3)
            for rings in shared_rings():
                if rings.words[lane][ring.HEAD] == 3:
                    rings.words[lane][ring.HEAD] = head
            assert isinstance(await right.until_lost(), ProtocolError)

            assert f"says that it wrote {head} tags, where 3 to {ring.SLOTS + 3} are possible" in str(right.lost[0])
            assert len(right.arrived) == 3
            await left.until_lost()

    run(main())


@pytest.mark.parametrize("tail", [ring.SLOTS + 1, 2**64 - 1])
def test_impossible_tail(run, tail):
    """So does one that claims to have read what was never written."""

    async def main():
        async with two_ends(make_pair) as (left, right):
            for rings in shared_rings():
                rings.words[Lane.DECODE][ring.TAIL] = tail
            for tag in range(ring.SLOTS + 1):
                left.write(0, b"x", tag)
            assert isinstance(await left.until_lost(), ProtocolError)

            assert f"says that it read {tail} tags of a ring" in str(left.lost[0])
            await right.until_lost()

    run(main())


def test_garbage_in_the_rings(run):
    """Whatever anybody writes there, nothing hangs or crashes; a link that ends, ends with a reason."""

    async def main():
        rng = random.Random(2)
        for _ in range(40):
            async with two_ends(make_pair) as (left, right):
                for _ in range(5):
                    for rings in shared_rings():
                        for words in (rings.asleep, *rings.words):
                            for i in range(len(words)):
                                if rng.random() < 0.3:
                                    words[i] = rng.choice([0, 1, 5, ring.SLOTS, 2**32, rng.getrandbits(64)])
                    for end in (left, right):
                        if not end.lost:
                            for tag in range(rng.choice([1, ring.SLOTS])):
                                end.write(0, b"data", tag, Lane(tag % 2))
                    await asyncio.sleep(0.001)
                for end in (left, right):
                    assert all(isinstance(error, ProtocolError | PeerLostError) for error in end.lost)

    run(main())


# -- memory of the peer


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda region: setattr(region, "fd", os.memfd_create("open", os.MFD_ALLOW_SEALING)), "can be shortened"),
        (lambda region: setattr(region, "nbytes", 1 << 30), "should have 1073741824 bytes"),
        (lambda region: setattr(region, "fd", os.open("/dev/null", os.O_RDWR)), "does not lie in a memfd"),
    ],
    ids=["not sealed", "too small", "no memory"],
)
def test_memory_that_could_kill_is_refused(run, break_it, reason):
    """Memory that is shorter than announced, or could become so, would kill whoever writes it: the link ends."""

    async def main():
        async with two_ends(make_pair) as (left, right):
            region = Region("bad", 4096)
            own_fd = region.fd
            break_it(region)
            left.link.expose(region)
            error = await right.until_lost()
            if region.fd != own_fd:
                os.close(region.fd)

            assert isinstance(error, ProtocolError)
            assert reason in str(error)

    run(main())


# -- set-up


class Side:
    """As much of a session as ``upgrade`` sees: what one side sends, the other receives."""

    options = SHM
    link_id = bytes(16)
    key = bytes(32)

    def __init__(self, connecting):
        self.connecting = connecting
        self.inbox = asyncio.Queue()

    async def send(self, setup):
        self.peer.inbox.put_nowait(setup)

    async def receive(self):
        return await self.inbox.get()


def both_sides():
    sides = [Side(connecting) for connecting in (True, False)]
    sides[0].peer, sides[1].peer = sides[1], sides[0]
    return sides


def open_files():
    gc.collect()  # of tests before
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("what", [{"key": bytes(31) + b"!"}, {"link_id": bytes(15) + b"!"}], ids=["key", "link"])
def test_wrong_proof(run, what):
    """Who does not know the link's key, or means another link, is refused and gets no memory."""

    async def main():
        before = open_files()
        sides = both_sides()
        vars(sides[0]).update(what)
        results = await asyncio.gather(*map(shm.upgrade, sides), return_exceptions=True)

        assert [type(result) for result in results] == [ProtocolError] * 2
        assert "sent an unexpected message" in str(results[1])
        assert open_files() == before

    run(main())


def test_strangers_at_the_socket(run):
    """Any process of the host may connect; only the peer is listened to."""

    async def main():
        before = open_files()
        connecting, listening = both_sides()
        tasks = [asyncio.create_task(shm.upgrade(listening))]
        name = (told := await connecting.receive())["socket"]
        connecting.inbox.put_nowait(told)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.connect(name)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as loud:
                loud.connect(name)
                loud.send(bytes(32))
            tasks.append(asyncio.create_task(shm.upgrade(connecting)))
            lanes = await asyncio.gather(*tasks)
        for one in lanes:
            one.close(TransportError("the test is over"))

        assert open_files() == before

    run(main())


def test_cancelled_set_up(run):
    """Nothing is left of a set-up whose peer never came."""

    async def main():
        before = open_files()
        for side, answered in ((0, False), (1, False), (1, True)):
            sides = both_sides()
            task = asyncio.create_task(shm.upgrade(sides[side]))
            if answered:
                sides[side].inbox.put_nowait({"socket": b"\0lamina-" + b"0" * 32})
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

        assert open_files() == before

    run(main())


@pytest.mark.parametrize("message", [{}, {"socket": b"/tmp/name" * 5}, {"socket": 1}])
def test_nonsense_instead_of_a_name(run, message):
    """A peer that names a file, or nothing, is refused."""

    async def main():
        side = both_sides()[0]
        side.inbox.put_nowait(message)
        with pytest.raises(UpgradeError, match="did not send the name of its socket"):
            await shm.upgrade(side)

    run(main())


def test_offer(monkeypatch):
    """Both ends on one host offer the same; a processor that may reorder stores says so."""
    assert shm.offer(SHM) == shm.offer(SHM)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UpgradeError, match="only implemented for x86-64, this is aarch64"):
        shm.offer(SHM)


# -- what is left behind


def mappings():
    return Path("/proc/self/maps").read_text().count("memfd:lamina")


def test_links_leave_nothing(run, caplog):
    """Neither descriptors nor memory stay behind, whoever ends the link; but views of a window stay valid."""

    async def main():
        window = None
        caplog.set_level("CRITICAL", "lamina.transport")  # records would keep the links
        before = open_files(), mappings()
        for i in range(200):
            async with two_ends(make_pair, nbytes=8192) as (left, right):
                left.write(0, b"kept", i)
                await right.until_arrived(1)
                if i == 7:
                    window = left.link.window(left.remote)[:4]
                if i % 2:
                    await left.link.close()
            del left, right
        assert bytes(window) == b"kept"
        del window

        assert (open_files(), mappings()) == before

    run(main())


def test_killed_processes_leave_nothing(run):
    """After kill -9 of both ends there is no file, no socket and no memory."""

    async def main():
        async with asyncio.timeout(60), echo() as (listening, port), echo(int(port)) as (connecting, line):
            assert line == "linked"
            assert (await listening.stdout.readline()).decode().strip() == "linked"
            pids = [listening.pid, connecting.pid]
            sockets = {inode for pid in pids for inode in inodes_of_sockets(pid)}
            names = {name for inode, name in names_of_sockets() if inode in sockets}
            assert names
            assert not any("/dev/shm" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)  # noqa: ASYNC240, S108
            for process in (listening, connecting):
                process.send_signal(signal.SIGKILL)
            for process in (listening, connecting):
                await process.wait()
            assert not names & {name for _, name in names_of_sockets()}

    run(main())


def inodes_of_sockets(pid):
    targets = (os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return {target.removeprefix("socket:[").rstrip("]") for target in targets if target.startswith("socket:")}


def names_of_sockets():
    """Inode and name of every Unix socket on this machine that is Lamina's."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        if "@lamina-" in line:
            yield line.split()[-2:]
