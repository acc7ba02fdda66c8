"""Whatever befalls a peer, and whenever: every task that waits for it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import PeerLostError, TransportError
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from lamina.transport import Address, Hello, Lane, Link, Options, Region, RemoteRegion
from lamina.transport.testing import two_ends
from lamina.transport.testing.ends import LinkEnd
from tests.sim.traffic import pairs

PLACE = Address.parse("m0:7101")
MODEL = LinkModel(latency_s=1e-3, bytes_per_s=1e6, jitter_s=1e-3)
PEER_TIMEOUT_S = 2.0
OPTIONS = Options(peer_timeout=PEER_TIMEOUT_S)
ROUNDS = 3
NBYTES = 4000


# -- one kind of loss after the other


def test_a_killed_peer_is_lost_soon() -> None:
    """After one latency, as the kernel tells of a closed socket; the killed end hears nothing and raises."""
    with World(1, model=LinkModel(latency_s=0.001)) as world:

        async def main() -> None:
            async with two_ends(pairs(world.network)) as (left, right):
                started = world.loop.time()
                world.network.kill("m0")
                assert right.link.state.closed
                error = await left.until_lost()
                assert isinstance(error, PeerLostError)
                assert world.loop.time() == started + 0.001
                assert not right.lost
                with pytest.raises(TransportError, match="killed"):
                    right.write(0, b"x", 1)

        world.run(main())


def test_what_left_a_killed_peer_still_arrives() -> None:
    """What the peer sent before it died comes before the news of its death, with the bytes of that moment."""
    with World(1, model=LinkModel(latency_s=1.0, bytes_per_s=1e6)) as world:

        async def main() -> None:
            async with two_ends(pairs(world.network)) as (left, right):
                buffer = bytearray(b"last words")
                right.link.write(Lane.DECODE, right.remote, 0, [buffer], 1)
                right.link.send({"last": "message"})
                right.write(0, bytes(1_000_000), 2, Lane.BULK)
                await asyncio.sleep(0.5)
                world.network.kill("m0")
                buffer[:] = b"overwrite!"
                await left.until_lost()
                assert left.arrived == [(Lane.DECODE, 1), {"last": "message"}]
                assert bytes(left.memory[:10]) == b"last words"

        world.run(main())


def test_a_frozen_peer_is_lost_after_the_timeout() -> None:
    """Exactly ``peer_timeout`` of silence; a shorter one only delays what was sent, in both directions."""
    with World(1, model=LinkModel(latency_s=0.001)) as world:

        async def main() -> None:
            async with two_ends(pairs(world.network)) as (left, right):
                world.network.freeze("m0")
                left.write(0, b"to", 1)
                right.write(0, b"fro", 2)
                await asyncio.sleep(9.9)
                assert not left.arrived
                assert not right.arrived
                world.network.thaw("m0")
                await left.until_arrived(1)
                await right.until_arrived(1)
                assert not left.lost
                assert bytes(right.memory[:2]) == b"to"

                world.network.freeze("m0")
                frozen = world.loop.time()
                error = await left.until_lost()
                assert "has been silent for 10.0 s" in str(error)
                assert world.loop.time() == frozen + 10
                assert not right.lost
                world.network.thaw("m0")
                await right.until_lost()  # it finds its socket closed

        world.run(main())


def test_the_timeout_may_be_changed_in_the_silence() -> None:
    """A new ``peer_timeout`` counts from the beginning of the silence."""
    with World(1, model=MODEL) as world:

        async def main() -> None:
            near, far = await pairs(world.network)()
            lost: asyncio.Future[TransportError] = world.loop.create_future()
            near.deliver(on_lost=lost.set_result)
            world.network.freeze("m0")
            started = world.loop.time()
            await asyncio.sleep(3)
            near.deliver(on_lost=lost.set_result, peer_timeout=5.0)
            await lost
            assert world.loop.time() == started + 5
            far.abort("the test is over")

        world.run(main())


def test_both_ends_of_a_cut_lose_each_other() -> None:
    """Each after its own timeout, and links to others live on."""
    with World(1, model=MODEL) as world:

        async def main() -> None:
            async with two_ends(pairs(world.network)) as (left, right):
                accepted: list[Link] = []
                await world.network.listen(PLACE, Hello("memory", "m1"), accepted.append, OPTIONS)
                other = await world.network.connect(PLACE, Hello("compute", "c0"), OPTIONS, deadline_s=1)
                other.deliver()
                world.network.cut("m0", "c0")
                started = world.loop.time()
                await left.until_lost()
                await right.until_lost()
                assert world.loop.time() == started + 10
                assert not other.state.closed
                assert not accepted[0].state.closed
                world.network.mend("c0", "m0")

        world.run(main())


def test_a_killed_process_may_start_again() -> None:
    """Its address is free, and links of the new process work; an attempt of the old one ends without a link."""
    with World(1, model=MODEL) as world:

        async def main() -> None:
            network = world.network
            await network.listen(PLACE, Hello("memory", "m0"), lambda link: None, OPTIONS)
            old = asyncio.create_task(network.connect(PLACE, Hello("compute", "c0"), OPTIONS, deadline_s=5))
            await asyncio.sleep(0)
            network.kill("c0")
            network.kill("m0")
            await network.listen(PLACE, Hello("memory", "m0"), lambda link: None, OPTIONS)
            with pytest.raises(TransportError, match="was killed"):
                await old
            async with two_ends(pairs(world.network)) as (left, right):
                left.write(0, b"again", 1)
                await right.until_arrived(1)

        world.run(main())


# -- every kind of loss at every moment of an exchange


@dataclass
class Exchange:
    """A client c0 asks a server m0 a few times, on both lanes and by messages, and closes; each in a task."""

    world: World
    answers: int = 0
    client: asyncio.Task[None] = field(init=False)
    server: asyncio.Task[None] = field(init=False)

    def start(self) -> None:
        self.client = asyncio.create_task(self._ask(), name="c0")
        self.server = asyncio.create_task(self._serve(), name="m0")

    async def _ask(self) -> None:
        link = await self.world.network.connect(PLACE, Hello("compute", "c0"), OPTIONS, deadline_s=5)
        async with link:
            peer = Waiting(link)
            link.send({"region": link.expose(peer.region)})
            remote = RemoteRegion.from_wire((await peer.message())["region"])
            for number in range(ROUNDS):
                for lane in Lane:
                    link.write(lane, remote, 0, [bytes([number + 1]) * NBYTES], number)
                    assert await peer.tag() == (lane, number)
                    assert bytes(peer.region.buffer) == bytes([number + 1]) * NBYTES
                    self.answers += 1

    async def _serve(self) -> None:
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        listener = await self.world.network.listen(PLACE, Hello("memory", "m0"), accepted.set_result, OPTIONS)
        link = await accepted
        await listener.close()
        async with link:
            peer = Waiting(link)
            remote = RemoteRegion.from_wire((await peer.message())["region"])
            link.send({"region": link.expose(peer.region)})
            while True:
                lane, number = await peer.tag()
                link.write(lane, remote, 0, [peer.region.buffer], number)


class Waiting:
    """Lets a task wait for what arrives on a link; its loss ends every wait."""

    def __init__(self, link: Link) -> None:
        self.region = Region("region", NBYTES)
        self._link = link
        self._messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self._tags: asyncio.Queue[tuple[Lane, int]] = asyncio.Queue()
        self._lost: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        link.deliver(
            on_message=self._messages.put_nowait,
            on_tag=lambda lane, tag: self._tags.put_nowait((lane, tag)),
            on_lost=self._lost.set_exception,
        )

    async def message(self) -> dict[str, object]:
        return await self._first(self._messages.get())

    async def tag(self) -> tuple[Lane, int]:
        return await self._first(self._tags.get())

    async def _first(self, get: object) -> object:
        getting = asyncio.ensure_future(get)
        try:
            await asyncio.wait([getting, self._lost], return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else await self._lost
        finally:
            getting.cancel()
            if self._lost.done():
                self._lost.exception()


def run_exchange(seed: int, befall: Callable[[Exchange], None] | None = None, at_s: float = 0.0) -> list[str]:
    """The trace of an exchange that something befalls at a moment; every task ends, in time and in the right way."""
    with World(seed, model=MODEL, limit_s=60.0) as world:
        exchange = Exchange(world)

        async def main() -> None:
            exchange.start()
            if befall is not None:
                world.loop.call_at(at_s, befall, exchange)
            done, _ = await asyncio.wait([exchange.client, exchange.server])
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    assert isinstance(error, TransportError), error

        world.run(main())
        if befall is None:
            assert exchange.answers == 2 * ROUNDS
        return world.trace


def kill_client(exchange: Exchange) -> None:
    exchange.world.network.kill("c0")
    exchange.client.cancel()
    exchange.world.loop.call_later(20, exchange.server.cancel)  # it may never have been asked anything


def kill_server(exchange: Exchange) -> None:
    exchange.world.network.kill("m0")
    exchange.server.cancel()


def cancel_server(exchange: Exchange) -> None:
    exchange.server.cancel()


def freeze_server(exchange: Exchange) -> None:
    exchange.world.network.freeze("m0")
    exchange.world.loop.call_later(20, exchange.world.network.thaw, "m0")
    exchange.world.loop.call_later(40, exchange.server.cancel)


def stall_server(exchange: Exchange) -> None:
    exchange.world.network.freeze("m0")
    exchange.world.loop.call_later(0.5 * PEER_TIMEOUT_S, exchange.world.network.thaw, "m0")


def cut(exchange: Exchange) -> None:
    exchange.world.network.cut("c0", "m0")
    exchange.world.loop.call_later(20, exchange.server.cancel)


LOSSES = (kill_client, kill_server, cancel_server, freeze_server, stall_server, cut)


@pytest.mark.parametrize("befall", LOSSES, ids=lambda befall: befall.__name__)
def test_every_task_ends_whenever_a_peer_is_lost(befall: Callable[[Exchange], None]) -> None:
    """At each moment at which something arrives, right before and right after: both tasks end, and no other error."""
    moments = sorted({float(line.split()[0]) for line in run_exchange(7)})
    assert len(moments) > 15
    for moment in [0.0, *moments]:
        for at_s in (moment - 1e-7, moment, moment + 1e-7):
            run_exchange(7, befall, max(at_s, 0.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LOSSES), st.floats(0, 0.15))
def test_every_task_ends_in_any_world(seed: int, befall: Callable[[Exchange], None], at_s: float) -> None:
    """The same at any moment, with any delays; and a second run is equal to the first, to the byte."""
    assert run_exchange(seed, befall, at_s) == run_exchange(seed, befall, at_s)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.02), st.booleans())
def test_a_dying_peer_is_heard_to_its_last_complete_write(seed: int, at_s: float, freezes: bool) -> None:
    """Each lane, and the messages, arrive as a beginning of what was sent, complete and in order; then the loss."""

    async def main(world: World) -> None:
        accepted: list[Link] = []
        await world.network.listen(PLACE, Hello("memory", "m0"), accepted.append, OPTIONS)
        near = await world.network.connect(PLACE, Hello("compute", "c0"), OPTIONS, deadline_s=5)
        left, right = LinkEnd(near, Region("left", 1)), LinkEnd(accepted[0], Region("right", 40 * NBYTES))
        near.deliver(on_message=left.record)
        right.link.send({"region": right.link.expose(right.region)})
        await left.until_arrived(1)
        left.remote = RemoteRegion.from_wire(left.arrived[0]["region"])  # type: ignore[index, call-overload]
        for number in range(20):
            for lane in Lane:
                left.write((2 * number + lane) * NBYTES, bytes([number + 1]) * NBYTES, number, lane)
            left.link.send({"number": number})
        if freezes:
            world.loop.call_later(at_s, world.network.freeze, "c0")
        world.loop.call_later(4 * at_s, world.network.kill, "c0")
        assert isinstance(await right.until_lost(), PeerLostError)
        heard = list(right.arrived)
        await asyncio.sleep(10)
        assert right.arrived == heard
        for lane in Lane:
            tags = right.tags(lane)
            assert tags == list(range(len(tags)))
            for number in tags:
                place = (2 * number + lane) * NBYTES
                assert bytes(right.memory[place : place + NBYTES]) == bytes([number + 1]) * NBYTES
        messages = [entry for entry in heard if isinstance(entry, dict)]
        assert messages == [{"number": number} for number in range(len(messages))]

    with World(seed, model=MODEL) as world:
        world.run(main(world))
