"""Two nodes find each other, and whoever is no node of this release is turned away without harm to others."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, ExitStack

import pytest

from lamina.errors import ConfigError, ConnectError, HandshakeError, PeerLostError, TransportError
from lamina.transport import PROTOCOL_VERSION, Address, Hello, Lane, Listener, Options, Region, connect
from lamina.transport.endpoints import MAX_HANDSHAKES
from lamina.transport.frames import FrameReceiver, write_header
from lamina.transport.handshake import MAX_HELLO
from tests.transport import wire
from tests.transport.nodes import COMPUTE, LOCAL, MEMORY, TCP, LinkKeeper, listening, round_trip, still_welcomes

OTHER_VERSION = wire.header(wire.MESSAGE, 1000, version=PROTOCOL_VERSION + 1) + bytes(1000)
SECRET = b"sixteen bytes or more"


# -- finding each other


def test_both_ends_know_each_other(run, options):
    """Each end has the hello of the other, an address for messages, and how the bytes travel, and why."""

    async def main():
        async with (
            listening(options) as (listener, keeper),
            await connect(listener.address, COMPUTE, options, deadline_s=10) as link,
        ):
            other = await keeper.first()

            assert link.info[:2] == (COMPUTE, MEMORY) == (other.info.peer, other.info.local)
            assert link.info.address == str(listener.address)
            assert str(other).startswith("c0 (compute, tcp://127.0.0.1:")
            assert link.info.transport == other.info.transport == options.kind
            assert link.info.choice == other.info.choice
            assert link.info.choice == f"asked: {options.kind} (c0), {options.kind} (m0); took {options.kind}"
            assert await round_trip(link, other)

    run(main())


def test_a_name_that_means_this_machine_alone_is_warned_of(run, caplog):
    """Debian gives a machine's own name 127.0.1.1: a node that listens there is reached by no other machine."""

    async def main():
        for host in ("127.1", "127.0.0.1"):  # the first is a name, which the system's resolver knows everywhere
            await (await Listener.open(Address("tcp", host, 0), MEMORY, LinkKeeper(), Options(secret=SECRET))).close()

    run(main())
    (warning,) = (record.getMessage() for record in caplog.records if "event=loopback_name" in record.getMessage())
    assert "127.1 is 127.0.0.1 on this machine, where no other machine reaches it" in warning
    assert "/etc/hosts" in warning


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_ways_to_name_this_machine(run, host):
    """IPv6 and names work as well."""

    async def main():
        keeper = LinkKeeper()
        try:
            listener = await Listener.open(Address("tcp", host, 0), MEMORY, keeper, TCP)
        except ConnectError as error:
            pytest.skip(str(error))
        async with listener:
            assert await still_welcomes(listener, keeper)
        keeper.links[0].abort("the test is over")

    run(main())


def test_start_order_does_not_matter(run):
    """``connect`` waits for a node that starts later."""

    async def main():
        async with listening() as (listener, _):
            address = listener.address
        connecting = asyncio.create_task(connect(address, COMPUTE, deadline_s=20))
        await asyncio.sleep(0.1)
        keeper = LinkKeeper()
        async with await Listener.open(address, MEMORY, keeper), await connecting as link:
            assert link.info.peer == MEMORY
            await keeper.until(1)
        keeper.links[0].abort("the test is over")

    run(main())


def test_nobody_listens(run):
    """The error names the address, the time and what the last attempt met."""

    async def main():
        async with listening() as (listener, _):
            address = listener.address
        with pytest.raises(ConnectError, match=rf"{address}: no link within 0.2 s, last attempt: Connection refused"):
            await connect(address, COMPUTE, deadline_s=0.2)

    run(main())


def test_port_in_use(run):
    """Two listeners cannot share an address."""

    async def main():
        async with listening() as (listener, _):
            with pytest.raises(
                ConnectError, match=f"cannot listen at {listener.address}: another process uses the port"
            ):
                await Listener.open(listener.address, MEMORY, lambda link: None)

    run(main())


def test_only_loopback_without_a_secret(run):
    """Neither end leaves this machine where nodes do not prove who they are; with a secret both do."""

    async def main():
        anywhere = Address.parse("0.0.0.0:0")
        with pytest.raises(ConfigError, match="cluster secret"):
            await connect(Address.parse("10.0.0.1:7101"), COMPUTE, deadline_s=1)
        with pytest.raises(ConfigError, match="cluster secret"):
            await Listener.open(anywhere, MEMORY, lambda link: None)

        options = Options("tcp", secret=SECRET)
        keeper = LinkKeeper()
        async with await Listener.open(anywhere, MEMORY, keeper, options) as listener:
            here = Address("tcp", "127.0.0.1", listener.address.port)
            async with await connect(here, COMPUTE, options, deadline_s=10):
                await keeper.until(1)
        keeper.links[0].abort("the test is over")

    run(main())


@pytest.mark.parametrize(
    ("details", "reason"),
    [({"x": bytes(MAX_HELLO)}, "bytes, 8192 are allowed"), ({"x": object()}, "cannot be encoded")],
)
def test_own_mistakes(details, reason):
    """What the other end would refuse is refused before anything is opened."""

    async def main():
        hello = Hello("compute", "c0", details)
        with pytest.raises(ConfigError, match=reason):
            await connect(Address.parse("127.0.0.1:7101"), hello, deadline_s=1)
        with pytest.raises(ConfigError, match=reason):
            await Listener.open(LOCAL, hello, lambda link: None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "verbs"}, "one of auto, rdma, shm, tcp, control, got 'verbs'"),
        ({"peer_timeout": 0.0}, "peer_timeout must be 0.05 to 3600 s, got 0"),
        ({"peer_timeout": float("nan")}, "peer_timeout must be"),
        ({"secret": b"short"}, "16 to 4096 bytes, got 5"),
        ({"secret": bytes(5000)}, "16 to 4096 bytes, got 5000"),
    ],
)
def test_impossible_options(options, reason):
    """Options say at once what is wrong with them."""
    with pytest.raises(ConfigError, match=reason):
        Options(**options)


def test_secret_is_not_shown():
    """Options may end up in a log."""
    assert "sixteen" not in repr(Options(secret=SECRET))


@pytest.mark.parametrize(("role", "name"), [("", "c0"), ("compute", ""), ("compute", "a\nb"), ("compute", "x" * 129)])
def test_names_are_fit_for_a_log(role, name):
    """No line breaks and no novels."""
    with pytest.raises(ConfigError, match="printable characters"):
        Hello(role, name)


def test_cancelled_connect_leaves_nothing_open(run, options):
    """Giving up, at any point, closes the sockets: a leak would be a warning, and warnings are errors here."""

    async def main():
        before = len(os.listdir("/proc/self/fd"))
        async with listening(options) as (listener, keeper):
            for pause in range(20):
                connecting = asyncio.create_task(connect(listener.address, COMPUTE, options, deadline_s=20))
                for _ in range(pause):
                    await asyncio.sleep(0)
                connecting.cancel()
                await asyncio.wait([connecting])
                if not connecting.cancelled():
                    connecting.result().abort("too late to be cancelled")
            assert await still_welcomes(listener, keeper, options)
        assert len(os.listdir("/proc/self/fd")) == before

    run(main())


def test_nothing_is_lost_before_the_callbacks_are_set(run, options):
    """What the listening end sends at once waits until the other end's owner is ready."""

    async def main():
        def greet(link):
            accepted.append(link)
            link.send({"first": 1})

        accepted = []
        async with await Listener.open(LOCAL, MEMORY, greet, options) as listener:
            link = await connect(listener.address, COMPUTE, options, deadline_s=10)
            await asyncio.sleep(0.05)
            got = asyncio.get_running_loop().create_future()
            link.deliver(on_message=got.set_result)

            assert await asyncio.wait_for(got, 10) == {"first": 1}
            link.abort("the test is over")
            accepted[0].abort("the test is over")

    run(main())


def test_links_outlive_their_listener(run):
    """Closing the listener twice stops new links only."""

    async def main():
        async with listening() as (listener, keeper):
            link = await connect(listener.address, COMPUTE, TCP, deadline_s=10)
            other = await keeper.first()
            await listener.close()
            await listener.close()

            assert await round_trip(link, other)
            with pytest.raises(ConnectError):
                await connect(listener.address, COMPUTE, TCP, deadline_s=0.1)
            link.abort("the test is over")

    run(main())


def test_closing_a_listener_drops_who_is_not_in(run):
    """Strangers, and links that are being set up, end with the listener."""

    async def main():
        async with (
            listening() as (listener, keeper),
            wire.stranger(listener.address, b"L") as stranger,
            wire.stranger(listener.address) as guest,
        ):
            await wire.introduce(guest)
            await listener.close()

            assert await stranger.rest() == b""
            await guest.rest()
            assert not keeper.links

    run(main())


def test_failing_on_link(run):
    """An ``on_link`` that raises costs its link, not the listener."""

    async def main():
        calls = []

        def fail_once(link):
            calls.append(link)
            if len(calls) == 1:
                raise RuntimeError("a bug in the owner")

        async with asyncio.timeout(20), await Listener.open(LOCAL, MEMORY, fail_once) as listener:
            link = await connect(listener.address, COMPUTE, deadline_s=10)
            lost = asyncio.get_running_loop().create_future()
            link.deliver(on_lost=lost.set_result)
            assert isinstance(await lost, PeerLostError)
            assert calls[0].state.closed

            link = await connect(listener.address, COMPUTE, deadline_s=10)
            link.abort("the test is over")
            calls[1].abort("the test is over")

    run(main())


def test_different_patience():
    """Heartbeats follow the less patient end, so that it does not lose a patient one."""

    async def main():
        async with (
            listening(Options("tcp", peer_timeout=60.0)) as (listener, keeper),
            await connect(listener.address, COMPUTE, Options("tcp", peer_timeout=0.4), deadline_s=10) as link,
        ):
            other = await keeper.first()
            link.deliver()
            await asyncio.sleep(1.0)

            assert link.state.error is None
            assert other.state.error is None

    asyncio.run(main())


# -- strangers


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n",
    "zeros": bytes(1000),
    "no hello": wire.message({"role": 1}),
    "no map": wire.header(wire.MESSAGE, 1) + b"\x01",
    "a note": wire.note(wire.hello()),
    "a write": wire.write(1, 0, b"data", 1),
    "a heartbeat": wire.header(wire.HEARTBEAT),
    "too long": wire.message(wire.hello(details={"x": bytes(MAX_HELLO)})),
    "claims to be long": wire.header(wire.MESSAGE, 2**63),
    "no nonce": wire.message(wire.hello(nonce=None)),
    "short nonce": wire.message(wire.hello(nonce=b"1")),
    "name": wire.message(wire.hello(name="a\nb")),
    "role": wire.message(wire.hello(role="x" * 100)),
    "details": wire.message(wire.hello(details=[1])),
    "kind": wire.message(wire.hello(kind="pigeon")),
    "offers": wire.message(wire.hello(offers={"tcp": 1})),
    "huge timeout": wire.message(wire.hello(peer_timeout=1e300)),
    "no timeout": wire.message(wire.hello(peer_timeout=0)),
    "NaN": wire.message(wire.hello(peer_timeout=float("nan"))),
    "join nothing": wire.message({"join": 1}),
    "deep": wire.header(wire.MESSAGE, 1003) + b"\x81\xa1x" + b"\x91" * 999 + b"\xc0",
    "bomb": wire.header(wire.MESSAGE, 8) + b"\x81\xa1x\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_instead_of_a_hello(data):
    """Whoever does not speak properly is disconnected, and others are not disturbed."""

    async def main():
        async with listening() as (listener, keeper), wire.stranger(listener.address, data) as stranger:
            stranger.sock.shutdown(socket.SHUT_WR)
            await stranger.rest()

            assert not keeper.links
            assert await still_welcomes(listener, keeper)

    asyncio.run(main())


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_instead_of_a_proof(data):
    """So is whoever stops to do so after the hello."""

    async def main():
        async with listening() as (listener, keeper), wire.stranger(listener.address) as stranger:
            await stranger.send(wire.message(wire.hello()))
            await stranger.frame()
            await stranger.send(data)
            stranger.sock.shutdown(socket.SHUT_WR)
            await stranger.rest()

            assert not keeper.links
            assert await still_welcomes(listener, keeper)

    asyncio.run(main())


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_instead_of_a_set_up(data):
    """Or after the proof. Shared memory is asked for here, which says the most while it is set up."""

    async def main():
        options = Options("auto", peer_timeout=10.0)
        async with listening(options) as (listener, keeper):
            offers = await wire.offers_of(listener.address)
            async with wire.stranger(listener.address) as stranger:
                await wire.introduce(stranger, kind="shm", offers=offers)
                await stranger.send(data)
                stranger.sock.shutdown(socket.SHUT_WR)
                await stranger.rest()

            assert not keeper.links
            assert await still_welcomes(listener, keeper, options)

    asyncio.run(main())


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_from_who_listens(data):
    """The connecting end says what is wrong, and does not try again."""

    async def main():
        async def serve(peer):
            await peer.frame()
            await peer.send(data)

        async with wire.server(serve) as (port, accepted):
            with pytest.raises(HandshakeError, match=f"tcp://127.0.0.1:{port}: "):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, deadline_s=20)
            assert len(accepted) == 1

    asyncio.run(main())


def test_slow_stranger(run):
    """A byte now and then does not keep a connection open."""

    async def main():
        async with (
            listening(handshake_timeout=0.3) as (listener, keeper),
            wire.stranger(listener.address) as stranger,
        ):
            trickling = asyncio.create_task(stranger.trickle(wire.message(wire.hello()), pause=0.05))
            assert await still_welcomes(listener, keeper)
            assert await stranger.rest() == b""
            await trickling

    run(main())


def test_slow_listener():
    """Nor does a listener that says a byte now and then keep a node waiting for longer than it wants to."""

    async def main():
        async def serve(peer):
            await peer.frame()
            await peer.trickle(wire.message(wire.hello()), pause=0.1)

        async with asyncio.timeout(10), wire.server(serve) as (port, _):
            with pytest.raises(ConnectError, match=r"no link within 0\.5 s"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, deadline_s=0.5)

    asyncio.run(main())


def test_flood(run):
    """Many silent connections take a bounded number of sockets, and a node gets through when they time out.

    A link that exists is not disturbed.
    """

    async def main():
        async with (
            listening(handshake_timeout=0.5) as (listener, keeper),
            await connect(listener.address, COMPUTE, TCP, deadline_s=10) as link,
        ):
            other = await keeper.first()
            before = len(os.listdir("/proc/self/fd"))
            with ExitStack() as stack:
                count = MAX_HANDSHAKES + 40
                for _ in range(count):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(sock, (listener.address.host, listener.address.port))
                welcoming = asyncio.create_task(still_welcomes(listener, keeper))
                most = 0
                while not welcoming.done():
                    assert await round_trip(link, other)
                    await asyncio.sleep(0.01)
                    most = max(most, len(os.listdir("/proc/self/fd")) - before - count)

                assert await welcoming
                # Besides the strangers, that node has up to three connections, of two ends each.
                assert MAX_HANDSHAKES - 6 <= most <= MAX_HANDSHAKES + 6

    run(main())


@pytest.mark.slow
def test_flood_of_half_links():
    """Whoever proves itself and then does nothing takes a bounded number of places, for a bounded time."""

    async def main():
        async with listening(deadline_s=90) as (listener, keeper), AsyncExitStack() as stack:
            guests = [await stack.enter_async_context(wire.stranger(listener.address)) for _ in range(MAX_HANDSHAKES)]
            for guest in guests:
                await wire.introduce(guest)
            with pytest.raises(ConnectError, match="the peer closed the connection during the handshake"):
                await connect(listener.address, COMPUTE, TCP, deadline_s=1)
            async with await connect(listener.address, COMPUTE, TCP, deadline_s=60):
                await keeper.until(1)

    asyncio.run(main())


def test_many_nodes_at_once():
    """Nodes that all come at the same moment, more than there may be in their handshake, all get their link."""

    async def main():
        async with listening() as (listener, keeper):
            links = await asyncio.gather(
                *(connect(listener.address, COMPUTE, TCP, deadline_s=25) for _ in range(MAX_HANDSHAKES + 20))
            )
            await keeper.until(len(links))
            for link in links:
                link.abort("the test is over")

    asyncio.run(main())


# -- other releases


def test_newer_node_connects(run):
    """The listening end answers with both versions, in a frame of its own release."""

    async def main():
        async with listening() as (listener, keeper), wire.stranger(listener.address, OTHER_VERSION) as stranger:
            answer = await stranger.frame()

            assert answer[:6] == b"LMNA" + PROTOCOL_VERSION.to_bytes(2, "little")
            assert (
                b"speaks protocol version %d, this end speaks version %d" % (PROTOCOL_VERSION + 1, PROTOCOL_VERSION)
                in answer
            )
            assert not keeper.links

    run(main())


def test_newer_node_listens(run):
    """The connecting end names both versions and does not try again."""

    async def main():
        async with wire.server(lambda peer: peer.send(OTHER_VERSION)) as (port, accepted):
            with pytest.raises(
                HandshakeError,
                match=f"127.0.0.1:{port}: .*version {PROTOCOL_VERSION + 1}, this end speaks version {PROTOCOL_VERSION}",
            ):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, deadline_s=20)

            assert len(accepted) == 1

    run(main())


def test_no_node_listens(run):
    """A server of another kind is recognised at once."""

    async def main():
        answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
        async with wire.server(lambda peer: peer.send(answer)) as (port, _):
            with pytest.raises(HandshakeError, match=r"not a Lamina node"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, deadline_s=20)

    run(main())


def test_peer_that_hangs_up_is_tried_again(run):
    """A node that is just stopping, or full, closes without a word: that may be over at the next attempt."""

    async def main():
        async with wire.server(lambda peer: asyncio.sleep(0)) as (port, accepted):
            with pytest.raises(ConnectError, match="the peer closed the connection during the handshake"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, deadline_s=0.4)

            assert len(accepted) > 1

    run(main())


# -- after the handshake


@pytest.mark.parametrize("lane", [None, *Lane], ids=["control", "decode", "bulk"])
@pytest.mark.parametrize(
    "data",
    [
        bytes(64),
        OTHER_VERSION,
        wire.message({"x": 1})[:-1] + b"\xc1",
        wire.note({"x": 1}),
        wire.note({"region": [2, 100, {}]}),
        wire.note({"region": [1, 0, {}]}),
        wire.note({"region": [1, "100", {}]}),
        wire.note({"region": [1, 100, []]}),
        wire.note({"region": [1.0, 100, {}]}),
        wire.note({"bye": [1]}),
        wire.note({"bye": [-1, 0]}),
        wire.note({"bye": ["0", "0"]}),
        wire.note({"gone": True}),
        wire.note({"lanes": 1}),
        wire.header(wire.NOTE, 5000),
        wire.header(wire.HEARTBEAT, 1),
        wire.header(wire.MESSAGE, 2**40),
        wire.write(1, 0, b"data", 1),
        wire.header(wire.WRITE, 2**64 - 1, key=1),
    ],
    ids=lambda data: repr(data[6:60]),
)
def test_bytes_that_make_no_sense_end_the_link(lane, data):
    """A link whose peer breaks the protocol ends with a reason; the other link of the same listener does not."""

    async def main():
        async with (
            listening() as (listener, keeper),
            await connect(listener.address, COMPUTE, TCP, deadline_s=10) as good,
            wire.hand_made_link(listener.address) as bad,
        ):
            await keeper.until(2)
            lost = asyncio.get_running_loop().create_future()
            keeper.links[1].deliver(on_lost=lost.set_result)
            await (bad.control if lane is None else bad.lanes[lane]).send(data)
            error = await lost

            assert isinstance(error, TransportError)
            assert "stranger (compute" in str(error)
            for one in bad.wires:
                await one.rest()
            assert await round_trip(good, keeper.links[0])

    asyncio.run(main())


@pytest.mark.parametrize("cut", ["control", "decode", "bulk", "all"])
def test_death_at_every_byte(cut):
    """Wherever a connection ends, the link ends with it: what was complete was delivered, and nothing else."""
    write = wire.write(1, 4, b"data", 7)
    note = wire.note({"region": [1, 100, {}]})
    parts = {"control": (note,), "decode": (b"", write), "bulk": (b"", b"", write), "all": (note, write, write)}[cut]

    async def main():
        async with listening() as (listener, keeper):
            for nbytes in range(max(map(len, parts)) + 1):
                async with wire.hand_made_link(listener.address) as dying:
                    await keeper.until(nbytes + 1)
                    link = keeper.links[nbytes]
                    region = Region("inbox", 8)
                    link.expose(region)
                    assert await dying.control.hear() == {"region": [1, 8, {}]}
                    tags = []
                    lost = asyncio.get_running_loop().create_future()
                    link.deliver(on_tag=lambda lane, tag, tags=tags: tags.append((lane, tag)), on_lost=lost.set_result)
                    for one, part in zip(dying.wires, parts, strict=False):
                        await one.send(part[:nbytes])
                    for one, name in zip(dying.wires, ("control", "decode", "bulk"), strict=True):
                        if cut in ("all", name):
                            one.sock.close()
                    error = await lost

                    assert isinstance(error, PeerLostError)
                    complete = [
                        (lane, 7) for lane in Lane if cut in ("all", lane.name.lower()) and nbytes >= len(write)
                    ]
                    assert sorted(tags) == complete
                    arrived = max(0, nbytes - wire.HEADER_BYTES) if cut != "control" else 0
                    assert bytes(region.buffer) == bytes(4) + b"data"[:arrived].ljust(4, b"\0")

    asyncio.run(main())


def test_receiver_takes_no_more_than_its_frame():
    """What follows a hello belongs to the link: the handshake leaves it in the socket."""
    frame = wire.message(wire.hello())
    receiver = FrameReceiver({}, MAX_HELLO)

    taken = 0
    event = None
    while event is None:
        buffer = receiver.next_buffer()
        buffer[:] = frame[taken : taken + len(buffer)]
        taken += len(buffer)
        event = receiver.received(len(buffer))
    assert taken == len(frame)


FLOOD = """if True:
    import socket, sys
    frames = bytes.fromhex(sys.argv[2]) * 4096
    with socket.socket(fileno=int(sys.argv[1])) as lane:
        lane.setblocking(True)
        while True:
            lane.sendall(frames)
"""


def test_peer_that_never_stops_sending(run):
    """It has left by its control connection, and floods a lane as fast as it can: nobody else has to wait for that."""

    async def main():
        async with listening() as (listener, keeper), wire.hand_made_link(listener.address) as made:
            link = await keeper.first()
            lost = asyncio.get_running_loop().create_future()
            heard = asyncio.Event()
            link.deliver(on_lost=lost.set_result, on_tag=lambda lane, tag: heard.set())
            link.expose(Region("target", 64))
            lane = made.lanes[0].sock.fileno()
            given = [str(lane), write_header(1, 0, 0, 0).hex()]
            flood = await asyncio.create_subprocess_exec(
                sys.executable, "-c", FLOOD, *given, pass_fds=[lane], stderr=subprocess.DEVNULL
            )
            try:
                await heard.wait()
                made.control.sock.shutdown(socket.SHUT_WR)
                assert isinstance(await asyncio.wait_for(lost, 20), PeerLostError)
                assert await flood.wait() == 1  # nobody listens to it any more
            finally:
                if flood.returncode is None:
                    flood.kill()
                    await flood.wait()

    run(main())
