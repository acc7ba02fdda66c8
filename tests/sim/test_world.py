"""A world is the same for one seed in every run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time

import pytest
import torch

from lamina.errors import DeadlockError
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from lamina.transport.testing import two_ends
from tests.sim import traffic
from tests.sim.traffic import JITTER, converse, pairs, trace_of


def test_one_seed_one_trace() -> None:
    """Two runs with one seed have the same trace, to the byte; another seed has another."""
    first, again, other = (trace_of(seed) for seed in (1, 1, 2))

    assert len(first) > 300
    assert first == again
    assert first != other


def test_without_chance_the_seed_does_not_matter() -> None:
    """The seed decides on jitter and on ``random``, and on nothing else."""

    async def exchange(world: World) -> None:
        async with two_ends(pairs(world.network), nbytes=100) as (left, right):
            left.write(0, b"x", 1)
            await right.until_arrived(1)

    traces = []
    for seed in (1, 2):
        with World(seed, model=LinkModel(latency_s=1e-4)) as world:
            world.run(exchange(world))
            traces.append(world.trace)
    assert traces[0] == traces[1]
    assert traces[0][-3:] == [
        "0.000500000 c0>m0#1 decode tag=1 bytes=1",
        "0.000500000 m0>c0#1 ended: the link to m0 (memory, tcp://m0:49152) was aborted: the check is over",
        "0.000500000 c0>m0#1 ended: the link to c0 (compute, sim://c0/1) was aborted: the check is over",
    ]


def test_other_processes_see_the_same_world() -> None:
    """Neither the hashes of strings nor addresses of objects, which differ from process to process, have any effect."""
    here = hashlib.sha256("\n".join(trace_of(5)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, traffic.__file__],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.strip() == here


def test_tracing_may_be_off() -> None:
    """Then nothing is kept, and all else happens as before."""
    with World(1, model=JITTER, tracing=False) as quiet, World(1, model=JITTER) as loud:
        for world in (quiet, loud):
            world.run(converse(world))
        assert quiet.trace == []
        assert quiet.loop.time() == loud.loop.time()


def test_a_world_goes_on_between_runs() -> None:
    """``run`` returns results and raises errors; clock and tasks stay for the next run; ``close`` cancels the rest."""
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e3)
        finally:
            ended.append("background")

    async def first() -> asyncio.Task[None]:
        await asyncio.sleep(1)
        return asyncio.create_task(background())

    async def second() -> None:
        await asyncio.sleep(1)
        raise KeyError("wrong")

    with World(0) as world:
        task = world.run(first())
        with pytest.raises(KeyError):
            world.run(second())
        assert world.loop.time() == 2
        assert not task.done()
    assert ended == ["background"]
    assert world.loop.is_closed()
    with World(0):
        pass


def test_operations_run_in_inference_mode() -> None:
    """As on the thread of a real device, and only while the world runs."""
    with World(0) as world:
        device = world.device("c0", {"is_inference_mode_enabled": 0.1})
        assert world.run(device.run(torch.is_inference_mode_enabled)) == (True, 0.1)
        assert not torch.is_inference_mode_enabled()
        assert world.trace == ["0.100000000 c0 is_inference_mode_enabled start=0.000000000"]


def test_a_hang_ends_a_run() -> None:
    """Waiting for what never comes is an error at once, and waiting with a periodic timer at the limit."""

    async def stuck() -> None:
        await asyncio.Event().wait()

    with World(0) as world, pytest.raises(DeadlockError):
        world.run(stuck())

    async def stuck_with_a_clock(world: World) -> None:
        def tick() -> None:
            world.loop.call_later(7, tick)

        tick()
        await asyncio.Event().wait()

    with World(0, limit_s=1000) as world, pytest.raises(DeadlockError, match="limit of 1000 s"):
        world.run(stuck_with_a_clock(world))


def test_speed() -> None:
    """Says how fast writes and messages are; no number is demanded, as machines and their load differ."""
    count = 10_000

    async def main(world: World) -> None:
        async with two_ends(pairs(world.network)) as (left, right):
            data = bytes(4096)
            right.on_tag(lambda lane, tag: right.write(0, data, tag))
            left.on_tag(lambda lane, tag: left.write(0, data, tag + 1) if tag < count else left.record((lane, tag)))
            started = time.perf_counter()
            left.write(0, data, 0)
            await left.until_arrived(1)
            writes = 2 * count / (time.perf_counter() - started)
            started = time.perf_counter()
            for number in range(count):
                left.link.send({"type": "Order", "number": number, "tokens": [number] * 8})
            await right.until_arrived(count)
            messages = count / (time.perf_counter() - started)
            print(f"{writes:,.0f} writes a second to and fro, {messages:,.0f} messages a second")  # noqa: T201

    with World(0, model=LinkModel(latency_s=1e-5, bytes_per_s=1e10), tracing=False) as world:
        world.run(main(world))
