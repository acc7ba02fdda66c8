"""Checks of writes and messages: bytes, tags, order and limits."""

from __future__ import annotations

from lamina.errors import ProtocolError
from lamina.transport.base import MAX_TAG, Lane
from lamina.transport.lanes import CHUNK_BYTES
from lamina.transport.messages import MAX_MESSAGE
from lamina.transport.testing.ends import (
    MIB,
    MakePair,
    expect_error,
    noise,
    two_ends,
    until_sent,
)


async def check_bytes_are_there_when_the_tag_is(make_pair: MakePair) -> None:
    """For any size and lane, all bytes are in place when the tag comes, and no other byte has changed."""
    sizes = (1, 2, 31, 32, 33, 4095, 4096, 8192, 100_000, CHUNK_BYTES, CHUNK_BYTES + 1, 500_001)
    async with two_ends(make_pair, nbytes=4 * MIB) as (left, right):
        data = noise(2 * sum(sizes))
        parts = [slice(sum((2 * sizes)[:i]), sum((2 * sizes)[: i + 1])) for i in range(2 * len(sizes))]
        seen: dict[int, bytes] = {}

        def look(lane: Lane, tag: int) -> None:
            seen[tag] = bytes(right.memory[parts[tag]])
            right.record((lane, tag))

        right.on_tag(look)
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
    """More buffers than a system call or queue takes at once arrive so too, on both lanes, from different memory."""
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
    """Each lane is ordered, whatever the other one carries."""
    async with two_ends(make_pair) as (left, right):
        data = noise(20_000)
        for tag in range(200):
            left.write(0, data[: 100 * tag], tag, Lane(tag % 2))
        await right.until_arrived(200)

        for lane in Lane:
            assert right.tags(lane) == list(range(lane, 200, 2))


async def check_many_tags(make_pair: MakePair) -> None:
    """Ten thousand small writes arrive: none is lost, and none comes twice."""
    async with two_ends(make_pair) as (left, right):
        for tag in range(10_000):
            left.write(8 * tag, tag.to_bytes(8, "little"), tag)
        await right.until_arrived(10_000)

        assert right.arrived == [(Lane.DECODE, tag) for tag in range(10_000)]
        assert bytes(right.memory[:80_000]) == b"".join(tag.to_bytes(8, "little") for tag in range(10_000))


async def check_large_writes(make_pair: MakePair) -> None:
    """64 MiB arrive in pieces of 16, and nothing is pending when the network has them."""
    async with two_ends(make_pair, nbytes=64 * MIB) as (left, right):
        left.memory[:] = noise(MIB) * 64
        for piece in range(4):
            part = slice(piece * 16 * MIB, (piece + 1) * 16 * MIB)
            left.write(part.start, left.memory[part], piece, Lane.BULK)
        await until_sent(left.link)
        await right.until_arrived(4)

        assert right.arrived == [(Lane.BULK, piece) for piece in range(4)]
        assert bytes(right.memory) == bytes(left.memory)
        assert left.link.state.bytes_written[Lane.BULK] == right.link.state.bytes_received[Lane.BULK] >= 64 * MIB


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
    """Messages arrive as they were sent and in order, whatever is written meanwhile."""
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
    """A message of MAX_MESSAGE bytes arrives; the sender refuses a longer one, and one that is not plain."""
    async with two_ends(make_pair) as (left, right):
        overhead = 1 + 2 + 5  # a map of one entry, its key, the head of a long byte string
        largest = {"x": bytes(MAX_MESSAGE - overhead)}
        expect_error(ProtocolError, lambda: left.link.send({"x": bytes(MAX_MESSAGE - overhead + 1)}))
        expect_error(ProtocolError, lambda: left.link.send({"x": object()}))
        left.link.send(largest)
        await right.until_arrived(1)

        assert right.arrived == [largest]


async def check_out_of_range_is_refused_here(make_pair: MakePair) -> None:
    """An impossible write raises at the sender; nothing is sent, and the link lives on."""
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
