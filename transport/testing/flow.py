"""Checks of the flow of bytes: both lanes at once, a peer that does not read, and buffers that are free again."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable

from lamina.transport.base import Lane, Link, Region
from lamina.transport.lanes import CHUNK_BYTES
from lamina.transport.testing.ends import (
    CHECK_TIMEOUT_S,
    MIB,
    LinkEnd,
    MakePair,
    announce,
    noise,
    two_ends,
    until_sent,
)


async def check_bulk_does_not_hold_up_decode(make_pair: MakePair) -> None:
    """While 64 MiB of bulk flow, decode writes go back and forth, and few chunks pass between two answers."""
    chunks = 128
    async with two_ends(make_pair, nbytes=MIB) as (left, right):
        done = False
        passed: list[int] = []
        """Chunks of bulk that had arrived, at either end, when each answer came."""

        def count() -> int:
            return len(left.tags(Lane.BULK)) + len(right.tags(Lane.BULK))

        def answer(lane: Lane, tag: int) -> None:
            if lane is Lane.DECODE:
                right.write(0, b"answer", tag)
            else:
                right.record((lane, tag))

        def ask(lane: Lane, tag: int) -> None:
            if lane is Lane.BULK:
                left.record((lane, tag))
            elif not done:
                passed.append(count())
                left.write(0, b"question", tag + 1)

        right.on_tag(answer)
        left.on_tag(ask)
        for chunk in range(chunks):
            for end in (left, right):
                end.write(end.remote.nbytes - CHUNK_BYTES, end.memory[:CHUNK_BYTES], chunk, Lane.BULK)
        left.write(0, b"question", 0)
        await left.until_arrived(chunks)
        await right.until_arrived(chunks)
        done = True

        steps = sorted(after - before for before, after in zip([0, *passed], [*passed, 2 * chunks], strict=True))
        # Each of the two writes may meet a chunk in the hands of its sender and one in those of its receiver, in both
        # directions of bulk. Now and then a busy machine, or a device that reports late, delays a write for longer.
        assert steps[len(steps) * 3 // 4] <= 8, steps
        assert steps[-1] <= chunks, steps


async def check_decode_overtakes_bulk(make_pair: MakePair) -> None:
    """While a single bulk write of 64 MiB flows, decode writes go back and forth many times."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        answers = 0

        def ask(lane: Lane, tag: int) -> None:
            nonlocal answers
            answers += 1
            left.write(0, b"question", tag)

        def answer(lane: Lane, tag: int) -> None:
            if lane is Lane.DECODE and not right.arrived:
                right.write(0, b"answer", tag)
            elif lane is Lane.BULK:
                right.record((lane, tag))

        left.on_tag(ask)
        right.on_tag(answer)
        left.write(0, left.memory, 0, Lane.BULK)
        left.write(0, b"question", 1)
        await right.until_arrived(1)

        assert answers >= 32, answers


async def check_back_pressure(make_pair: MakePair) -> None:
    """Writes to a peer that does not read wait in the queue, without a copy, and none is lost."""
    count, nbytes = 5000, 8192
    source = noise(2 * nbytes)
    part = [memoryview(source)[i % nbytes :][:nbytes] for i in range(count)]
    left_link, right_link = await make_pair()
    region = Region("right", count * nbytes)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            left = LinkEnd(left_link, Region("left", 1))
            left.remote = await announce(right_link, region, left)
            waiting = []
            tracemalloc.start()
            try:
                for half in range(2):
                    for i in range(half * count // 2, (half + 1) * count // 2):
                        left.write(i * nbytes, part[i], i, Lane(i % 2))
                    waiting.append(await _settled(left_link))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert 0 < waiting[0] < waiting[1] <= count * (nbytes + 100)
            assert peak < waiting[1] / 4

            right = LinkEnd(right_link, region)
            await right.until_arrived(count)
            await until_sent(left_link)
            for lane in Lane:
                assert right.tags(lane) == list(range(lane, count, 2))
            assert bytes(right.memory) == b"".join(part)
    finally:
        left_link.abort("the check is over")
        right_link.abort("the check is over")


async def _settled(link: Link) -> int:
    """Wait until the medium takes no more; returns the pending bytes."""
    before = -1
    while (pending := link.state.pending_bytes) != before:
        before = pending
        await asyncio.sleep(0.05)
    return pending


async def check_buffers_are_free_when_nothing_is_pending(make_pair: MakePair) -> None:
    """When nothing is pending, the sources of writes may be changed, and the peer still gets what they held."""
    size = 2 * MIB
    async with two_ends(make_pair, nbytes=12 * size) as (left, right):
        elsewhere = bytearray(size)
        expected = []
        for turn in range(12):
            lane = Lane(turn % 2)
            source = left.memory[turn * size :][:size] if turn % 3 else memoryview(elsewhere)
            content = noise(1000, turn) * (size // 1000)
            for part in (slice(0, 7), slice(7, 5000), slice(5000, len(content))):
                source[part] = content[part]
                left.write(turn * size + part.start, source[part], turn, lane)
            await until_sent(left.link)
            source[:] = bytes(size)
            expected.append(content + bytes(size - len(content)))
        await right.until_arrived(36)

        assert bytes(right.memory) == b"".join(expected)


async def check_callbacks_may_write(make_pair: MakePair) -> None:
    """Two ends can answer each other from within their callbacks any number of times."""
    async with two_ends(make_pair) as (left, right):

        def play(end: LinkEnd) -> Callable[[Lane, int], None]:
            def hit(lane: Lane, tag: int) -> None:
                if tag < 1000:
                    end.write(tag, end.memory[tag : tag + 1], tag + 1, Lane(tag % 2))
                else:
                    end.record((lane, tag))

            return hit

        left.memory[0] = 7
        left.on_tag(play(left))
        right.on_tag(play(right))
        left.write(0, left.memory[:1], 0)
        await right.until_arrived(1)

        assert right.arrived == [(Lane.BULK, 1000)]
