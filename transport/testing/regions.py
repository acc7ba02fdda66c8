"""Checks of regions: which regions may be written, over which links, and for how long."""

from __future__ import annotations

from lamina.errors import ConfigError, ProtocolError, TransportError
from lamina.transport.base import MAX_REGIONS, Lane, Region, RemoteRegion
from lamina.transport.testing.ends import (
    MIB,
    MakePair,
    announce,
    expect_error,
    noise,
    two_ends,
)


async def check_unknown_region_is_refused_here(make_pair: MakePair) -> None:
    """A write to a region that the peer did not expose, or not with this size, raises; the link lives on."""
    async with two_ends(make_pair, nbytes=4096) as (left, right):
        for remote in (
            left.remote._replace(key=left.remote.key + 1),
            left.remote._replace(key=2**32 - 1),
            left.remote._replace(nbytes=left.remote.nbytes + 1),
            left.remote._replace(nbytes=left.remote.nbytes - 1),
        ):
            expect_error(ProtocolError, lambda r=remote: left.link.write(Lane.DECODE, r, 0, [b"x"], 0))  # type: ignore[misc]
            expect_error(ProtocolError, lambda r=remote: left.link.write(Lane.BULK, r, 0, [], 0))  # type: ignore[misc]
            expect_error(ProtocolError, lambda r=remote: left.link.window(r))  # type: ignore[misc]
        left.write(0, b"fine", 1)
        await right.until_arrived(1)

        assert right.arrived == [(Lane.DECODE, 1)]


async def check_many_regions(make_pair: MakePair) -> None:
    """An end may expose MAX_REGIONS regions and no more, and each write reaches the region that was described."""
    async with two_ends(make_pair, nbytes=4096) as (left, right):
        regions, remotes = [right.region], [left.remote]
        while len(regions) < 20:
            regions.append(Region(f"number {len(regions)}", 64 + len(regions)))
            remotes.append(await announce(right.link, regions[-1], left))
        for _ in range(20, MAX_REGIONS):
            remotes.append(await announce(right.link, regions[-1], left))
        expect_error(ConfigError, lambda: right.link.expose(regions[-1]))
        for i, remote in enumerate(remotes[:20]):
            left.link.write(Lane.DECODE, remote, i, [bytes([i + 1])], i)
        left.link.write(Lane.DECODE, remotes[-1], 0, [b"last"], 20)
        await right.until_arrived(21)

        assert [region.buffer[i] for i, region in enumerate(regions)] == list(range(1, 21))
        assert bytes(regions[-1].buffer[:4]) == b"last"
        assert [(remote.name, remote.nbytes) for remote in remotes[:20]] == [(r.name, r.nbytes) for r in regions]


async def check_window(make_pair: MakePair) -> None:
    """``window`` is None or the peer's memory itself; what lies in it is written like any other buffer."""
    async with two_ends(make_pair, nbytes=MIB) as (left, right):
        window = left.link.window(left.remote)
        if window is None:
            return
        assert (window.nbytes, window.format, window.readonly) == (MIB, "B", False)
        window[100:104] = b"here"
        assert bytes(right.memory[100:104]) == b"here"
        data = noise(500_000)
        window[1000 : 1000 + len(data)] = data
        left.link.write(Lane.DECODE, left.remote, 1000, [window[1000 : 1000 + len(data)]], 1)
        left.link.write(Lane.BULK, left.remote, 1000, [window[1000 : 1000 + len(data)]], 2)
        left.link.write(Lane.DECODE, left.remote, 600_000, [window[100:102], b", ", window[102:104]], 3)
        await right.until_arrived(3)

        assert bytes(right.memory[1000 : 1000 + len(data)]) == data
        assert bytes(right.memory[600_000:600_006]) == b"he, re"
        await left.link.close()
        expect_error(TransportError, lambda: left.link.window(left.remote))
        window[100:104] = b"mine"  # it stays mapped as long as there is a view of it
        assert bytes(window[100:104]) == b"mine"


async def check_two_links_share_a_region(make_pair: MakePair) -> None:
    """One region may be written over several links, and the end of one link does not affect the others."""
    async with two_ends(make_pair) as (left, right), two_ends(make_pair) as (other_left, other_right):
        right.link.send({"region": right.link.expose(other_right.region)})
        await left.until_arrived(1)
        message = left.arrived[0]
        assert isinstance(message, dict)
        shared = RemoteRegion.from_wire(message["region"])
        left.link.write(Lane.DECODE, shared, 0, [b"left"], 1)
        other_left.write(4, b"other", 2)
        await right.until_arrived(1)
        await other_right.until_arrived(1)
        assert bytes(other_right.memory[:9]) == b"leftother"

        left.link.abort("only this one")
        await right.until_lost()
        other_left.write(0, b"LEFT", 3)
        await other_right.until_arrived(2)

        assert bytes(other_right.memory[:9]) == b"LEFTother"


async def check_region_outlives_the_link(make_pair: MakePair) -> None:
    """The bytes of a write stay readable after the link, and through a view even after the region."""
    async with two_ends(make_pair) as (left, right):
        left.write(0, b"still here", 1)
        await right.until_arrived(1)
        await left.link.close()
        await right.until_lost()
        view = right.memory[:10]
        right.region.close()
        right.region.close()

        assert bytes(view) == b"still here"
        expect_error(TransportError, lambda: right.region.buffer)
