"""Measure how fast a link between two nodes is: one end measures, the other sends back what it gets."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from typing import Any

from lamina.errors import PeerLostError, ProtocolError, TransportError
from lamina.runtime.network import Network
from lamina.transport import Address, Hello, Lane, Link, Options, Region, RemoteRegion
from lamina.wire.admin import EchoRegion, Probed
from lamina.wire.codec import decode, encode
from lamina.wire.questions import Questions

ROLE = "probe"
"""The role of the end that measures."""

PING_BYTES = 8 << 10
CHUNK_BYTES = 1 << 20
PING_S = 0.3
CHUNKS_S = 0.4
WARM_UP = 20
"""The number of round trips that do not count."""
IN_FLIGHT = 4
"""The number of chunks that are on their way at once."""

CONNECT_S = 8.0
"""The seconds that the two ends may take to agree on a transport."""
MEASURE_S = 5.0
"""The seconds that a measurement may take at most."""
MAX_ECHOES = 4
"""The number of measurements that one node answers at a time."""
MAX_PENDING_BYTES = 2 * IN_FLIGHT * PING_BYTES
"""The bytes that the measuring end may leave unread. It has one ping on its way at a time."""

_REGION, _PHASE = "region", "phase"
"""What a measurement waits for: where to write, and the end of its present phase."""


async def measure(network: Network, address: Address, name: str, options: Options) -> Probed:
    """Measure the link to the node at ``address``, for a second at most once both have agreed on ``options.kind``.

    Raises TransportError if no such link can be made.
    """
    link = await network.connect(address, Hello(ROLE, name), options, deadline_s=CONNECT_S)
    region = Region("probe", CHUNK_BYTES)
    try:
        async with link, asyncio.timeout(MEASURE_S):
            return await _Measurement(link, region).run()
    except TimeoutError as e:
        raise PeerLostError(f"{link} took longer than {MEASURE_S:g} s to be measured") from e
    finally:
        region.close()


class _Measurement:
    """Sends pings, one after the other, on the decode lane; then chunks, several at once, on the bulk lane."""

    def __init__(self, link: Link, region: Region) -> None:
        self._link = link
        self._region = region
        self._questions = Questions(link)
        self._arrived: Callable[[], None] = lambda: None
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)

    async def run(self) -> Probed:
        echo: EchoRegion = await self._questions.ask(EchoRegion(region=self._link.expose(self._region)), _REGION)
        remote = echo.region
        trips = await self._pings(remote)
        percentiles = statistics.quantiles(trips, n=100, method="inclusive")
        return Probed(
            kind=self._link.info.transport,
            choice=self._link.info.choice,
            p50_s=percentiles[49],
            p99_s=percentiles[98],
            bytes_per_s=await self._chunks(remote),
        )

    async def _pings(self, remote: RemoteRegion) -> list[float]:
        """Return the seconds of each round trip."""
        now = asyncio.get_running_loop().time
        trips: list[float] = []
        source = self._region.buffer[:PING_BYTES]
        started = sent = now()

        def send() -> None:
            nonlocal sent
            sent = now()
            self._link.write(Lane.DECODE, remote, 0, [source], 0)

        def arrived() -> None:
            at = now()
            trips.append(at - sent)
            if at - started < PING_S or len(trips) < WARM_UP + 2:
                send()
            elif not done.done():
                done.set_result(None)

        done = self._begin(arrived)
        send()
        await done
        return trips[WARM_UP:]

    async def _chunks(self, remote: RemoteRegion) -> float:
        """Return the bytes per second."""
        now = asyncio.get_running_loop().time
        source = self._region.buffer
        started = now()
        under_way = arrived_bytes = 0
        seconds = 0.0

        def send() -> None:
            nonlocal under_way
            under_way += 1
            self._link.write(Lane.BULK, remote, 0, [source], 0)

        def arrived() -> None:
            nonlocal under_way, arrived_bytes, seconds
            under_way -= 1
            arrived_bytes += CHUNK_BYTES
            seconds = now() - started
            if seconds < CHUNKS_S:
                # Two for one until enough are on their way: a slow one is not flooded with chunks.
                for _ in range(min(2, IN_FLIGHT - under_way)):
                    send()
            elif not under_way and not done.done():
                done.set_result(None)

        done = self._begin(arrived)
        send()
        await done
        return arrived_bytes / seconds

    def _begin(self, arrived: Callable[[], None]) -> asyncio.Future[None]:
        self._arrived = arrived
        return self._questions.expect(_PHASE)

    def _on_tag(self, lane: Lane, tag: int) -> None:
        self._arrived()

    def _on_message(self, plain: dict[str, Any]) -> None:
        echo: EchoRegion = decode(plain, EchoRegion)
        if echo.region.nbytes < CHUNK_BYTES:
            raise ProtocolError(f"expected a region of {CHUNK_BYTES} bytes to write to, got {echo.region.nbytes}")
        self._questions.answer(echo, _REGION)

    def _on_lost(self, error: TransportError) -> None:
        self._questions.fail(error)


class Echoes:
    """Serves the other ends of measurements: each sends back the pings it gets, and an empty write for each chunk."""

    def __init__(self) -> None:
        self._links: set[Link] = set()

    def take(self, link: Link) -> None:
        """Answer the end that measures over ``link``, for a bounded time."""
        self._links = {known for known in self._links if not known.state.closed}
        if len(self._links) >= MAX_ECHOES:
            link.abort(f"{MAX_ECHOES} measurements are in progress already; try again later")
            return
        self._links.add(link)
        _Echo(link)


class _Echo:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._region = Region("echo", CHUNK_BYTES)
        self._remote: RemoteRegion | None = None
        self._timer = asyncio.get_running_loop().call_later(MEASURE_S, link.abort, "the measurement took too long")
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)

    def _on_message(self, plain: dict[str, Any]) -> None:
        remote: RemoteRegion = decode(plain, EchoRegion).region
        if self._remote is not None or remote.nbytes < CHUNK_BYTES:
            raise ProtocolError(
                f"expected one region of at least {CHUNK_BYTES} bytes, got one of {remote.nbytes} bytes"
            )
        self._remote = remote
        self._link.send(encode(EchoRegion(region=self._link.expose(self._region))))

    def _on_tag(self, lane: Lane, tag: int) -> None:
        assert self._remote is not None, "else nothing is exposed"
        if self._link.state.pending_bytes > MAX_PENDING_BYTES:
            self._link.abort("the peer does not read the answers")
            return
        pieces = [self._region.buffer[:PING_BYTES]] if lane is Lane.DECODE else []
        self._link.write(lane, self._remote, 0, pieces, tag)

    def _on_lost(self, error: TransportError) -> None:
        self._timer.cancel()
        self._region.close()
