from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from lamina.memory.fair_queue import FairQueue, Share
from lamina.runtime.cpu import CpuDevice
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = CpuDevice(threads=1)
    device.start()
    yield device
    device.close()


def run(device: Device, work: Coroutine[Any, Any, Any]) -> Any:
    """On the device's loop."""

    async def main() -> Any:
        return await Crossing(device.loop).start(work)

    return asyncio.run(main())


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


Served = list[tuple[Share, float]]
"""Which share computed, and for how many seconds, in order."""


async def keep(share: Share, seconds: float, times: int, served: Served) -> None:
    """One operation after the other."""
    for _ in range(times):
        served.append((share, (await share.run(spin, seconds))[1]))


@pytest.mark.parametrize(("many", "few"), [(8, 1), (3, 3)])
def test_more_work_gets_no_more_of_the_device(device: Device, many: int, few: int) -> None:
    """However many operations wait, and however long they take; at no moment is one ahead by more than one of each."""

    async def main() -> None:
        queue, served = FairQueue(device), Served()
        heavy, light = Share(queue), Share(queue)
        tasks = [asyncio.ensure_future(keep(heavy, 0.004, 100, served)) for _ in range(many)]
        # Two at least, so that there is always one that waits.
        cheap = [asyncio.ensure_future(keep(light, 0.001, 120 // few, served)) for _ in range(few + 1)]
        await asyncio.wait(cheap, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks + cheap:
            task.cancel()
        await asyncio.gather(*tasks, *cheap, return_exceptions=True)
        ahead, worst = 0.0, 0.0
        for share, seconds in served:
            ahead += seconds if share is heavy else -seconds
            worst = max(worst, abs(ahead))
        longest = [max(seconds for share, seconds in served if share is each) for each in (heavy, light)]
        assert worst <= sum(longest) + 1e-9
        assert heavy.busy_s == pytest.approx(
            sum(seconds for share, seconds in served if share is heavy), abs=longest[0]
        )

    run(device, main())


def test_no_tenant_saves_up_time_by_being_idle(device: Device) -> None:
    """A tenant that comes after a long pause alternates with the other from the start."""

    async def main() -> None:
        queue, served = FairQueue(device), Served()
        busy, idle = Share(queue), Share(queue)
        await asyncio.gather(*[keep(busy, 0.002, 25, served) for _ in range(2)])
        contested = Served()
        works = [keep(share, 0.002, 20, contested) for share in (busy, idle) for _ in range(2)]
        await asyncio.gather(*works)
        ahead, worst = 0.0, 0.0
        for share, seconds in contested[:40]:
            ahead += seconds if share is idle else -seconds
            worst = max(worst, ahead)
        longest = max(seconds for _, seconds in contested)
        assert worst <= 2 * longest + 1e-9

    run(device, main())


def test_a_tenant_that_is_alone_computes_at_once(device: Device) -> None:
    """Before others join and after they have left, without a round of the loop."""

    async def main() -> None:
        queue = FairQueue(device)
        share, order = Share(queue), list[str]()
        for joined in (False, True, False):
            other = Share(queue) if joined else None
            asyncio.get_running_loop().call_soon(order.append, "round")
            await share.run(order.append, "computed")
            await asyncio.sleep(0)
            assert order == (["round", "computed"] if joined else ["computed", "round"])
            order.clear()
            if other:
                other.close()

    run(device, main())


def test_an_operation_that_is_cancelled_or_fails_holds_up_no_other(device: Device) -> None:
    """Cancelled while it waits, or raising when it runs: the others have their turns."""

    async def main() -> None:
        queue, done = FairQueue(device), list[int]()
        first, second = Share(queue), Share(queue)

        def fail() -> None:
            raise ValueError("wrong")

        tasks = [asyncio.ensure_future(first.run(done.append, number)) for number in range(10)]
        failing = asyncio.ensure_future(second.run(fail))
        await asyncio.sleep(0)
        for number in range(0, 10, 2):
            tasks[number].cancel()
        results = await asyncio.gather(*tasks, failing, second.run(done.append, 10), return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results[:10]] == [True, False] * 5
        assert isinstance(results[10], ValueError)
        assert sorted(done) == [1, 3, 5, 7, 9, 10]

    run(device, main())
