"""Modelled devices: what real ones promise, in the time that the model says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import UsageError
from lamina.runtime.spans import Place, Recorder, Span
from lamina.sim.device import ModelledDevice, ModelledWork
from lamina.sim.loop import VirtualLoop


def test_an_operation_runs_at_its_start_and_its_result_comes_at_its_end(loop: VirtualLoop) -> None:
    """The function is called when the operation starts; the result, and how long it took, come when it is complete."""
    called: list[float] = []

    def head(x: int, y: int) -> int:
        called.append(loop.time())
        return x + y

    async def main() -> None:
        device = ModelledDevice(loop, {"head": 0.25})
        await asyncio.sleep(1)
        assert await device.run(head, 1, 2) == (3, 0.25)
        assert called == [1.0]
        assert loop.time() == 1.25
        assert device.busy_s == 0.25
        assert device.torch_device == torch.device("cpu")

    loop.run_until_complete(main())


def test_operations_say_themselves_how_long_they_take(loop: VirtualLoop) -> None:
    """In parts, each of them for itself: nothing is left over from one that failed."""
    work = ModelledWork()

    def attend(*seconds: float) -> None:
        for each in seconds:
            work.add(each)
        if not sum(seconds) % 1:
            raise ArithmeticError

    async def main() -> None:
        device = ModelledDevice(loop, work)
        with pytest.raises(ArithmeticError):
            await device.run(attend, 1.5, 0.5)
        assert loop.time() == 2
        assert await device.run(attend, 0.25, 0.125) == (None, 0.375)
        assert device.busy_s == loop.time() == 2.375

    loop.run_until_complete(main())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4), st.booleans()), max_size=12))
def test_operations_run_one_after_the_other_in_the_order_of_asking(work: list[tuple[int, int, bool]]) -> None:
    """Whatever is asked for when, takes how long and fails: one at a time, first come first served, no idle time."""
    loop = VirtualLoop()
    work = sorted(work, key=lambda each: each[0])
    device = ModelledDevice(loop, lambda name, at: float(work[at.batch][1]))  # type: ignore[union-attr]
    ran: list[tuple[int, float]] = []
    ended: dict[int, float] = {}

    def operation(number: int, fails: bool) -> int:
        ran.append((number, loop.time()))
        if fails:
            raise ArithmeticError(number)
        return number

    async def ask(number: int, when: int, seconds: int, fails: bool) -> None:
        await asyncio.sleep(when - loop.time())
        if fails:
            with pytest.raises(ArithmeticError, match=f"^{number}$"):
                await device.run(operation, number, fails, at=Place(number))
        else:
            assert await device.run(operation, number, fails, at=Place(number)) == (number, seconds)
        ended[number] = loop.time()

    async def main() -> None:
        await asyncio.gather(*(ask(number, *each) for number, each in enumerate(work)))

    loop.run_until_complete(main())
    loop.close()
    free = 0.0
    expected = []
    for number, (when, seconds, _) in enumerate(work):
        start = max(free, float(when))
        expected.append((number, start))
        free = start + seconds
        assert ended[number] == free
    assert ran == expected
    assert device.busy_s == sum(seconds for _, seconds, _ in work)


def test_an_operation_of_no_time_does_not_suspend(loop: VirtualLoop) -> None:
    """On an idle device it is complete before anything else runs; on a busy one it waits for its turn."""

    def instant() -> None:
        return None

    def slow() -> None:
        return None

    async def main() -> None:
        device = ModelledDevice(loop, {"instant": 0.0, "slow": 1.0})
        others: list[str] = []
        loop.call_soon(others.append, "another callback")
        assert await device.run(instant) == (None, 0.0)
        assert not others
        busy = asyncio.create_task(device.run(slow))
        await asyncio.sleep(0)
        assert await device.run(instant) == (None, 0.0)
        assert loop.time() == 1
        await busy

    loop.run_until_complete(main())


@pytest.mark.parametrize("cancelled", range(3))
def test_cancellation_frees_the_device(loop: VirtualLoop, cancelled: int) -> None:
    """What has not started is left out; what has started keeps the device to its end, and no longer."""
    ran: list[int] = []

    async def main() -> None:
        device = ModelledDevice(loop, {"append": 1.0})
        tasks = [asyncio.create_task(device.run(ran.append, number)) for number in range(3)]
        await asyncio.sleep(0.5)
        tasks[cancelled].cancel()
        await asyncio.wait(tasks)
        await device.run(ran.append, 3)

        assert ran == [number for number in range(4) if number != cancelled or number == 0]
        assert loop.time() == device.busy_s == (4.0 if cancelled == 0 else 3.0)

    loop.run_until_complete(main())


def test_all_may_be_cancelled(loop: VirtualLoop) -> None:
    """The device whose operations were given up is as good as new."""

    async def main() -> None:
        device = ModelledDevice(loop, {"len": 1.0})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await asyncio.gather(*(device.run(len, "") for _ in range(5)))
        assert loop.time() == 1.5
        await device.run(len, "")
        assert loop.time() == 3

    loop.run_until_complete(main())


def test_spans_are_recorded(loop: VirtualLoop) -> None:
    """Name, place, start and end of each operation, in virtual time."""

    async def main() -> None:
        device = ModelledDevice(loop, {"max": 0.5, "min": 0.0})
        device.recorder = Recorder()
        await device.run(max, 1, 2, at=Place(3, 4))
        await device.run(min, 1, 2)
        assert list(device.recorder) == [Span("max", 3, 4, 0.0, 0.5), Span("min", -1, -1, 0.5, 0.5)]

    loop.run_until_complete(main())


@pytest.mark.parametrize("seconds", [{"other": 1.0}, {"len": -1.0}, {"len": float("inf")}, {"len": float("nan")}])
def test_what_the_model_cannot_say_is_an_error(loop: VirtualLoop, seconds: Mapping[str, float]) -> None:
    """An operation without seconds, or with impossible ones, fails; the device goes on."""

    async def main() -> None:
        device = ModelledDevice(loop, seconds, name="c0")
        for _ in range(2):
            with pytest.raises(UsageError, match="device c0: "):
                await device.run(len, "")

    loop.run_until_complete(main())


def test_speed(loop: VirtualLoop) -> None:
    """Says how fast operations are; no number is demanded, as machines and their load differ."""
    count = 10_000

    async def main() -> None:
        device = ModelledDevice(loop, {"len": 1e-6})
        for _ in range(count):
            await device.run(len, "")

    started = time.perf_counter()
    loop.run_until_complete(main())
    print(f"{count / (time.perf_counter() - started):,.0f} operations a second")  # noqa: T201
