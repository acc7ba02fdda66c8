"""Lanes that belong to the loop of another thread than their link."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lamina.errors import PeerLostError, TransportError, UsageError
from lamina.transport import Lane, Region, RemoteRegion
from lamina.transport.testing import until_sent

MIB = 1 << 20
TAGS = 5000


class Worker:
    """A thread with a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.Thread(target=loop.run_forever)
        self.thread.start()

    def do(self, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def job() -> Any:
            return function(*arguments)

        return await self.do(job())


@pytest.fixture(params=["asyncio", "uvloop"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    new = asyncio.new_event_loop if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    worker = Worker(new())
    yield worker
    worker.loop.call_soon_threadsafe(worker.loop.stop)
    worker.thread.join()
    worker.loop.close()


class End:
    """What an end sees, and in which thread."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.tags: list[tuple[Lane, int]] = []
        self.threads: set[int] = set()
        self.lost: asyncio.Future[TransportError] = asyncio.get_running_loop().create_future()
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.region = Region("memory", MIB)
        self.remote = RemoteRegion(0, "none yet", 1)

    def listen(self, **more: Any) -> None:
        callbacks = {"on_tag": self.on_tag, "on_message": self.messages.put_nowait, "on_lost": self.lost.set_result}
        self.link.deliver(**callbacks | more)

    def on_tag(self, lane: Lane, tag: int) -> None:
        self.threads.add(threading.get_ident())
        self.tags.append((lane, tag))

    async def until(self, count: int) -> None:
        while len(self.tags) < count:  # noqa: ASYNC110 - another thread counts
            await asyncio.sleep(0.001)


@asynccontextmanager
async def ends(make_pair: Any, worker: Worker) -> Any:
    """Two ends: the lanes of the first belong to the worker, those of the other to the link's own loop."""
    near, far = map(End, await make_pair())
    async with asyncio.timeout(60):
        near.listen(lane_loop=worker.loop)
        far.listen()
        for end, other in ((near, far), (far, near)):
            end.link.send({"region": end.link.expose(end.region)})
            other.remote = RemoteRegion.from_wire((await other.messages.get())["region"])
        try:
            yield near, far
            await asyncio.gather(near.link.close(), far.link.close())
        finally:
            near.link.abort("the test is over")
            far.link.abort("the test is over")


def test_tags_come_and_go_in_the_other_thread(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """In their order, none lost, while messages go both ways in the link's own."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):

            async def write() -> None:
                for tag in range(TAGS):
                    near.link.write(Lane.DECODE, near.remote, 0, [tag.to_bytes(4, "little")], tag)
                    if tag % 16 == 0:
                        await asyncio.sleep(0)
                await until_sent(near.link)

            writing = worker.do(write())
            for tag in range(TAGS):
                far.link.write(Lane.BULK, far.remote, 4096, [tag.to_bytes(4, "little")], tag)
                if tag % 16 == 0:
                    near.link.send({"at": tag})
                    await asyncio.sleep(0)
            await writing
            await asyncio.gather(near.until(TAGS), far.until(TAGS))

            assert near.tags == [(Lane.BULK, tag) for tag in range(TAGS)]
            assert far.tags == [(Lane.DECODE, tag) for tag in range(TAGS)]
            assert near.threads == {worker.thread.ident}
            assert far.threads == {threading.get_ident()}
            assert far.messages.qsize() == len(range(0, TAGS, 16))
            assert (
                bytes(far.region.buffer[:4]) == bytes(near.region.buffer[4096:4100]) == (TAGS - 1).to_bytes(4, "little")
            )

    run(main())


def test_a_busy_thread_is_no_dead_peer(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """A thread that computes for longer than ``peer_timeout`` finds everything when it looks again."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):
            for end in (near, far):
                end.listen(peer_timeout=0.5)
            begun, computing = threading.Event(), threading.Event()

            def compute() -> None:
                begun.set()
                computing.wait(3)

            worker.loop.call_soon_threadsafe(compute)
            while not begun.is_set():  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(0.001)
            for tag in range(100):
                far.link.write(Lane.DECODE, far.remote, 0, [b"data"], tag)
            await asyncio.sleep(1.5)
            assert near.tags == []
            assert not near.lost.done()
            assert not far.lost.done()
            computing.set()
            await near.until(100)

    run(main())


def test_close_sends_what_is_queued(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """``close`` waits for the lanes, and the other end has all tags before it learns of the end."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):
            data = bytes(MIB)

            def write() -> None:
                for tag in range(50):
                    near.link.write(Lane.BULK, near.remote, 0, [data], tag)

            await worker.call(write)
            await near.link.close()
            error = await far.lost
            assert isinstance(error, PeerLostError)
            assert [tag for _, tag in far.tags] == list(range(50))
            assert near.link.state.error is None

    run(main())


def test_the_end_is_told_in_the_own_thread(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """Of a callback that raises in the other thread too; from then on writes there raise the error."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):

            def refuse(lane: Lane, tag: int) -> None:
                raise ValueError("not this one")

            told: list[int] = []
            near.listen(
                on_tag=refuse,
                on_lost=lambda error: (told.append(threading.get_ident()), near.lost.set_result(error)),
            )
            far.link.write(Lane.DECODE, far.remote, 0, [], 7)
            error = await near.lost
            assert "not this one" in str(error)
            assert told == [threading.get_ident()]
            with pytest.raises(TransportError, match="not this one"):
                await worker.call(near.link.write, Lane.DECODE, near.remote, 0, [], 1)
            assert near.link.state.error is error
            await far.lost

    run(main())


def test_a_peer_that_goes_is_noticed(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """While the other thread has much to send."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):
            data = bytes(MIB)

            def write() -> None:
                for tag in range(200):
                    near.link.write(Lane.BULK, near.remote, 0, [data], tag)

            await worker.call(write)
            far.link.abort("the test wants it")
            await near.lost
            with pytest.raises(TransportError):
                await worker.call(near.link.write, Lane.BULK, near.remote, 0, [data], 1)

    run(main())


def test_too_late(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """Lanes that are in use stay where they are; the error says what to do, and the callbacks remain."""

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):
            with pytest.raises(UsageError, match="in the first call of deliver"):
                near.link.deliver(lane_loop=worker.loop)
            far.link.write(Lane.DECODE, far.remote, 0, [], 7)
            await near.until(1)
            assert near.threads == {worker.thread.ident}

    run(main())


def test_a_lane_outlives_a_long_operation(run: Callable[..., Any], make_pair: Any, worker: Worker) -> None:
    """Of the thread that should read it, while more is on its way than any buffer takes: the link's own loop answers
    heartbeats, so nobody is dead."""
    writes = 64

    async def main() -> None:
        async with ends(make_pair, worker) as (near, far):
            for end in (near, far):
                end.listen(peer_timeout=0.2)
            worker.loop.call_soon_threadsafe(time.sleep, 0.8)
            payload = bytes(MIB)
            for tag in range(writes):
                far.link.write(Lane.BULK, far.remote, 0, [payload], tag)
            await near.until(writes)
            assert near.tags == [(Lane.BULK, tag) for tag in range(writes)]
            assert not near.lost.done()
            assert not far.lost.done()

    run(main())
