"""Two nodes find each other, and whoever is no node of this release is turned away without harm to others."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import pytest

from lamina.errors import ConfigError, ConnectError, HandshakeError, PeerLostError, TransportError
from lamina.transport import PROTOCOL_VERSION, Address, Hello, Lane, Listener, connect
from lamina.transport.endpoints import MAX_HANDSHAKES
from lamina.transport.frames import FrameReceiver, message_frame
from lamina.transport.handshake import MAX_HELLO, Introduction, receive_introduction

LOCAL = Address.parse("127.0.0.1:0")
COMPUTE = Hello("compute", "c0", {"layers": [0, 32]})
MEMORY = Hello("memory", "m0", {"heads": 8})
OTHER_VERSION = b"LMNA" + (9).to_bytes(2, "little")


class LinkKeeper:
    """An ``on_link`` that keeps the links, and listens to them only as far as to notice their end."""

    def __init__(self):
        self.links = []
        self._changed = asyncio.Event()

    def __call__(self, link):
        link.on_lost = lambda error: None
        self.links.append(link)
        self._changed.set()

    async def until(self, count):
        while len(self.links) < count:
            self._changed.clear()
            await self._changed.wait()

    async def first(self):
        await self.until(1)
        return self.links[0]


@asynccontextmanager
async def listening(**options):
    """A listener, and the links that came to it."""
    keeper = LinkKeeper()
    async with asyncio.timeout(30), await Listener.open(LOCAL, MEMORY, keeper, **options) as listener:
        try:
            yield listener, keeper
        finally:
            for link in keeper.links:
                link.abort("the test is over")


@asynccontextmanager
async def stranger(address, data=b""):
    """A bare connection that has sent ``data``."""
    with socket.socket() as sock:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (address.host, address.port))
        await loop.sock_sendall(sock, data)
        yield sock


async def read_to_end(sock) -> bytes:
    data = b""
    with suppress(ConnectionResetError):  # closing with unread bytes says so
        while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
            data += chunk
    return data


@contextmanager
def fake_listener(answer: bytes):
    """A server that answers every connection with the same bytes; gives its address and the connections so far."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        accepted = []

        def accept():
            sock = stack.enter_context(server.accept()[0])
            sock.sendall(answer)
            sock.shutdown(socket.SHUT_WR)
            accepted.append(sock)

        loop = asyncio.get_running_loop()
        loop.add_reader(server.fileno(), accept)
        stack.callback(loop.remove_reader, server.fileno())
        yield Address("tcp", "127.0.0.1", server.getsockname()[1]), accepted


async def still_welcomes(listener, keeper) -> bool:
    """Whether a real node can connect."""
    before = len(keeper.links)
    async with await connect(listener.address, COMPUTE, deadline_s=20):
        await keeper.until(before + 1)
    return True


def hello_frame(lane=Lane.DECODE, link_id=b"") -> bytes:
    return message_frame(Introduction(COMPUTE, lane, link_id, 2.0).to_map(), MAX_HELLO)


# -- finding each other


def test_both_ends_know_each_other(run):
    """Each end has the hello of the other and an address for messages."""

    async def main():
        async with listening() as (listener, keeper), await connect(listener.address, COMPUTE, deadline_s=10) as link:
            other = await keeper.first()

            assert (link.local, link.peer) == (COMPUTE, MEMORY) == (other.peer, other.local)
            assert link.peer_address == str(listener.address)
            assert str(other).startswith("c0 (compute, tcp://127.0.0.1:")
            assert link.transport == other.transport == "tcp"

    run(main())


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_ways_to_name_this_machine(run, host):
    """IPv6 and names work as well."""

    async def main():
        keeper = LinkKeeper()
        try:
            listener = await Listener.open(Address("tcp", host, 0), MEMORY, keeper)
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
            assert link.peer == MEMORY
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


def test_only_loopback(run):
    """Neither end leaves this machine until nodes can prove who they are."""

    async def main():
        with pytest.raises(ConfigError, match="cluster secret"):
            await connect(Address.parse("10.0.0.1:7101"), COMPUTE, deadline_s=1)
        with pytest.raises(ConfigError, match="cluster secret"):
            await Listener.open(Address.parse("0.0.0.0:0"), MEMORY, lambda link: None)

    run(main())


@pytest.mark.parametrize(
    ("hello", "timeout", "reason"),
    [
        (Hello("compute", "c0", {"x": bytes(MAX_HELLO)}), 2.0, "16384 are allowed"),
        (Hello("compute", "c0", {"x": object()}), 2.0, "cannot be encoded"),
        (COMPUTE, 0.0, "peer_timeout must be"),
    ],
)
def test_own_mistakes(run, hello, timeout, reason):
    """What the other end would refuse is refused before anything is opened."""

    async def main():
        with pytest.raises(ConfigError, match=reason):
            await connect(Address.parse("127.0.0.1:7101"), hello, deadline_s=1, peer_timeout=timeout)
        with pytest.raises(ConfigError, match=reason):
            await Listener.open(LOCAL, hello, lambda link: None, peer_timeout=timeout)

    run(main())


@pytest.mark.parametrize(("role", "name"), [("", "c0"), ("compute", ""), ("compute", "a\nb"), ("compute", "x" * 129)])
def test_names_are_fit_for_a_log(role, name):
    """No line breaks and no novels."""
    with pytest.raises(ConfigError, match="printable characters"):
        Hello(role, name)


def test_cancelled_connect_leaves_nothing_open(run):
    """Giving up closes the sockets: a leak would be a warning, and warnings are errors here."""

    async def main():
        with fake_listener(b"") as (address, _):
            connecting = asyncio.create_task(connect(address, COMPUTE, deadline_s=20))
            await asyncio.sleep(0.05)
            connecting.cancel()
            await asyncio.wait([connecting])

            assert connecting.cancelled()

    run(main())


def test_nothing_is_lost_before_the_callbacks_are_set(run):
    """What the listening end sends at once waits until the other end's owner is ready."""

    async def main():
        def greet(link):
            accepted.append(link)
            link.send({"first": 1})

        accepted = []
        async with await Listener.open(LOCAL, MEMORY, greet) as listener:
            link = await connect(listener.address, COMPUTE, deadline_s=10)
            await asyncio.sleep(0.05)
            got = asyncio.get_running_loop().create_future()
            link.on_message = got.set_result

            assert await asyncio.wait_for(got, 10) == {"first": 1}
            link.abort("the test is over")
            accepted[0].abort("the test is over")

    run(main())


def test_links_outlive_their_listener(run):
    """Closing the listener twice stops new links only."""

    async def main():
        async with listening() as (listener, keeper):
            link = await connect(listener.address, COMPUTE, deadline_s=10)
            other = await keeper.first()
            await listener.close()
            await listener.close()
            got = asyncio.get_running_loop().create_future()
            other.on_message = got.set_result
            link.send({"still": "here"})

            assert await asyncio.wait_for(got, 10) == {"still": "here"}
            with pytest.raises(ConnectError):
                await connect(listener.address, COMPUTE, deadline_s=0.1)
            link.abort("the test is over")

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
            link.on_lost = lost.set_result
            assert isinstance(await lost, PeerLostError)
            assert calls[0].closed

            link = await connect(listener.address, COMPUTE, deadline_s=10)
            link.abort("the test is over")
            calls[1].abort("the test is over")

    run(main())


def test_different_patience():
    """Heartbeats follow the less patient end, so that it does not lose a patient one."""

    async def main():
        async with (
            listening(peer_timeout=60.0) as (listener, keeper),
            await connect(listener.address, COMPUTE, deadline_s=10, peer_timeout=0.4) as link,
        ):
            other = await keeper.first()
            link.on_lost = other.on_lost = lambda error: None
            await asyncio.sleep(1.0)

            assert link.error is None
            assert other.error is None

    asyncio.run(main())


# -- strangers


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n",
        bytes(1000),
        message_frame({"role": 1}, MAX_HELLO),
        message_frame({**Introduction(COMPUTE, Lane.DECODE, b"", 2.0).to_map(), "lane": 7}, MAX_HELLO),
        message_frame({**Introduction(COMPUTE, Lane.DECODE, b"", 2.0).to_map(), "name": "a\nb"}, MAX_HELLO),
        message_frame({**Introduction(COMPUTE, Lane.DECODE, b"", 2.0).to_map(), "peer_timeout": 1e300}, MAX_HELLO),
        message_frame({"x": bytes(MAX_HELLO)}, 2 * MAX_HELLO),
        hello_frame(Lane.BULK, bytes(16)),
        hello_frame(Lane.BULK),
    ],
    ids=["http", "zeros", "no hello", "lane", "name", "timeout", "too long", "unknown link id", "no link id"],
)
def test_garbage(data):
    """Whoever does not speak properly is disconnected, and others are not disturbed."""

    async def main():
        async with listening() as (listener, keeper), stranger(listener.address, data) as sock:
            sock.shutdown(socket.SHUT_WR)
            await read_to_end(sock)

            assert not keeper.links
            assert await still_welcomes(listener, keeper)

    asyncio.run(main())


def test_slow_stranger(run):
    """A byte now and then does not keep a connection open."""

    async def main():
        async with listening(handshake_timeout=0.3) as (listener, keeper), stranger(listener.address, b"L") as sock:
            assert await still_welcomes(listener, keeper)
            assert await read_to_end(sock) == b""

    run(main())


def test_second_connection_never_comes(run):
    """Half a link is dropped after the deadline, and the first connection alone is no link."""

    async def main():
        async with (
            listening(handshake_timeout=0.3) as (listener, keeper),
            stranger(listener.address, hello_frame()) as sock,
        ):
            assert len((await receive_introduction(sock)).link_id) == 16
            assert await read_to_end(sock) == b""
            assert not keeper.links

    run(main())


def test_link_id_is_good_once(run):
    """A third connection cannot join a link that is complete."""

    async def main():
        async with listening() as (listener, keeper), stranger(listener.address, hello_frame()) as first:
            link_id = (await receive_introduction(first)).link_id
            async with stranger(listener.address, hello_frame(Lane.BULK, link_id)) as second:
                await receive_introduction(second)
                await keeper.first()
                async with stranger(listener.address, hello_frame(Lane.BULK, link_id)) as third:
                    with pytest.raises(HandshakeError, match="no link waits for a second connection with this id"):
                        await receive_introduction(third)

            assert len(keeper.links) == 1

    run(main())


def test_flood():
    """Many silent connections cost a bounded number of tasks, and a node gets through when they time out."""

    async def main():
        async with listening(handshake_timeout=0.5) as (listener, keeper):
            with ExitStack() as stack:
                for _ in range(MAX_HANDSHAKES + 20):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(sock, (listener.address.host, listener.address.port))
                welcoming = asyncio.create_task(still_welcomes(listener, keeper))
                most = 0
                while not welcoming.done():
                    await asyncio.sleep(0.01)
                    most = max(most, len(listener._handshakes))

                assert await welcoming
                assert most == MAX_HANDSHAKES

    asyncio.run(main())


def test_many_nodes_at_once():
    """Nodes that all come at the same moment, more than there may be in their handshake, all get their link."""

    async def main():
        async with listening() as (listener, keeper):
            links = await asyncio.gather(
                *(connect(listener.address, COMPUTE, deadline_s=25) for _ in range(MAX_HANDSHAKES + 20))
            )
            await keeper.until(len(links))
            for link in links:
                link.abort("the test is over")

    asyncio.run(main())


# -- other releases


def test_newer_node_connects(run):
    """The listening end answers with both versions, in a frame of its own release."""

    async def main():
        async with (
            listening() as (listener, keeper),
            stranger(listener.address, OTHER_VERSION + hello_frame()[6:]) as sock,
        ):
            with pytest.raises(
                HandshakeError, match=f"the peer refused: .*version 9, this end speaks version {PROTOCOL_VERSION}"
            ):
                await receive_introduction(sock)
            assert not keeper.links

    run(main())


def test_newer_node_listens(run):
    """The connecting end names both versions and does not try again."""

    async def main():
        with fake_listener(OTHER_VERSION + hello_frame()[6:]) as (address, accepted):
            with pytest.raises(
                HandshakeError, match=f"{address}: .*version 9, this end speaks version {PROTOCOL_VERSION}"
            ):
                await connect(address, COMPUTE, deadline_s=20)

            assert len(accepted) == 1

    run(main())


def test_answer_carries_our_version(run):
    """The frame of a refusal has the version where every release looks for it."""

    async def main():
        async with listening() as (listener, _), stranger(listener.address, OTHER_VERSION + bytes(26)) as sock:
            sock.shutdown(socket.SHUT_WR)
            answer = await read_to_end(sock)

            assert answer[:6] == b"LMNA" + PROTOCOL_VERSION.to_bytes(2, "little")

    run(main())


def test_no_node_listens(run):
    """A server of another kind is recognised at once."""

    async def main():
        answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
        with fake_listener(answer) as (address, _), pytest.raises(HandshakeError, match=r"no Lamina node"):
            await connect(address, COMPUTE, deadline_s=20)

    run(main())


def test_peer_that_hangs_up_is_tried_again(run):
    """A node that is just stopping, or full, closes without a word: that may be over at the next attempt."""

    async def main():
        with fake_listener(b"") as (address, accepted):
            with pytest.raises(ConnectError, match="the peer closed the connection during the handshake"):
                await connect(address, COMPUTE, deadline_s=0.4)

            assert len(accepted) > 1

    run(main())


# -- after the handshake


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize(
    "data", [bytes(64), OTHER_VERSION + bytes(26), message_frame({"x": 1}, 100)[:-1] + b"\xc1"], ids=str
)
def test_bytes_that_make_no_sense_end_the_link(run, lane, data):
    """A link whose peer breaks the protocol ends with a reason; the other link of the same listener does not."""

    async def main():
        async with (
            listening() as (listener, keeper),
            await connect(listener.address, COMPUTE, deadline_s=10) as good,
            stranger(listener.address, hello_frame()) as first,
        ):
            link_id = (await receive_introduction(first)).link_id
            async with stranger(listener.address, hello_frame(Lane.BULK, link_id)) as second:
                await receive_introduction(second)
                await keeper.until(2)
                lost = asyncio.get_running_loop().create_future()
                keeper.links[1].on_lost = lost.set_result
                await asyncio.get_running_loop().sock_sendall((first, second)[lane], data)
                error = await lost

            assert isinstance(error, TransportError)
            assert "c0 (compute" in str(error)
            assert good.error is None
            assert keeper.links[0].error is None

    run(main())


def test_receiver_takes_no_more_than_its_frame():
    """What follows a hello belongs to the link: the handshake leaves it in the socket."""
    frame = hello_frame()
    receiver = FrameReceiver({}, MAX_HELLO)

    taken = 0
    event = None
    while event is None:
        buffer = receiver.next_buffer()
        buffer[:] = frame[taken : taken + len(buffer)]
        taken += len(buffer)
        event = receiver.received(len(buffer))
    assert taken == len(frame)
