"""The two ends of a link in a check, each with a region that the other end may write."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from lamina.errors import LaminaError, TransportError
from lamina.transport.base import Lane, Link, Region, RemoteRegion

MakePair = Callable[[], Awaitable[tuple[Link, Link]]]
"""Makes two fresh links, the two ends of one connection, which do not deliver anything yet."""

CHECK_TIMEOUT_S = 30.0
MIB = 1 << 20


class LinkEnd:
    """One end of a link, with a region that the other end may write. It records what arrives, in order."""

    def __init__(self, link: Link, region: Region) -> None:
        self.link = link
        self.region = region
        self.remote = RemoteRegion(0, "not described yet", 1)
        self.arrived: list[tuple[Lane, int] | dict[str, Any]] = []
        self.lost: list[TransportError] = []
        self._changed = asyncio.Event()
        self.on_tag(lambda lane, tag: self.record((lane, tag)))

    def on_tag(self, callback: Callable[[Lane, int], None]) -> None:
        """Give tags to ``callback`` instead of recording them."""
        self.link.deliver(on_tag=callback, on_message=self.record, on_lost=self._lose)

    @property
    def memory(self) -> memoryview:
        return self.region.buffer

    def write(self, offset: int, data: bytes | memoryview, tag: int, lane: Lane = Lane.DECODE) -> None:
        self.link.write(lane, self.remote, offset, [data], tag)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def until_arrived(self, count: int) -> None:
        await self.until(lambda: len(self.arrived) >= count)

    async def until_lost(self) -> TransportError:
        await self.until(lambda: bool(self.lost))
        return self.lost[0]

    def tags(self, lane: Lane) -> list[int]:
        """The tags that arrived on ``lane``."""
        return [entry[1] for entry in self.arrived if not isinstance(entry, dict) and entry[0] is lane]

    def record(self, entry: tuple[Lane, int] | dict[str, Any]) -> None:
        """Record what arrived; the callbacks of a check call it too."""
        self.arrived.append(entry)
        self._changed.set()

    def _lose(self, error: TransportError) -> None:
        self.lost.append(error)
        self._changed.set()


@asynccontextmanager
async def two_ends(make_pair: MakePair, nbytes: int = MIB) -> AsyncIterator[tuple[LinkEnd, LinkEnd]]:
    """Make two ends that have exposed a region of ``nbytes`` to each other, as nodes do at set-up."""
    links = await make_pair()
    left, right = (LinkEnd(link, Region(name, nbytes)) for link, name in zip(links, ("left", "right"), strict=True))
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            left.remote = await announce(right.link, right.region, left)
            right.remote = await announce(left.link, left.region, right)
            yield left, right
    finally:
        for end in (left, right):
            end.link.abort("the check is over")
            end.region.close()


async def announce(link: Link, region: Region, other: LinkEnd) -> RemoteRegion:
    """Expose ``region`` to ``other``, to which nothing else is sent; returns the description that arrived there."""
    before = len(other.arrived)
    link.send({"region": link.expose(region)})
    await other.until_arrived(before + 1)
    message = other.arrived.pop()
    assert isinstance(message, dict)
    return RemoteRegion.from_wire(message["region"])


async def until_sent(link: Link) -> None:
    """Wait until the medium has all that was written; raises the link's error if it ends first."""
    while link.state.pending_bytes:  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.001)
    if error := link.state.error:
        raise error


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Reproducible bytes in which every displacement shows."""
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(nbytes)


def expect_error(kind: type[LaminaError], action: Callable[[], object]) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
