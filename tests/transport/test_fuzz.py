"""Whatever bytes come, a node stays up: it says what was wrong, in bounded memory and time, and goes on with others.

Everything here runs a few hundred cases by default; the slow tests run a hundred thousand.
"""

from __future__ import annotations

import asyncio
import socket
import time
import tracemalloc
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import HandshakeError, ProtocolError, TransportError
from lamina.transport import Address, Link, Options, Region, connect
from lamina.transport.frames import FrameReceiver, Sign
from lamina.transport.messages import MAX_MESSAGE, decode_message
from tests.transport import wire
from tests.transport.nodes import COMPUTE, TCP, listening, round_trip

REGION_BYTES = 4096
SECRET = b"what all nodes of a cluster know"
LONGEST_STALL_S = 1.0  # of computing, as the machine may be busy with something else
MIB = 1 << 20

any_map = st.dictionaries(
    st.sampled_from(["region", "lanes", "bye", "gone", "credits", "join", "proof", "outcome", "refused", "x"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=40),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
edges = st.sampled_from([0, 1, REGION_BYTES - 1, REGION_BYTES, MAX_MESSAGE, MAX_MESSAGE + 1, 2**31, 2**63, 2**64 - 1])

notes = any_map.map(wire.note)
messages = any_map.map(wire.message)
writes = st.builds(wire.write, st.integers(0, 3), st.integers(0, REGION_BYTES), st.binary(max_size=64), u32)
headers = st.builds(
    lambda kind, length, key, tag, offset: wire.header(kind, length, key=key, tag=tag, offset=offset),
    st.integers(0, 6),
    edges | u64,
    st.integers(0, 3) | u32,
    u32,
    edges | u64,
)
bombs = st.builds(
    lambda prefix, head, claim, count: (
        wire.header(wire.MESSAGE, len(prefix) + 5 * count) + prefix + (head + claim.to_bytes(4, "big")) * count
    ),
    st.sampled_from([b"\x81\xa1x", b"\x81\xa6region", b""]),
    st.sampled_from([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2000),
) | st.integers(1, 50_000).map(
    lambda depth: wire.header(wire.MESSAGE, depth + 4) + b"\x81\xa1x" + b"\x91" * depth + b"\xc0"
)
heartbeats = st.just(wire.header(wire.HEARTBEAT))
frames = notes | messages | writes | headers | bombs | heartbeats


@st.composite
def flipped(draw, valid):
    """Valid frames, a few bytes of which are not what they were."""
    data = bytearray(b"".join(draw(st.lists(valid, min_size=1, max_size=4))))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    return bytes(data)


streams = (
    st.binary(max_size=300)
    | st.lists(frames, min_size=1, max_size=6).map(b"".join)
    | flipped(notes | messages | writes | heartbeats)
)


def cases(count):
    """Settings for so many cases. No deadline: other tests may have the machine."""
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


def fast_and_slow(fast, slow):
    """A test of one case, given by its first argument, run ``fast`` times by default and ``slow`` times more slowly."""
    return pytest.mark.parametrize(
        "count", [fast, pytest.param(slow, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
    )


# -- without a socket


@contextmanager
def bounded_memory():
    """A message of a megabyte may arrive, and what it says may be built from it, but no more."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def feed(receiver, data, piece):
    """What a socket does that gives ``piece`` bytes at once."""
    data = memoryview(data)
    while data:
        buffer = receiver.next_buffer()
        nbytes = min(len(buffer), len(data), piece)
        buffer[:nbytes] = data[:nbytes]
        data = data[nbytes:]
        event = receiver.received(nbytes)
        assert event is None or isinstance(event, int | dict | Sign)


@fast_and_slow(400, 60_000)
def test_receiver(count):
    """A receiver of frames yields events or an error of the protocol, and takes memory for one message at most."""

    @cases(count)
    @given(streams, st.sampled_from([7, 100, 4096]), st.sampled_from([0, 100, MAX_MESSAGE]))
    def check(data, piece, max_message):
        receiver = FrameReceiver({1: memoryview(bytearray(REGION_BYTES))}, max_message)
        with bounded_memory(), suppress(ProtocolError, HandshakeError):
            feed(receiver, data, piece)

    check()


@fast_and_slow(400, 40_000)
def test_messages(count):
    """So does the decoder of messages."""
    bodies = frames.map(lambda frame: frame[wire.HEADER_BYTES :]) | flipped(any_map.map(msgpack.packb))

    @cases(count)
    @given(bodies | st.binary(max_size=200))
    def check(body):
        with bounded_memory(), suppress(ProtocolError):
            message = decode_message(body)
            assert type(message) is dict
            assert all(type(key) is str for key in message)

    check()


# -- against live nodes


@dataclass
class Arena:
    """A loop that stays the same for all cases of a test, with a listener, and a link that must not notice."""

    runner: asyncio.Runner
    listener: object
    keeper: object
    options: Options
    offers: dict
    witness: Link
    other: Link
    stall_s: float = 0.0

    def run(self, case):
        return self.runner.run(self._bounded(case))

    async def _bounded(self, case):
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(30):
                await case
        finally:
            watch.cancel()

    async def _watch(self):
        """Measure how long the loop computed without looking at anybody else."""
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            self.stall_s = max(self.stall_s, time.thread_time() - before)

    async def listened_to_by(self, hand_made):
        """The real end of a link whose other end is made by hand, when it has a region there."""
        link = self.keeper.links.pop()
        link.expose(Region("inbox", REGION_BYTES))
        await hand_made.control.hear()
        return link


@pytest.fixture
def arena(request):
    """Its options are the parameter; some cases need a secret."""
    options = getattr(request, "param", TCP)
    runner = asyncio.Runner()
    stack = AsyncExitStack()

    async def open_all():
        listener, keeper = await stack.enter_async_context(listening(options, deadline_s=None, handshake_timeout=2.0))
        witness = await connect(listener.address, COMPUTE, options, deadline_s=10)
        stack.callback(witness.abort, "the test is over")
        other = await keeper.first()
        keeper.links.clear()
        offers = await wire.offers_of(listener.address)
        return Arena(runner, listener, keeper, options, offers, witness, other)

    arena = runner.run(open_all())
    before = _resident_bytes()
    yield arena
    assert _resident_bytes() - before < 200 * MIB
    assert arena.stall_s < LONGEST_STALL_S
    assert arena.witness.state.error is None
    assert arena.other.state.error is None
    runner.run(round_trip(arena.witness, arena.other))
    runner.run(stack.aclose())
    runner.close()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


AUTO = Options("auto", peer_timeout=10.0, secret=SECRET)


@fast_and_slow(120, 4_000)
@pytest.mark.parametrize(
    ("arena", "stage"),
    [
        (TCP, "hello"),
        (TCP, "proof"),
        (TCP, "join"),
        (TCP, "outcome"),
        (AUTO, "proof"),
        (AUTO, "join"),
        (AUTO, "set-up"),
    ],
    indirect=["arena"],
    ids=lambda value: getattr(value, "kind", value),
)
def test_listener(arena, stage, count):
    """Strangers say anything at any point of the handshake: none of them gets a link by it, and all are let go."""
    secret = arena.options.secret

    @cases(count)
    @given(streams | flipped(st.builds(wire.hello).map(wire.message)))
    def check(data):
        arena.run(one(data))

    async def one(data):
        address = arena.listener.address
        async with AsyncExitStack() as stack:
            stranger = await stack.enter_async_context(wire.stranger(address))
            if stage == "proof":
                await stranger.send(wire.message(wire.hello(secret=secret is not None)))
                await stranger.frame()
            elif stage == "join":
                data = wire.message({"join": data[:16], "lane": 0, "proof": data[16:48]}) + data[48:]
            elif stage == "set-up":
                await wire.introduce(stranger, secret, kind="shm", offers=arena.offers)
                await stranger.hear()
            elif stage == "outcome":
                link_id, key = await wire.introduce(stranger, secret)
                for lane in (0, 1):
                    await stack.enter_async_context(wire.stranger(address, wire.join(link_id, key, lane)))
                await stranger.hear()
            with suppress(ConnectionError):
                await stranger.send(data)
            stranger.sock.shutdown(socket.SHUT_WR)
            await stranger.rest()
        if stage == "outcome":
            # Now and then it is one: the link then ends with the connection.
            arena.keeper.links.clear()
        assert not arena.keeper.links

    check()


@fast_and_slow(150, 5_000)
@pytest.mark.parametrize("place", ["control", "decode", "bulk"])
def test_link(arena, place, count):
    """A peer that proved itself and then says anything: its link lives on or ends with a reason, and no other does."""

    @cases(count)
    @given(streams)
    def check(data):
        arena.run(one(data))

    async def one(data):
        async with wire.hand_made_link(arena.listener.address) as hand_made:
            await asyncio.sleep(0)
            await _until(lambda: arena.keeper.links)
            link = await arena.listened_to_by(hand_made)
            lost = asyncio.get_running_loop().create_future()
            tags, heard = [], []
            link.deliver(on_tag=lambda lane, tag: tags.append(tag), on_message=heard.append, on_lost=lost.set_result)
            one = hand_made.wires[["control", "decode", "bulk"].index(place)]
            with suppress(ConnectionError):
                await one.send(data)
            one.sock.shutdown(socket.SHUT_WR)
            error = await lost

            assert isinstance(error, TransportError)
            assert "stranger (compute" in str(error)
            assert not tags or place != "control"
            assert not heard or place == "control"
            assert link.state.pending_bytes == 0

    check()


@fast_and_slow(100, 2_000)
def test_connecting(arena, count):
    """A node that connects to something which says anything gets an error, in time."""

    @cases(count)
    @given(st.booleans(), streams | flipped(st.builds(wire.hello).map(wire.message)))
    def check(proves, data):
        arena.run(one(proves, data))

    async def one(proves, data):
        async def serve(peer):
            theirs = await peer.frame()
            if proves:
                mine = wire.message(wire.hello())
                await peer.send(mine)
                await peer.hear()
                proof = wire.proof(b"", b"listening", (theirs, mine))
                await peer.send(wire.message({"proof": proof, "link_id": bytes(16)}))
            await peer.send(data)

        async with wire.server(serve) as (port, _):
            with pytest.raises(TransportError):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, TCP, deadline_s=0.05)

    check()


async def _until(condition):
    while not condition():  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0)
