"""The two ends of a measured link, each in its own process: ``python -m lamina.bench.ends '{"kind": "shm"}'``.

The program speaks the protocol of the yardsticks: a line of standard input asks for a measurement, and a line of
standard output answers it. The near end starts the far end and makes a new link for each measurement, so that no two
measurements use the same memory and neither end polls in between.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import uvloop

from lamina.bench.variants import Setting
from lamina.errors import TransportError
from lamina.transport import Address, Hello, Lane, Link, Listener, Options, Region, RemoteRegion, connect

LOCAL = Address.parse("127.0.0.1:0")
CONNECT_S = 10.0
MEASURE_S = 60.0
"""How long one measurement may take at most."""


class Task(msgspec.Struct, frozen=True):
    """What to measure, and for how long."""

    phase: str
    """``round_trip`` answers a write with as many bytes, ``bandwidth`` with an empty write."""
    size: int
    slots: int
    """The number of places at both ends, which the writes use in turn."""
    depth: int
    """The number of writes in flight at once."""
    seconds: float

    @property
    def lane(self) -> Lane:
        return Lane.DECODE if self.phase == "round_trip" else Lane.BULK

    @property
    def line(self) -> str:
        """The line that asks for this measurement."""
        return f"{self.phase} {self.size} {self.slots} {self.depth} {self.seconds:g}"

    @classmethod
    def read(cls, line: str) -> Task:
        phase, size, slots, depth, seconds = line.split()
        return cls(phase, int(size), int(slots), int(depth), float(seconds))


# -- the far end


class _Answers:
    """Answers each write, with as many bytes or with none."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._answer: list[memoryview] = []
        self._region: Region | None = None
        self._remote: RemoteRegion | None = None
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)

    def _on_message(self, message: dict[str, Any]) -> None:
        if "region" in message:
            self._remote = RemoteRegion.from_wire(message["region"])
            task = Task(**message["task"])
            self._region = Region("far", task.size * task.slots)
            self._answer = [self._region.buffer[: task.size]] if task.phase == "round_trip" else []
            self._link.send({"region": self._link.expose(self._region)})
        else:
            self._link.send({"cpu_s": time.process_time()})

    def _on_tag(self, lane: Lane, tag: int) -> None:
        assert self._remote is not None, "the near end writes only into an exposed region"
        self._link.write(lane, self._remote, 0, self._answer, tag)

    def _on_lost(self, error: TransportError) -> None:
        if self._region is not None:
            self._region.close()


async def _far(setting: Setting) -> None:
    """Listen, print the address, and answer until standard input ends."""
    setting.pin(1)

    def on_link(link: Link) -> None:
        _Answers(link)

    async with await Listener.open(LOCAL, Hello("bench", "far"), on_link, setting.options(1)) as listener:
        sys.stdout.write(f"{listener.address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


# -- the near end


class _LinkMeasurement:
    """The measurement of one task over one link."""

    def __init__(self, link: Link, task: Task, region: Region) -> None:
        self._link = link
        self._task = task
        self._region = region
        self._remote: RemoteRegion | None = None
        self._arrived: Callable[[], None] = lambda: None
        self._waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)

    async def run(self) -> dict[str, float]:
        task = self._task
        answer = await self._ask({"region": self._link.expose(self._region), "task": msgspec.structs.asdict(task)})
        self._remote = RemoteRegion.from_wire(answer["region"])
        await self._write_on(0.0)  # touches all memory
        far_before, near_before = (await self._ask({}))["cpu_s"], time.process_time()
        trips, seconds = await self._write_on(task.seconds)
        near, far = time.process_time() - near_before, (await self._ask({}))["cpu_s"] - far_before
        percentiles = statistics.quantiles(trips, n=100, method="inclusive")
        return {
            "p50_us": percentiles[49] * 1e6,
            "p99_us": percentiles[98] * 1e6,
            "gbps": len(trips) * task.size / seconds / 1e9,
            "cpu_write_us": near / len(trips) * 1e6,
            "cpu_arrival_us": far / len(trips) * 1e6,
        }

    async def _write_on(self, at_least_s: float) -> tuple[list[float], float]:
        """Write for a while, and return the seconds from each write to its answer and those of all writes together."""
        link, task, remote = self._link, self._task, self._remote
        assert remote is not None
        size, slots, lane, now = task.size, task.slots, task.lane, time.perf_counter
        sources = [(slot * size, [self._region.buffer[slot * size : (slot + 1) * size]]) for slot in range(slots)]
        least = 2 * slots + 16
        trips: list[float] = []
        under_way: deque[float] = deque()
        written = 0
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def write() -> None:
            nonlocal written
            offset, pieces = sources[written % slots]
            written += 1
            under_way.append(now())
            link.write(lane, remote, offset, pieces, 0)

        def arrived() -> None:
            at = now()
            trips.append(at - under_way.popleft())
            if at - started < at_least_s or written < least:
                write()
            elif not under_way:
                done.set_result(at - started)

        self._arrived, self._waiting = arrived, done
        started = now()
        for _ in range(task.depth):
            write()
        return trips, await done

    async def _ask(self, message: dict[str, Any]) -> Any:
        self._waiting = asyncio.get_running_loop().create_future()
        self._link.send(message)
        return await self._waiting

    def _on_tag(self, lane: Lane, tag: int) -> None:
        self._arrived()

    def _on_message(self, message: dict[str, Any]) -> None:
        self._waiting.set_result(message)

    def _on_lost(self, error: TransportError) -> None:
        if not self._waiting.done():
            self._waiting.set_exception(error)


async def measure(address: Address, options: Options, task: Task) -> dict[str, float]:
    """Make a link to the far end at ``address`` and measure ``task`` over it. TransportError or TimeoutError."""
    link = await connect(address, Hello("bench", "near"), options, deadline_s=CONNECT_S)
    region = Region("near", task.size * task.slots)
    try:
        async with link, asyncio.timeout(MEASURE_S):
            return await _LinkMeasurement(link, task, region).run()
    finally:
        region.close()


def _near(setting: Setting) -> None:
    setting.pin(0)
    command = [sys.executable, "-P", "-m", __spec__.name, "--far", msgspec.json.encode(setting).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as far:
        assert far.stdin
        assert far.stdout
        address = far.stdout.readline()
        for line in sys.stdin:
            try:
                result: dict[str, Any] = uvloop.run(
                    measure(Address.parse(address.strip()), setting.options(0), Task.read(line))
                )
            except (TransportError, TimeoutError) as error:
                result = {"error": str(error) or f"it took longer than {MEASURE_S:g} s"}
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
        far.stdin.close()


if __name__ == "__main__":
    chosen = msgspec.json.decode(sys.argv[-1], type=Setting)
    if "--far" in sys.argv:
        uvloop.run(_far(chosen))
    else:
        _near(chosen)
