"""Links inside one process keep the promises of every other transport, and take the time that their model says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lamina.errors import ConfigError, ConnectError, HandshakeError, PeerLostError, ProtocolError, UsageError
from lamina.sim.link import LinkModel
from lamina.sim.loop import VirtualLoop
from lamina.sim.network import SimNetwork
from lamina.transport import Address, Hello, Lane, Link, Options
from lamina.transport.testing import CHECKS, MakePair, two_ends
from tests.sim.traffic import pairs

PLACE = Address.parse("m0:7101")
MEMORY, COMPUTE = Hello("memory", "m0"), Hello("compute", "c0")
MODELS = {
    "fast": LinkModel(latency_s=20e-6, bytes_per_s=10e9),
    "windows": LinkModel(latency_s=2e-6, bytes_per_s=10e9, windows=True),
    "jitter": LinkModel(latency_s=20e-6, bytes_per_s=10e9, jitter_s=30e-6),
}
NEED_TIME_ON_THE_WAY = {
    "check_abort_in_mid_write",
    "check_bulk_does_not_hold_up_decode",
    "check_decode_overtakes_bulk",
}
"""They do something while 64 MiB are on their way, which over an instant link have arrived by then."""


def nothing(link: Link) -> None:
    """Takes a link without doing anything to it."""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(loop: VirtualLoop, model: str, check: Callable[[MakePair], Coroutine[Any, Any, None]]) -> None:
    """Every check of the transports, none excepted, holds for links that take time."""
    loop.run_until_complete(check(pairs(SimNetwork(loop, model=MODELS[model]))))


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check.__name__ not in NEED_TIME_ON_THE_WAY],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_conformance_of_instant_links(
    loop: VirtualLoop, check: Callable[[MakePair], Coroutine[Any, Any, None]]
) -> None:
    """The others hold for links that take no time at all."""
    loop.run_until_complete(check(pairs(SimNetwork(loop))))


def test_writes_take_latency_and_size_by_bandwidth(loop: VirtualLoop) -> None:
    """A write arrives after those before it on its lane, its own size by the bandwidth, and the latency."""

    async def main() -> None:
        network = SimNetwork(loop, model=LinkModel(latency_s=0.5, bytes_per_s=1000.0))
        async with two_ends(pairs(network)) as (left, right):
            arrived: list[tuple[Lane, int, float]] = []
            right.on_tag(lambda lane, tag: right.record((lane, tag)) or arrived.append((lane, tag, loop.time())))
            started = loop.time()
            left.write(0, bytes(1000), 1)
            left.write(0, bytes(2000), 2)
            left.write(0, bytes(4000), 3, Lane.BULK)
            await asyncio.sleep(10)
            left.write(0, b"", 4)
            await right.until_arrived(4)

            assert arrived == [
                (Lane.DECODE, 1, started + 1.5),
                (Lane.DECODE, 2, started + 3.5),
                (Lane.BULK, 3, started + 4.5),
                (Lane.DECODE, 4, started + 10.5),
            ]
            assert right.link.state.bytes_received == left.link.state.bytes_written == (3000, 4000)

    loop.run_until_complete(main())


def test_ends_that_answer_each_other_at_once_leave_the_loop_to_others(loop: VirtualLoop) -> None:
    """Over an instant link, an answer arrives in the next round, and not before other callbacks had their turn."""

    async def main() -> None:
        async with two_ends(pairs(SimNetwork(loop))) as (left, right):
            rallies = 0

            def hit(lane: Lane, tag: int) -> None:
                nonlocal rallies
                rallies += 1
                if rallies < 10_000:
                    (left, right)[rallies % 2].write(0, b"x", tag)

            left.on_tag(hit)
            right.on_tag(hit)
            left.write(0, b"x", 1)
            for _ in range(10):
                await asyncio.sleep(0)
            assert 5 <= rallies <= 15

    loop.run_until_complete(main())


def test_a_buffer_that_is_changed_too_early_shows(loop: VirtualLoop) -> None:
    """Bytes are copied when they arrive: until then they are pending, and what the sender does to them is seen."""

    async def main() -> None:
        async with two_ends(pairs(SimNetwork(loop, model=MODELS["fast"]))) as (left, right):
            buffer = bytearray(b"right")
            left.link.write(Lane.DECODE, left.remote, 0, [buffer], 1)
            assert left.link.state.pending_bytes == 5
            buffer[:] = b"wrong"
            await right.until_arrived(1)
            assert bytes(right.memory[:5]) == b"wrong"
            assert left.link.state.pending_bytes == 0

    loop.run_until_complete(main())


def test_messages_pass_through_their_encoding(loop: VirtualLoop) -> None:
    """What arrives is a copy, as over a socket: tuples are lists, and what the protocol forbids ends the link."""

    async def main() -> None:
        async with two_ends(pairs(SimNetwork(loop))) as (left, right):
            message: dict[str, Any] = {"pair": (1, 2), "list": []}
            left.link.send(message)
            message["list"].append("late")
            await right.until_arrived(1)
            assert right.arrived == [{"pair": [1, 2], "list": []}]
            assert left.link.info.peer.details == {"heads": [0, 4]}

            deep: dict[str, Any] = {}
            for _ in range(20):
                deep = {"deeper": deep}
            left.link.send(deep)
            assert isinstance(await right.until_lost(), ProtocolError)

    loop.run_until_complete(main())


def test_a_link_of_kind_control_has_no_lanes(loop: VirtualLoop) -> None:
    """It carries messages, and refuses regions."""

    async def main() -> None:
        network = SimNetwork(loop)
        accepted: list[Link] = []
        await network.listen(PLACE, MEMORY, accepted.append, Options())
        link = await network.connect(PLACE, Hello("monitor", "up"), Options(kind="control"), deadline_s=1)
        heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        accepted[0].deliver(on_message=heard.put_nowait)
        link.deliver()
        link.send({"status": True})
        assert await heard.get() == {"status": True}
        assert link.info.transport == accepted[0].info.transport == "control"
        async with two_ends(lambda: _pair(network)) as (left, _):
            with pytest.raises(ConfigError, match="only carries messages"):
                link.expose(left.region)
        link.abort("the test is over")

    loop.run_until_complete(main())


async def _pair(network: SimNetwork) -> tuple[Link, Link]:
    accepted: list[Link] = []
    listener = await network.listen(Address.parse("m1:0"), Hello("memory", "m1"), accepted.append, Options())
    return await network.connect(listener.address, COMPUTE, Options(), deadline_s=1), accepted[0]


def test_lanes_stay_with_the_one_loop(loop: VirtualLoop) -> None:
    """The loop of the network may be named as that of the lanes, and no other one."""

    async def main() -> None:
        near, far = await _pair(SimNetwork(loop))
        near.deliver(lane_loop=loop)
        other = VirtualLoop()
        with pytest.raises(UsageError, match="the only one there is"):
            far.deliver(lane_loop=other)
        other.close()
        near.abort("the test is over")

    loop.run_until_complete(main())


# -- who finds whom


def test_connecting_waits_for_a_listener(loop: VirtualLoop) -> None:
    """Nodes may start in any order: an attempt succeeds as soon as its peer listens."""

    async def main() -> None:
        network = SimNetwork(loop, model=LinkModel(latency_s=0.25))
        attempt = asyncio.create_task(network.connect(PLACE, COMPUTE, Options(), deadline_s=10))
        await asyncio.sleep(3)
        await network.listen(PLACE, MEMORY, nothing, Options())
        link = await attempt
        assert loop.time() == 3.5
        assert (link.info.local, link.info.peer, link.info.address) == (COMPUTE, MEMORY, str(PLACE))

    loop.run_until_complete(main())


def test_connecting_gives_up_at_its_deadline(loop: VirtualLoop) -> None:
    """ConnectError comes exactly then, whether nothing listens, or what listens cannot be heard."""

    async def main() -> None:
        network = SimNetwork(loop)
        with pytest.raises(ConnectError, match=r"m0:7101: no link within 2 s, last attempt: Connection refused"):
            await network.connect(PLACE, COMPUTE, Options(), deadline_s=2)
        assert loop.time() == 2
        await network.listen(PLACE, MEMORY, nothing, Options())
        network.freeze("m0")
        with pytest.raises(ConnectError, match="last attempt: no answer"):
            await network.connect(PLACE, COMPUTE, Options(), deadline_s=2)
        network.thaw("m0")
        network.cut("c0", "m0")
        attempt = asyncio.create_task(network.connect(PLACE, COMPUTE, Options(), deadline_s=2))
        await asyncio.sleep(1)
        network.mend("m0", "c0")
        await attempt

    loop.run_until_complete(main())


def test_ends_that_do_not_fit_are_not_linked(loop: VirtualLoop) -> None:
    """HandshakeError at once for secrets and kinds that differ, as from a real listener."""

    async def main() -> None:
        network = SimNetwork(loop)
        await network.listen(PLACE, MEMORY, nothing, Options(kind="tcp", secret=b"0123456789abcdef"))
        for options in (
            Options(),
            Options(secret=b"fedcba9876543210"),
            Options(kind="rdma", secret=b"0123456789abcdef"),
        ):
            with pytest.raises(HandshakeError):
                await network.connect(PLACE, COMPUTE, options, deadline_s=5)
        assert loop.time() == 0

    loop.run_until_complete(main())


def test_listening(loop: VirtualLoop) -> None:
    """Port 0 becomes a free one; an address is taken until its listener is closed; links outlive their listener."""

    async def main() -> None:
        network = SimNetwork(loop)
        listener = await network.listen(PLACE, MEMORY, nothing, Options())
        with pytest.raises(ConnectError, match="another process uses the port"):
            await network.listen(PLACE, MEMORY, nothing, Options())
        link = await network.connect(PLACE, COMPUTE, Options(), deadline_s=1)
        await listener.close()
        await listener.close()
        await network.listen(PLACE, MEMORY, nothing, Options())
        free = [await network.listen(Address.parse("m0:0"), MEMORY, nothing, Options()) for _ in range(3)]
        assert len({each.address for each in free}) == 3
        link.send({"still": "open"})
        assert not link.state.closed

    loop.run_until_complete(main())


def test_an_owner_that_fails_to_take_a_link_costs_that_link_only(loop: VirtualLoop) -> None:
    """The connecting end loses its peer; the listener goes on."""

    async def main() -> None:
        network = SimNetwork(loop)
        await network.listen(PLACE, MEMORY, lambda link: 1 / 0, Options())
        for _ in range(2):
            link = await network.connect(PLACE, COMPUTE, Options(), deadline_s=1)
            lost: asyncio.Future[Exception] = loop.create_future()
            link.deliver(on_lost=lost.set_result)
            assert isinstance(await lost, PeerLostError)

    loop.run_until_complete(main())


def test_a_model_for_two_processes(loop: VirtualLoop) -> None:
    """``set_model`` holds for links between these two, in both directions, that are made from then on."""

    async def main() -> None:
        network = SimNetwork(loop, model=LinkModel(latency_s=1.0))
        network.set_model("m1", "c0", LinkModel(latency_s=0.25))
        await network.listen(PLACE, MEMORY, nothing, Options())
        await network.connect(PLACE, COMPUTE, Options(), deadline_s=9)
        assert loop.time() == 2
        await _pair(network)
        assert loop.time() == 2.5

    loop.run_until_complete(main())


@pytest.mark.parametrize("values", [{"latency_s": -1.0}, {"bytes_per_s": 0.0}, {"jitter_s": float("nan")}])
def test_a_model_that_cannot_be(values: dict[str, float]) -> None:
    """A link that takes negative time, or for ever, is refused."""
    with pytest.raises(ConfigError):
        LinkModel(**values)  # type: ignore[arg-type]
