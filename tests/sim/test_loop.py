"""The loop on a virtual clock."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import DeadlockError, LaminaError
from lamina.sim.loop import MANY_CANCELLED, VirtualLoop


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_timers_run_at_their_time_and_in_the_order_in_which_they_were_set(timers: list[tuple[int, bool]]) -> None:
    """Each timer that is not cancelled runs once, exactly at its time; timers of one moment keep their order."""
    loop = VirtualLoop()
    ran: list[tuple[float, int]] = []
    for number, (when, cancelled) in enumerate(timers):
        timer = loop.call_at(when, lambda n: ran.append((loop.time(), n)), number)
        if cancelled:
            timer.cancel()
    loop.call_at(6, loop.stop)
    loop.run_forever()
    loop.close()

    assert ran == sorted((float(when), n) for n, (when, cancelled) in enumerate(timers) if not cancelled)


def test_years_pass_at_once(loop: VirtualLoop) -> None:
    """Sleeping takes exactly its virtual time and no real time."""
    loop.limit_s = 1e9
    started = time.monotonic()

    async def main() -> float:
        await asyncio.sleep(0.1)
        await asyncio.sleep(1e8)
        return loop.time()

    assert loop.run_until_complete(main()) == 0.1 + 1e8
    assert time.monotonic() - started < 5


def test_a_timeout_is_exact(loop: VirtualLoop) -> None:
    """What takes as long as the timeout is cancelled at that moment; what is shorter by a nanosecond is not."""

    async def main() -> None:
        started = loop.time()
        async with asyncio.timeout(2.5):
            await asyncio.sleep(2.5 - 1e-9)
        assert loop.time() == started + 2.5 - 1e-9
        started = loop.time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        assert loop.time() == started + 2.5

    loop.run_until_complete(main())


def test_callbacks_take_no_virtual_time_and_keep_their_order(loop: VirtualLoop) -> None:
    """Ready callbacks run in their order at one moment, whichever way they were handed in."""
    ran: list[int] = []
    loop.call_soon(ran.append, 0)
    loop.call_soon_threadsafe(ran.append, 1)
    loop.call_later(0, ran.append, 2)
    loop.call_at(-1, ran.append, 3)
    loop.call_soon(ran.append, 4)
    loop.call_soon(loop.stop)
    loop.run_forever()

    assert ran == [0, 1, 2, 3, 4]
    assert loop.time() == 0


def test_a_cancelled_callback_does_not_run(loop: VirtualLoop) -> None:
    """A callback or a timer may be cancelled up to the moment at which it runs, also by one of the same moment."""
    ran: list[str] = []
    loop.call_soon(ran.append, "cancelled").cancel()
    later = loop.call_later(0, ran.append, "cancelled too")
    at: list[asyncio.TimerHandle] = []
    loop.call_at(1, lambda: at[0].cancel())
    at.append(loop.call_at(1, ran.append, "cancelled by the one before"))
    later.cancel()
    loop.call_at(1, loop.stop)
    loop.run_forever()

    assert ran == []


def test_cancelled_timers_are_let_go(loop: VirtualLoop) -> None:
    """Timeouts that never come true do not pile up."""

    async def main() -> None:
        for _ in range(10 * MANY_CANCELLED):
            async with asyncio.timeout(60):
                await asyncio.sleep(0)

    loop.run_until_complete(main())

    assert len(loop._timers) <= 2 * MANY_CANCELLED + 2


def test_a_hang_is_an_error_at_once(loop: VirtualLoop) -> None:
    """When tasks wait and nothing can wake them, the run fails and says which tasks wait, and where."""

    async def ask(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(asyncio.Event()), name="the patient one")
            await asyncio.sleep(1.5)

    with pytest.raises(DeadlockError) as caught:
        loop.run_until_complete(main())
    message = str(caught.value)
    assert isinstance(caught.value, LaminaError)
    assert "at 1.5 virtual seconds: 2 tasks wait" in message
    assert "the patient one (test_a_hang_is_an_error_at_once.<locals>.ask > Event.wait, locks.py:" in message
    assert ".main > TaskGroup.__aexit__" in message

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    loop.run_until_complete(end())  # the loop is still good for cleaning up


def test_periodic_timers_do_not_hide_a_hang(loop: VirtualLoop) -> None:
    """A run ends at its limit of virtual time, with the same error."""
    loop.limit_s = 100.0

    async def main() -> None:
        def tick() -> None:
            loop.call_later(1, tick)

        tick()
        await asyncio.Event().wait()

    task = loop.create_task(main())
    with pytest.raises(DeadlockError, match=r"the next timer, at 101 s, lies behind the limit of 100 s"):
        loop.run_until_complete(task)
    assert loop.time() == 100
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_sets_of_tasks_and_futures_have_the_order_of_their_making(loop: VirtualLoop) -> None:
    """Tasks of a group that fails are cancelled in one order, and sets of futures iterate in it."""
    ended: list[int] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def main() -> None:
        garbage = [bytearray(n) for n in range(100)]  # so that addresses do not happen to rise
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(wait(number))
                garbage.pop()
            await asyncio.sleep(1)
            raise RuntimeError("the end")

    with pytest.raises(ExceptionGroup):
        loop.run_until_complete(main())
    assert ended == list(range(50))
    futures = [loop.create_future() for _ in range(50)]
    assert [hash(future) for future in futures] == sorted(hash(future) for future in futures)
    assert {*futures} == set(futures)


def test_names_of_tasks_do_not_depend_on_what_ran_before() -> None:
    """The first task of a loop has the same name in every run."""

    async def name() -> str:
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    names = set()
    for _ in range(2):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            names.add(runner.run(name()))
    assert names == {"task 1"}


def test_work_for_threads_is_done_at_once(loop: VirtualLoop) -> None:
    """``asyncio.to_thread`` and futures of other threads work, in the one thread there is."""

    async def answer() -> int:
        return 42

    async def main() -> None:
        assert await asyncio.to_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 7, 0)
        assert await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(answer(), loop)) == 42

    loop.run_until_complete(main())


def test_an_exception_in_a_callback_does_not_stop_the_loop(loop: VirtualLoop) -> None:
    """It goes to the exception handler, as on every loop."""
    caught: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: caught.append(context["exception"]))
    loop.call_soon(divmod, 1, 0)
    loop.call_later(1, loop.stop)
    loop.run_forever()

    assert [type(error) for error in caught] == [ZeroDivisionError]


def test_debug_mode_works() -> None:
    """What asyncio checks in its debug mode does not disturb the loop."""

    async def main() -> None:
        await asyncio.gather(*(asyncio.sleep(seconds) for seconds in range(3)))

    with asyncio.Runner(loop_factory=VirtualLoop, debug=True) as runner:
        runner.run(main())
        assert runner.get_loop().time() == 2


def test_speed(loop: VirtualLoop) -> None:
    """Says how fast the loop is; no number is demanded, as machines and their load differ."""
    count = 50_000

    async def sleep() -> None:
        for _ in range(count // 100):
            await asyncio.sleep(1e-6)

    async def main() -> None:
        await asyncio.gather(*(sleep() for _ in range(100)))

    started = time.perf_counter()
    loop.run_until_complete(main())
    seconds = time.perf_counter() - started
    print(f"{count / seconds:,.0f} sleeps a second, each a timer and a step of a task")  # noqa: T201
