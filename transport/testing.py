"""Checks that every transport passes: the promises of ``Link``, one coroutine each.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        asyncio.run(check(make_pair))

``make_pair`` makes two fresh links, the two ends of one connection, on which no callback is set yet.
"""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from lamina.errors import ConfigError, LaminaError, PeerLostError, ProtocolError, TransportError
from lamina.transport.base import MAX_REGIONS, MAX_TAG, Lane, Link, Region, RemoteRegion
from lamina.transport.lanes import CHUNK_BYTES
from lamina.transport.messages import MAX_MESSAGE

MakePair = Callable[[], Awaitable[tuple[Link, Link]]]
Check = Callable[[MakePair], Awaitable[None]]

CHECK_TIMEOUT_S = 30.0
MIB = 1 << 20


class End:
    """One end of a link and a region that the other end may write; records what arrives, in order."""

    def __init__(self, link: Link, region: Region) -> None:
        self.link = link
        self.region = region
        self.remote = RemoteRegion(0, "not described yet", 1)
        self.arrived: list[tuple[Lane, int] | dict[str, Any]] = []
        self.lost: list[TransportError] = []
        self._changed = asyncio.Event()
        link.on_tag = lambda lane, tag: self.record((lane, tag))
        link.on_message = self.record
        link.on_lost = self._lose

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
        """What arrived on ``lane``."""
        return [entry[1] for entry in self.arrived if not isinstance(entry, dict) and entry[0] is lane]

    def record(self, entry: tuple[Lane, int] | dict[str, Any]) -> None:
        """What callbacks of a check's own call too."""
        self.arrived.append(entry)
        self._changed.set()

    def _lose(self, error: TransportError) -> None:
        self.lost.append(error)
        self._changed.set()


@asynccontextmanager
async def two_ends(make_pair: MakePair, nbytes: int = MIB) -> AsyncIterator[tuple[End, End]]:
    """Two ends that exposed a region of ``nbytes`` each and described it to the other, as nodes do at set-up."""
    links = await make_pair()
    left, right = (End(link, Region(name, nbytes)) for link, name in zip(links, ("left", "right"), strict=True))
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            left.remote = await announce(right.link, right.region, left)
            right.remote = await announce(left.link, left.region, right)
            yield left, right
    finally:
        for end in (left, right):
            end.link.abort("the check is over")
            end.region.close()


async def announce(link: Link, region: Region, other: End) -> RemoteRegion:
    """Expose ``region`` to ``other``, which has nothing else to hear; returns what that was told."""
    before = len(other.arrived)
    link.send({"region": link.expose(region)})
    await other.until_arrived(before + 1)
    message = other.arrived.pop()
    assert isinstance(message, dict)
    return RemoteRegion.from_wire(message["region"])


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Reproducible bytes in which every displacement shows."""
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(nbytes)


def expect_error(kind: type[LaminaError], action: Callable[[], object]) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


# -- writes and messages


async def check_bytes_are_there_when_the_tag_is(make_pair: MakePair) -> None:
    """Whatever the size and the lane, at the moment of the tag all bytes are in their place, the others untouched."""
    sizes = (1, 2, 31, 32, 33, 4095, 4096, 8192, 100_000, CHUNK_BYTES, CHUNK_BYTES + 1, 500_001)
    async with two_ends(make_pair, nbytes=4 * MIB) as (left, right):
        data = noise(2 * sum(sizes))
        parts = [slice(sum((2 * sizes)[:i]), sum((2 * sizes)[: i + 1])) for i in range(2 * len(sizes))]
        seen: dict[int, bytes] = {}

        def look(lane: Lane, tag: int) -> None:
            seen[tag] = bytes(right.memory[parts[tag]])
            right.record((lane, tag))

        right.link.on_tag = look
        for tag, part in enumerate(parts):
            left.write(part.start, data[part], tag, Lane(tag // len(sizes)))
        await right.until_arrived(len(parts))

        assert seen == {tag: data[part] for tag, part in enumerate(parts)}
        assert not any(right.memory[len(data) :])


async def check_write_up_to_the_last_byte(make_pair: MakePair) -> None:
    """A write may fill the region, or end exactly with it."""
    async with two_ends(make_pair, nbytes=5000) as (left, right):
        data = noise(5000)
        left.write(0, data, 0)
        left.write(4999, b"!", MAX_TAG)
        await right.until_arrived(2)

        assert right.arrived == [(Lane.DECODE, 0), (Lane.DECODE, MAX_TAG)]
        assert bytes(right.memory) == data[:-1] + b"!"


async def check_scattered_buffers(make_pair: MakePair) -> None:
    """Buffers of any number, size and item format arrive one after the other, empty ones among them."""
    async with two_ends(make_pair) as (left, right):
        data = noise(3000)
        pieces: list[bytes | bytearray | memoryview] = [data[i : i + 1] for i in range(2500)]
        pieces += [b"", memoryview(data)[2500:2504].cast("I"), bytearray(), memoryview(bytearray(data[2504:]))]
        left.link.write(Lane.DECODE, left.remote, 7, pieces, 1)
        await right.until_arrived(1)

        assert bytes(right.memory[:3008]) == bytes(7) + data + b"\0"


async def check_scattered_over_many_pages(make_pair: MakePair) -> None:
    """So do more buffers than any system call or queue takes at once, on both lanes, from several memories."""
    async with two_ends(make_pair, nbytes=8 * MIB) as (left, right):
        data = noise(3 * MIB)
        left.memory[: len(data)] = data
        mixed = bytearray(data)
        sources = [memoryview(data), memoryview(mixed), left.memory]
        cuts = list(range(0, len(data), 1021))
        pieces = [sources[cut % 3][cut : cut + 1021] for cut in cuts if cut < len(data)]
        for lane in Lane:
            left.link.write(lane, left.remote, 4 * MIB * lane + 1, pieces, lane)
        await right.until_arrived(2)

        for lane in Lane:
            start = 4 * MIB * lane
            assert bytes(right.memory[start : start + 4 * MIB]) == b"\0" + data + bytes(MIB - 1)


async def check_tag_alone(make_pair: MakePair) -> None:
    """A write of no bytes delivers its tag, in order with other writes, even at the end of the region."""
    async with two_ends(make_pair) as (left, right):
        left.link.write(Lane.DECODE, left.remote, 0, [], 1)
        left.write(0, b"x", 2)
        left.link.write(Lane.DECODE, left.remote, left.remote.nbytes, [b""], 3)
        await right.until_arrived(3)

        assert right.arrived == [(Lane.DECODE, tag) for tag in (1, 2, 3)]


async def check_order_within_each_lane(make_pair: MakePair) -> None:
    """Each lane is ordered in itself, whatever the other one does."""
    async with two_ends(make_pair) as (left, right):
        data = noise(20_000)
        for tag in range(200):
            left.write(0, data[: 100 * tag], tag, Lane(tag % 2))
        await right.until_arrived(200)

        for lane in Lane:
            assert right.tags(lane) == list(range(lane, 200, 2))


async def check_many_tags(make_pair: MakePair) -> None:
    """Ten thousand small writes arrive: none is lost, none twice."""
    async with two_ends(make_pair) as (left, right):
        for tag in range(10_000):
            left.write(8 * tag, tag.to_bytes(8, "little"), tag)
        await right.until_arrived(10_000)

        assert right.arrived == [(Lane.DECODE, tag) for tag in range(10_000)]
        assert bytes(right.memory[:80_000]) == b"".join(tag.to_bytes(8, "little") for tag in range(10_000))


async def check_large_writes(make_pair: MakePair) -> None:
    """64 MiB pass in pieces of 16, and ``drain`` waits until the network has them."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.memory[:] = noise(MIB) * 64
        for piece in range(4):
            part = slice(piece * 16 * MIB, (piece + 1) * 16 * MIB)
            left.write(part.start, left.memory[part], piece, Lane.BULK)
        await left.link.drain(Lane.BULK)
        assert left.link.pending_bytes == 0
        await right.until_arrived(4)

        assert right.arrived == [(Lane.BULK, piece) for piece in range(4)]
        assert bytes(right.memory) == bytes(left.memory)
        assert left.link.bytes_written[Lane.BULK] == right.link.bytes_received[Lane.BULK] >= 64 * MIB


async def check_both_directions_at_once(make_pair: MakePair) -> None:
    """Both ends write more than any buffer holds before either reads."""
    async with two_ends(make_pair, nbytes=16 * MIB) as (left, right):
        outgoing = [noise(MIB, seed) * 16 for seed in (1, 2)]
        for lane in Lane:
            for end, data in zip((left, right), outgoing, strict=True):
                half = slice(lane * 8 * MIB, (lane + 1) * 8 * MIB)
                end.write(half.start, data[half], lane, lane)
        await left.until_arrived(2)
        await right.until_arrived(2)

        assert [bytes(left.memory), bytes(right.memory)] == outgoing[::-1]


async def check_messages_keep_their_order(make_pair: MakePair) -> None:
    """Messages arrive as they were sent and in their order, whatever is written meanwhile."""
    async with two_ends(make_pair) as (left, right):
        data = noise(200_000)
        sent = [{"i": i, "nested": {"list": [1, 2.5, None, True, "text", data[:i]]}} for i in range(50)]
        for i, message in enumerate(sent):
            left.write(0, data[: 4000 * i], i)
            left.link.send(message)
        await right.until_arrived(100)

        assert [entry for entry in right.arrived if isinstance(entry, dict)] == sent
        assert [entry for entry in right.arrived if not isinstance(entry, dict)] == [
            (Lane.DECODE, i) for i in range(50)
        ]


async def check_message_limit(make_pair: MakePair) -> None:
    """A message of MAX_MESSAGE bytes passes; a longer one, or one that is not plain, is refused by the sender."""
    async with two_ends(make_pair) as (left, right):
        overhead = 1 + 2 + 5  # a map of one entry, its key, the head of a long byte string
        largest = {"x": bytes(MAX_MESSAGE - overhead)}
        expect_error(ProtocolError, lambda: left.link.send({"x": bytes(MAX_MESSAGE - overhead + 1)}))
        expect_error(ProtocolError, lambda: left.link.send({"x": object()}))
        left.link.send(largest)
        await right.until_arrived(1)

        assert right.arrived == [largest]


async def check_bulk_does_not_hold_up_decode(make_pair: MakePair) -> None:
    """While 64 MiB of bulk flow, decode writes go to and fro; few chunks pass between an answer and the next."""
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

        right.link.on_tag = answer
        left.link.on_tag = ask
        for chunk in range(chunks):
            for end in (left, right):
                end.write(end.remote.nbytes - CHUNK_BYTES, end.memory[:CHUNK_BYTES], chunk, Lane.BULK)
        left.write(0, b"question", 0)
        await left.until_arrived(chunks)
        await right.until_arrived(chunks)
        done = True

        steps = sorted(after - before for before, after in zip([0, *passed], [*passed, 2 * chunks], strict=True))
        # Each of the two writes may meet a chunk in the hands of its sender and one in those of its receiver, in both
        # directions of bulk. Now and then a busy machine, or a device that tells late, holds up somebody for longer.
        assert steps[len(steps) * 3 // 4] <= 8, steps
        assert steps[-1] <= chunks, steps


async def check_decode_overtakes_bulk(make_pair: MakePair) -> None:
    """While a single bulk write of 64 MiB flows, decode writes go to and fro many times."""
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

        left.link.on_tag, right.link.on_tag = ask, answer
        left.write(0, left.memory, 0, Lane.BULK)
        left.write(0, b"question", 1)
        await right.until_arrived(1)

        assert answers >= 32, answers


async def check_back_pressure(make_pair: MakePair) -> None:
    """For a peer that does not read, writes wait in the queue, which holds no copy of them; none is lost."""
    count, nbytes = 5000, 8192
    source = noise(2 * nbytes)
    part = [memoryview(source)[i % nbytes :][:nbytes] for i in range(count)]
    left_link, right_link = await make_pair()
    region = Region("right", count * nbytes)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            left = End(left_link, Region("left", 1))
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

            right = End(right_link, region)
            await right.until_arrived(count)
            for lane in Lane:
                await left_link.drain(lane)
                assert right.tags(lane) == list(range(lane, count, 2))
            assert left_link.pending_bytes == 0
            assert bytes(right.memory) == b"".join(part)
    finally:
        left_link.abort("the check is over")
        right_link.abort("the check is over")


async def _settled(link: Link) -> int:
    """``pending_bytes``, when the medium takes no more."""
    before = -1
    while (pending := link.pending_bytes) != before:
        before = pending
        await asyncio.sleep(0.05)
    return pending


async def check_drained_buffers_are_free(make_pair: MakePair) -> None:
    """When ``drain`` has returned, the memory that was written from may be changed: the peer gets what was there."""
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
            await left.link.drain(lane)
            source[:] = bytes(size)
            expected.append(content + bytes(size - len(content)))
        await right.until_arrived(36)

        assert bytes(right.memory) == b"".join(expected)


async def check_out_of_range_is_refused_here(make_pair: MakePair) -> None:
    """A write that cannot be right raises at the sender; nothing is sent and the link lives on."""
    async with two_ends(make_pair, nbytes=4096) as (left, right):
        size = left.remote.nbytes
        for offset, nbytes, tag in (
            (0, size + 1, 0),
            (size, 1, 0),
            (-1, 1, 0),
            (2**64, 1, 0),
            (0, 1, -1),
            (0, 1, 2**32),
        ):
            expect_error(ProtocolError, lambda o=offset, n=nbytes, t=tag: left.write(o, bytes(n), t))  # type: ignore[misc]
        gaps = memoryview(bytes(100))[::2]
        expect_error(ProtocolError, lambda: left.link.write(Lane.DECODE, left.remote, 0, [gaps], 0))
        left.write(0, b"fine", 1)
        await right.until_arrived(1)

        assert right.arrived == [(Lane.DECODE, 1)]


async def check_poll_delivers_without_the_loop(make_pair: MakePair) -> None:
    """``poll`` receives and delivers while the loop has no chance to."""
    async with two_ends(make_pair) as (left, right):
        await asyncio.sleep(0)
        assert not right.link.poll()
        left.write(0, b"data", 1)
        give_up = asyncio.get_running_loop().time() + CHECK_TIMEOUT_S
        while not right.arrived and asyncio.get_running_loop().time() < give_up:
            right.link.poll()

        assert right.arrived == [(Lane.DECODE, 1)]
        assert bytes(right.memory[:4]) == b"data"


async def check_poll_within_a_callback(make_pair: MakePair) -> None:
    """A callback may ``poll``: what this delivers comes in its order, and nothing is lost or comes twice."""
    async with two_ends(make_pair) as (left, right):
        tags = []
        depth = 0

        def deeper(lane: Lane, tag: int) -> None:
            nonlocal depth
            tags.append(tag)
            depth += 1
            if depth < 5:
                right.link.poll()
            depth -= 1
            right.record((lane, tag))

        right.link.on_tag = deeper
        for tag in range(1000):
            left.write(0, b"data", tag)
        await right.until_arrived(1000)

        assert tags == list(range(1000))


async def check_callbacks_may_write(make_pair: MakePair) -> None:
    """Ends that answer each other from within their callbacks do so for as long as they like."""
    async with two_ends(make_pair) as (left, right):

        def play(end: End) -> Callable[[Lane, int], None]:
            def hit(lane: Lane, tag: int) -> None:
                if tag < 1000:
                    end.write(tag, end.memory[tag : tag + 1], tag + 1, Lane(tag % 2))
                else:
                    end.record((lane, tag))

            return hit

        left.memory[0] = 7
        left.link.on_tag, right.link.on_tag = play(left), play(right)
        left.write(0, left.memory[:1], 0)
        await right.until_arrived(1)

        assert right.arrived == [(Lane.BULK, 1000)]


# -- regions


async def check_unknown_region_is_refused_here(make_pair: MakePair) -> None:
    """Nobody writes to a region that the peer did not expose, or not with this size; the link lives on."""
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
    """An end may expose MAX_REGIONS regions and no more; each is the one that was described."""
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
        window[100:104] = b"mine"  # it stays mapped for whoever still has it
        assert bytes(window[100:104]) == b"mine"


async def check_region_over_memory_from_elsewhere(make_pair: MakePair) -> None:
    """A region over memory from elsewhere is that memory, or is refused, and then nothing has changed."""
    async with two_ends(make_pair, nbytes=4096) as (left, right):
        memory = bytearray(10_000)
        region = Region.over("elsewhere", memoryview(memory)[1000:9000])
        remote = left.remote
        with suppress(ConfigError):
            remote = await announce(right.link, region, left)
        if remote is not left.remote:
            data = noise(8000)
            left.link.write(Lane.DECODE, remote, 0, [data], 1)
            left.link.write(Lane.BULK, remote, 8000, [], 2)
            await right.until_arrived(2)
            assert bytes(memory) == bytes(1000) + data + bytes(1000)
        another = await announce(right.link, Region("another", 10), left)
        left.link.write(Lane.DECODE, another, 0, [b"fine"], 3)
        await right.until(lambda: (Lane.DECODE, 3) in right.arrived)

        assert another.key == remote.key + 1


async def check_two_links_share_a_region(make_pair: MakePair) -> None:
    """One region may be written over several links, and the end of one of them does not concern the others."""
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
    """What was written stays readable after the link, and a view of it even after the region."""
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


# -- the end of a link


async def check_close_flushes(make_pair: MakePair) -> None:
    """``close`` sends everything queued on both lanes first; the peer gets it all, then learns of the end, once."""
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
        assert left.link.error is None
        assert not left.lost
        assert len(right.lost) == 1


async def check_close_while_the_peer_writes(make_pair: MakePair) -> None:
    """What this end wrote is complete, and closing it succeeds, although the peer had more to say than was heard."""
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

            assert left.link.error is None
            assert not left.lost
            assert right.tags(Lane.DECODE) == right.tags(Lane.BULK) == list(range(mine))
            assert {"i": mine - 1} in right.arrived
            assert bytes(right.memory) == data


async def check_close_twice(make_pair: MakePair) -> None:
    """Closing again, also at the same time, and aborting what is closed are fine."""
    async with two_ends(make_pair) as (left, right):
        await asyncio.gather(left.link.close(), left.link.close())
        await left.link.close()
        left.link.abort("too late")
        await right.until_lost()
        await right.link.close()

        assert left.link.closed
        assert left.link.error is None
        assert right.link.closed


async def check_both_close_at_once(make_pair: MakePair) -> None:
    """When both ends close, neither hears of a loss."""
    async with two_ends(make_pair) as (left, right):
        await asyncio.gather(left.link.close(), right.link.close())

        assert left.link.error is None
        assert right.link.error is None
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
        assert left.link.closed
        await right.until_lost()


async def check_nothing_goes_out_after_close(make_pair: MakePair) -> None:
    """After ``close`` every way to send raises."""
    async with two_ends(make_pair) as (left, _):
        await left.link.close()

        expect_error(TransportError, lambda: left.write(0, b"x", 1))
        expect_error(TransportError, lambda: left.link.send({}))
        expect_error(TransportError, lambda: left.link.expose(left.region))
        assert not left.link.poll()


async def check_abort_in_mid_write(make_pair: MakePair) -> None:
    """When the peer dies in the middle of a write its tag never comes; both sides are at their end at once."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 1, Lane.BULK)
        waiting = asyncio.create_task(left.link.drain(Lane.BULK))
        await asyncio.sleep(0)
        left.link.abort("dies here")
        error = await right.until_lost()
        await asyncio.wait([waiting])

        assert right.link.error is error
        assert right.arrived == []
        assert "dies here" in str(left.link.error)
        assert waiting.exception() is left.link.error
        assert not left.lost
        expect_error(type(error), lambda: right.write(0, b"x", 1))
        expect_error(TransportError, lambda: left.write(0, b"x", 1))


async def check_death_at_any_point(make_pair: MakePair) -> None:
    """Whenever an end dies: the other one heard of a beginning of what was written, complete, and then of the death."""
    size = 300_000
    data = noise(size)
    for rounds in range(16):
        async with two_ends(make_pair, nbytes=32 * size) as (left, right):
            damaged: list[tuple[Lane, int]] = []

            def look(lane: Lane, tag: int, right: End = right, damaged: list[tuple[Lane, int]] = damaged) -> None:
                if right.memory[(2 * tag + lane) * size :][:size] != data:
                    damaged.append((lane, tag))
                right.record((lane, tag))

            right.link.on_tag = look
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


async def check_loss_wakes_the_waiting(make_pair: MakePair) -> None:
    """``drain`` of a queue that the peer will never take raises what ``on_lost`` is told."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 1, Lane.BULK)
        waiting = asyncio.create_task(left.link.drain(Lane.BULK))
        await asyncio.sleep(0)
        right.link.abort("dies here")
        error = await left.until_lost()
        await asyncio.wait([waiting])

        assert waiting.exception() is error
        assert left.lost == [error]
        assert left.link.pending_bytes == 0


async def check_cancelled_drain_changes_nothing(make_pair: MakePair) -> None:
    """Giving up waiting for a queue does not disturb the queue, nor others who wait for it."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.write(0, left.memory, 1, Lane.BULK)
        impatient, patient = (asyncio.create_task(left.link.drain(Lane.BULK)) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        await patient
        await right.until_arrived(1)

        assert impatient.cancelled()
        assert right.arrived == [(Lane.BULK, 1)]


async def check_callback_may_end_the_link(make_pair: MakePair) -> None:
    """An owner may abort from within a callback, even with more already received; nothing more is delivered."""
    async with two_ends(make_pair) as (left, right):
        tags: list[int] = []

        def stop(lane: Lane, tag: int) -> None:
            tags.append(tag)
            right.link.abort("enough")

        right.link.on_tag = stop
        for tag in range(10):
            left.write(0, b"x", tag)
        await left.until_lost()

        assert tags == [0]
        assert not right.lost


async def check_failing_callback_ends_the_link(make_pair: MakePair) -> None:
    """A callback that raises ends the link, with its error as the cause; nobody is left waiting."""
    async with two_ends(make_pair) as (left, right):
        failure = RuntimeError("a bug in the owner")

        def fail(lane: Lane, tag: int) -> None:
            raise failure

        right.link.on_tag = fail
        left.write(0, b"x", 1)
        error = await right.until_lost()
        await left.until_lost()

        assert error.__cause__ is failure
        assert len(right.lost) == len(left.lost) == 1


# All of them: a check that was forgotten in a list would never fail.
CHECKS: tuple[Check, ...] = tuple(value for name, value in list(globals().items()) if name.startswith("check_"))
