"""Checks of ``deliver``: which owner receives what arrives."""

from __future__ import annotations

import asyncio
from typing import Any

from lamina.errors import TransportError, UsageError
from lamina.transport.base import Lane, Link
from lamina.transport.testing.ends import (
    MakePair,
    expect_error,
    two_ends,
)


async def check_a_new_owner_gets_what_arrives(make_pair: MakePair) -> None:
    """A later ``deliver`` replaces all callbacks, and the link drops what arrives for one that is not given."""
    async with two_ends(make_pair) as (left, right):
        left.write(0, b"first", 1)
        await right.until_arrived(1)
        messages: list[dict[str, Any]] = []
        heard = asyncio.Event()

        def take(message: dict[str, Any]) -> None:
            messages.append(message)
            heard.set()

        right.link.deliver(on_message=take)
        left.write(0, b"second", 2)
        left.link.send({"third": 3})
        await heard.wait()
        await until_received(right.link, left.link)
        right.on_tag(lambda lane, tag: right.record((lane, tag)))
        left.write(0, b"fourth", 4)
        await right.until_arrived(2)

        assert messages == [{"third": 3}]
        assert right.arrived == [(Lane.DECODE, 1), (Lane.DECODE, 4)]
        assert bytes(right.memory[:6]) == b"fourth"


async def until_received(receiver: Link, sender: Link) -> None:
    """Wait until all bytes that ``sender`` wrote have arrived."""
    while receiver.state.bytes_received != sender.state.bytes_written:  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.001)


async def check_lane_loop_comes_first(make_pair: MakePair) -> None:
    """Once the link reads, its lanes stay in their loop: another one is refused, and the callbacks remain."""
    async with two_ends(make_pair) as (left, right):
        loop = asyncio.get_running_loop()
        expect_error(UsageError, lambda: right.link.deliver(lane_loop=loop))
        left.write(0, b"fine", 1)
        await right.until_arrived(1)

        assert right.arrived == [(Lane.DECODE, 1)]


async def check_a_late_owner_learns_of_the_loss(make_pair: MakePair) -> None:
    """The new owner of a lost link is told of the loss once, in the next round of the loop, not within ``deliver``."""
    async with two_ends(make_pair) as (left, right):
        left.link.abort("dies here")
        error = await right.until_lost()
        told: list[TransportError] = []
        replaced: list[TransportError] = []
        right.link.deliver(on_lost=replaced.append)
        right.link.deliver(on_lost=told.append)
        assert not told
        for _ in range(3):
            await asyncio.sleep(0)

        assert told == [error]
        assert not replaced
        assert right.lost == [error]


async def check_own_end_is_no_loss(make_pair: MakePair) -> None:
    """The new owner of a link that this end closed or aborted is told nothing."""
    for aborts in (False, True):
        async with two_ends(make_pair) as (left, right):
            if aborts:
                left.link.abort("enough")
            else:
                await left.link.close()
            told: list[TransportError] = []
            left.link.deliver(on_lost=told.append)
            await right.until_lost()
            await asyncio.sleep(0)

            assert not told
            assert not left.lost


async def check_callback_may_end_the_link(make_pair: MakePair) -> None:
    """An owner may abort within a callback, even when more has been received; nothing more is delivered."""
    async with two_ends(make_pair) as (left, right):
        tags: list[int] = []

        def stop(lane: Lane, tag: int) -> None:
            tags.append(tag)
            right.link.abort("enough")

        right.on_tag(stop)
        for tag in range(10):
            left.write(0, b"x", tag)
        await left.until_lost()

        assert tags == [0]
        assert not right.lost


async def check_failing_callback_ends_the_link(make_pair: MakePair) -> None:
    """A callback that raises ends the link with its error as the cause, and both ends are told."""
    async with two_ends(make_pair) as (left, right):
        failure = RuntimeError("a bug in the owner")

        def fail(lane: Lane, tag: int) -> None:
            raise failure

        right.on_tag(fail)
        left.write(0, b"x", 1)
        error = await right.until_lost()
        await left.until_lost()

        assert error.__cause__ is failure
        assert len(right.lost) == len(left.lost) == 1
