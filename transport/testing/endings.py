"""Checks of how a link ends: closed, aborted, or lost."""

from __future__ import annotations

import asyncio

from lamina.errors import PeerLostError, TransportError
from lamina.transport.base import Lane
from lamina.transport.testing.ends import (
    MIB,
    LinkEnd,
    MakePair,
    expect_error,
    noise,
    two_ends,
)


async def check_close_flushes(make_pair: MakePair) -> None:
    """``close`` sends what is queued on both lanes; the peer gets it all and then learns of the end, once."""
    async with two_ends(make_pair, nbytes=16 * MIB) as (left, right):
        data = noise(MIB) * 8
        for lane in Lane:
            left.write(lane * 8 * MIB, data, lane, lane)
        left.link.send({"last": True})
        await left.link.close()
        await right.until_lost()

        assert {"last": True} in right.arrived
        assert (Lane.DECODE, 0) in right.arrived
        assert (Lane.BULK, 1) in right.arrived
        assert bytes(right.memory) == data * 2
        assert left.link.state.error is None
        assert not left.lost
        assert len(right.lost) == 1


async def check_close_while_the_peer_writes(make_pair: MakePair) -> None:
    """``close`` succeeds, and what this end wrote arrives, although not all that the peer wrote has been read."""
    for mine, theirs in ((1, 4), (4, 4), (4, 1)):
        async with two_ends(make_pair, nbytes=16 * MIB) as (left, right):
            data = noise(MIB) * 16
            for i in range(theirs):
                for lane in Lane:
                    right.write(0, data, i, lane)
                    right.link.send({"i": i})
            for i in range(mine):
                for lane in Lane:
                    left.write(0, data, i, lane)
                left.link.send({"i": i})
            await asyncio.sleep(0)
            await left.link.close()
            await right.until_lost()

            assert left.link.state.error is None
            assert not left.lost
            assert right.tags(Lane.DECODE) == right.tags(Lane.BULK) == list(range(mine))
            assert {"i": mine - 1} in right.arrived
            assert bytes(right.memory) == data


async def check_close_twice(make_pair: MakePair) -> None:
    """A link may be closed twice, also at the same time, and aborted after that."""
    async with two_ends(make_pair) as (left, right):
        await asyncio.gather(left.link.close(), left.link.close())
        await left.link.close()
        left.link.abort("too late")
        await right.until_lost()
        await right.link.close()

        assert left.link.state.closed
        assert left.link.state.error is None
        assert right.link.state.closed


async def check_both_close_at_once(make_pair: MakePair) -> None:
    """When both ends close, neither is told of a loss."""
    async with two_ends(make_pair) as (left, right):
        await asyncio.gather(left.link.close(), right.link.close())

        assert left.link.state.error is None
        assert right.link.state.error is None
        assert left.lost == right.lost == []


async def check_cancelled_close_still_closes(make_pair: MakePair) -> None:
    """A ``close`` that is cancelled while it waits has closed the link when it returns."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 0, Lane.BULK)
        closing = asyncio.create_task(left.link.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])

        assert closing.cancelled()
        assert left.link.state.closed
        await right.until_lost()


async def check_nothing_goes_out_after_close(make_pair: MakePair) -> None:
    """After ``close`` every method that sends raises."""
    async with two_ends(make_pair) as (left, _):
        await left.link.close()

        expect_error(TransportError, lambda: left.write(0, b"x", 1))
        expect_error(TransportError, lambda: left.link.send({}))
        expect_error(TransportError, lambda: left.link.expose(left.region))


async def check_abort_in_mid_write(make_pair: MakePair) -> None:
    """When an end dies in the middle of a write, its tag never arrives, and both ends end at once."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 1, Lane.BULK)
        await asyncio.sleep(0)
        left.link.abort("dies here")
        error = await right.until_lost()

        assert right.link.state.error is error
        assert right.arrived == []
        assert "dies here" in str(left.link.state.error)
        assert not left.lost
        expect_error(type(error), lambda: right.write(0, b"x", 1))
        expect_error(TransportError, lambda: left.write(0, b"x", 1))


async def check_death_at_any_point(make_pair: MakePair) -> None:
    """Whenever an end dies, the other one receives complete writes, a prefix of all, and then learns of the death."""
    size = 300_000
    data = noise(size)
    for rounds in range(16):
        async with two_ends(make_pair, nbytes=32 * size) as (left, right):
            damaged: list[tuple[Lane, int]] = []

            def look(lane: Lane, tag: int, right: LinkEnd = right, damaged: list[tuple[Lane, int]] = damaged) -> None:
                if right.memory[(2 * tag + lane) * size :][:size] != data:
                    damaged.append((lane, tag))
                right.record((lane, tag))

            right.on_tag(look)
            for i in range(16):
                for lane in Lane:
                    left.write((2 * i + lane) * size, data, i, lane)
                left.link.send({"i": i})
            for _ in range(rounds):
                await asyncio.sleep(0)
            left.link.abort("dies here")
            error = await right.until_lost()

            assert isinstance(error, PeerLostError)
            assert not damaged
            for lane in Lane:
                assert right.tags(lane) == list(range(len(right.tags(lane))))
            messages = [entry for entry in right.arrived if isinstance(entry, dict)]
            assert messages == [{"i": i} for i in range(len(messages))]
            heard = len(right.arrived)
            await asyncio.sleep(0)
            assert len(right.lost) == 1
            assert len(right.arrived) == heard


async def check_loss_empties_the_queue(make_pair: MakePair) -> None:
    """When the peer is lost, nothing is pending any more, and ``state`` holds the error that ``on_lost`` is told."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 1, Lane.BULK)
        await asyncio.sleep(0)
        right.link.abort("dies here")
        error = await left.until_lost()

        assert left.lost == [error]
        assert left.link.state.closed
        assert left.link.state.error is error
        assert left.link.state.pending_bytes == 0
