"""What a node runs on: the way between its loops, its device, its mailboxes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator

import pytest

from lamina.runtime.cpu import CpuDevice
from lamina.runtime.crossing import Crossing
from lamina.runtime.loop import PreciseLoop
from lamina.runtime.mailbox import Mailbox
from lamina.runtime.workers import NICE, BackgroundWorkers, ParallelWorkers


@pytest.fixture(scope="module")
def device() -> Iterator[CpuDevice]:
    device = CpuDevice(threads=1)
    device.start()
    yield device
    device.close()


def test_what_crosses_arrives_in_its_order(device: CpuDevice) -> None:
    """Posts and calls, on the thread of the other loop; a coroutine begins there as well, but a little later."""
    there, seen = Crossing(device.loop), list[str]()

    async def coroutine(name: str) -> str:
        seen.append(name)
        return threading.current_thread().name

    def call(name: str) -> str:
        seen.append(name)
        return threading.current_thread().name

    async def main() -> set[str]:
        there.post(seen.append, "posted")
        called = there.call(call, "called")
        started = there.start(coroutine("started"))
        there.post(seen.append, "posted again")
        return {await called, await started}

    assert asyncio.run(main()) == {"device"}
    assert [what for what in seen if what != "started"] == ["posted", "called", "posted again"]
    assert "started" in seen


def test_a_call_that_is_cancelled_before_its_turn_is_left_out(device: CpuDevice) -> None:
    """While one that has begun comes to its end."""
    there, begun, go_on, called = Crossing(device.loop), threading.Event(), threading.Event(), list[int]()

    def work(number: int) -> None:
        begun.set()
        assert go_on.wait(5)
        called.append(number)

    async def main() -> None:
        first = there.call(work, 0)
        assert await asyncio.to_thread(begun.wait, 5)
        others = [there.call(work, number) for number in range(1, 6)]
        for cancelled in (first, *others[:4]):
            cancelled.cancel()
        go_on.set()
        await others[4]

    asyncio.run(main())
    assert called == [0, 5]


def test_errors_and_cancellation_cross_too(device: CpuDevice) -> None:
    """An error comes back to the caller; cancelling what was started cancels it there."""
    there, ended = Crossing(device.loop), threading.Event()

    def fail() -> None:
        raise ValueError("wrong")

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def main() -> None:
        with pytest.raises(ValueError, match="wrong"):
            await there.call(fail)
        waiting = there.start(wait())
        await there.call(lambda: None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    assert ended.wait(5)


def test_what_runs_to_its_end_is_over_when_its_caller_goes_on(device: CpuDevice) -> None:
    """A caller that is cancelled waits until the coroutine has cleaned up, or has not even begun."""
    there = Crossing(device.loop)

    async def clean_up(order: list[str]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)
            order.append("cleaned up")

    async def main(rounds: int) -> list[str]:
        order = list[str]()
        running = asyncio.ensure_future(there.run(clean_up(order)))
        await asyncio.sleep(0)
        for _ in range(rounds):
            await there.call(lambda: None)
        running.cancel()
        await asyncio.wait([running])
        order.append("went on")
        return order

    assert asyncio.run(main(3)) == ["cleaned up", "went on"]
    assert asyncio.run(main(0))[-1] == "went on"


def test_one_loop_may_be_both(device: CpuDevice) -> None:
    """A crossing to the caller's own loop works as any other, as the simulator needs."""

    async def main() -> list[int]:
        here, seen = Crossing(asyncio.get_running_loop()), list[int]()
        here.post(seen.append, 1)
        await here.call(seen.append, 2)
        await here.start(asyncio.sleep(0))
        return seen

    assert asyncio.run(main()) == [1, 2]


def test_a_device_tells_how_long_an_operation_took(device: CpuDevice) -> None:
    """The result, and the seconds until it was complete, which count as busy, also for one that fails."""
    there = Crossing(device.loop)

    def fail() -> None:
        time.sleep(0.02)
        raise ValueError("wrong")

    async def main() -> None:
        before_s = device.busy_s
        result, seconds = await there.start(device.run(lambda: time.sleep(0.05) or "done"))
        assert result == "done"
        assert 0.05 <= seconds < 1
        with pytest.raises(ValueError, match="wrong"):
            await there.start(device.run(fail))
        assert device.busy_s - before_s >= seconds + 0.02

    asyncio.run(main())


def test_the_loops_of_nodes_have_a_precise_clock() -> None:
    """It goes on within one callback, and timers keep to it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        times = [loop.time() for _ in range(100)]
        assert times == sorted(set(times))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.sleep(5)
        assert 0.045 < loop.time() - times[0] < 1

    with asyncio.Runner(loop_factory=PreciseLoop) as runner:
        runner.run(main())


def test_a_mailbox_keeps_its_order_and_outlives_a_reader() -> None:
    """Items wait for the reader or the reader for items; a reader that was cancelled takes none with it."""

    async def main() -> None:
        mailbox = Mailbox[int]()
        mailbox.put(1)
        mailbox.put(2)
        assert [await mailbox.get(), await mailbox.get()] == [1, 2]
        reader = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        mailbox.put(3)
        reader.cancel()
        await asyncio.wait([reader])
        mailbox.put(4)
        assert [await mailbox.get(), await mailbox.get()] == [3, 4]

    asyncio.run(main())


def test_what_takes_long_keeps_neither_the_loop_nor_short_work_waiting() -> None:
    """One long function at a time, each in a thread that gives way to the loop's; an error is the caller's."""
    go_on, begun = threading.Event(), list[int]()

    def long(number: int) -> int:
        begun.append(number)
        assert go_on.wait(5)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def main() -> None:
        workers = BackgroundWorkers()
        running = [asyncio.create_task(workers.run(long, number, long=True)) for number in range(3)]
        assert await workers.run(str, 1) == "1"
        with pytest.raises(ValueError, match="invalid literal"):
            await workers.run(int, "no number")
        assert begun == [0]
        running[1].cancel()  # a prompt whose client is gone is never encoded
        go_on.set()
        expected = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        assert await running[0] == await running[2] == expected
        assert begun == [0, 2]
        workers.close()

    asyncio.run(main())


def test_one_that_runs_on_keeps_its_thread() -> None:
    """Cancelling it does not stop it, so the next one waits all the same."""
    go_on, has_begun, begun = threading.Event(), threading.Event(), list[int]()

    def long(number: int) -> None:
        begun.append(number)
        has_begun.set()
        assert go_on.wait(5)

    async def main() -> None:
        workers = BackgroundWorkers()
        first = asyncio.create_task(workers.run(long, 0, long=True))
        await asyncio.to_thread(has_begun.wait, 5)
        first.cancel()
        second = asyncio.create_task(workers.run(long, 1, long=True))
        await asyncio.sleep(0.05)
        assert first.cancelled()
        assert begun == [0]
        go_on.set()
        await second
        workers.close()

    asyncio.run(main())


def test_parallel_work_is_told_of_while_some_of_it_takes_long() -> None:
    """Also when the same thread has gone on to what takes long."""
    go_on, ended = threading.Event(), list[int]()

    def work(number: int) -> None:
        if number >= 100:
            assert go_on.wait(5)
        ended.append(number)

    async def main() -> None:
        workers, told = ParallelWorkers(), asyncio.Event()
        jobs = workers.each(work, [*range(100), *range(100, 200)], told.set)
        while len(ended) < 100:
            told.clear()
            await asyncio.wait_for(told.wait(), 5)
        assert sorted(ended) == [*range(100)]
        assert not any(job.done() for job in jobs)
        go_on.set()
        await asyncio.gather(*jobs)
        assert sorted(ended) == [*range(200)]
        workers.close()

    asyncio.run(main())
