"""Links at full rate for as long as you like: ``python -m lamina.bench.soak --minutes 60``.

Two processes write to each other over one link after the other, in both directions and on both lanes at once, with
random sizes, and compare all bytes that arrive with those that were sent. All variants of transports take turns, and so
do the ways in which a link ends: either end closes or aborts it in the middle of the traffic. Neither process may leak
memory or file descriptors.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from lamina.bench.variants import VARIANTS, Setting, find, two_processors
from lamina.errors import LaminaError, ProtocolError, TransportError
from lamina.transport import Address, Hello, Lane, Link, Listener, Region, RemoteRegion, connect

LOCAL = Address.parse("127.0.0.1:0")
CONNECT_S = 10.0
LINK_S = 1.0
"""How long a link lives on average."""
END_S = 10.0
"""How long an end may take to notice that the link has ended."""
ENDINGS = ("near close", "far abort", "far close", "near abort")

SLOTS = 8
"""Writes in flight on each lane in each direction; each has its own place."""
MAX_BYTES = (64 << 10, 1 << 20)
"""The largest write of each lane, including its head."""
HEAD_BYTES = 8
STARTS = 1 << 16
"""The number of offsets in the pattern at which a write may start."""
ANSWER = 1 << 31
"""The bit that marks the tag of an empty write, which says that a place is free again."""

MAX_GROWTH_BYTES = 4 << 20
"""How much a process may grow from the second to the last quarter of its links, as allocators keep some memory."""
REPORT_S = 60.0


class SoakError(LaminaError):
    """A link failed, delivered wrong bytes, or leaked."""


class Footprint(msgspec.Struct, frozen=True):
    """What a process holds after a link has ended, and what it wrote over that link."""

    resident: int
    """Resident memory in bytes."""
    descriptors: int
    writes: int
    """The number of writes; each was answered, or in flight when the link ended."""
    nbytes: int


class Flood:
    """One end of a link, which writes as fast as the other end accepts it and compares what arrives."""

    def __init__(self, link: Link, pattern: bytes, source: Region) -> None:
        self._link = link
        self._pattern = pattern
        self._source = source
        self._random = random.Random()  # noqa: S311 - for sizes
        self._inbox = Region("inbox", SLOTS * sum(MAX_BYTES))
        self._remote: RemoteRegion | None = None
        self._owed: list[tuple[Lane, int]] = []
        """Writes to answer once the other end's region is known."""
        self._lost: asyncio.Future[TransportError] = asyncio.get_running_loop().create_future()
        self.writes = self.nbytes = 0
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._lost.set_result)
        link.send({"region": link.expose(self._inbox)})

    async def end(self, how: str, after_s: float) -> None:
        """``close`` or ``abort`` the link after ``after_s`` seconds, or ``wait`` for the other end to do so.

        SoakError if the link ended for another reason.
        """
        if how == "wait":
            after_s += END_S
        try:
            error = await asyncio.wait_for(asyncio.shield(self._lost), after_s)
        except TimeoutError:
            if how == "wait":
                raise SoakError(f"{self._link} did not end within {after_s:.1f} s") from None
            error = None
            if how == "abort":
                self._link.abort("as planned")
            else:
                await self._link.close()
                error = self._link.state.error
        if error is not None and (how != "wait" or isinstance(error, ProtocolError) or error.__cause__ is not None):
            raise SoakError(f"the {how} of a link over {self._link.info.transport}: {error}") from error
        self._inbox.close()

    def _on_message(self, message: dict[str, Any]) -> None:
        self._remote = RemoteRegion.from_wire(message["region"])
        for lane, slot in itertools.product(Lane, range(SLOTS)):
            self._write(lane, slot)
        for lane, slot in self._owed:
            self._answer(lane, slot)

    def _on_tag(self, lane: Lane, tag: int) -> None:
        if tag & ANSWER:
            self._write(lane, tag ^ ANSWER)
            return
        self._compare(lane, tag)
        if self._remote is None:
            self._owed.append((lane, tag))
        else:
            self._answer(lane, tag)

    def _write(self, lane: Lane, slot: int) -> None:
        """Write some bytes of the pattern in two pieces, behind a head with their number and start."""
        assert self._remote is not None
        most = MAX_BYTES[lane] - HEAD_BYTES
        nbytes = int(most ** self._random.random())
        start, cut = self._random.randrange(STARTS), self._random.randint(0, nbytes)
        head = (nbytes << 32 | start).to_bytes(HEAD_BYTES, "little")
        piece = self._source.buffer[start : start + nbytes]
        self._link.write(lane, self._remote, _place(lane, slot), [head, piece[:cut], piece[cut:]], slot)
        self.writes += 1
        self.nbytes += nbytes

    def _answer(self, lane: Lane, slot: int) -> None:
        assert self._remote is not None
        self._link.write(lane, self._remote, 0, [], slot | ANSWER)

    def _compare(self, lane: Lane, slot: int) -> None:
        place = _place(lane, slot)
        arrived = self._inbox.buffer[place : place + MAX_BYTES[lane]]
        head = int.from_bytes(arrived[:HEAD_BYTES], "little")
        nbytes, start = head >> 32, head & 0xFFFFFFFF
        if not self._pattern.startswith(arrived[HEAD_BYTES : HEAD_BYTES + nbytes], start):
            raise SoakError(f"a write of {nbytes} bytes on lane {lane.name} arrived with wrong bytes")


def _place(lane: Lane, slot: int) -> int:
    return slot * MAX_BYTES[lane] + (SLOTS * MAX_BYTES[Lane.DECODE] if lane is Lane.BULK else 0)


class _SoakEnd:
    """What a process keeps for all its links."""

    def __init__(self) -> None:
        self._pattern = random.Random(0).randbytes(MAX_BYTES[Lane.BULK] + STARTS)  # noqa: S311 - to compare with
        self._source = Region("pattern", len(self._pattern))
        self._source.buffer[:] = self._pattern

    async def flood(self, link: Link, how: str, after_s: float) -> Footprint:
        """Flood one link until it ends, and return the footprint. SoakError if something went wrong."""
        flood = Flood(link, self._pattern, self._source)
        await flood.end(how, after_s)
        return _footprint(flood)


def _footprint(flood: Flood) -> Footprint:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return Footprint(pages * resource.getpagesize(), descriptors, flood.writes, flood.nbytes)


# -- the far end


async def _far(settings: Sequence[Setting]) -> None:
    """Listen for each setting, and print the footprint after each link, until standard input ends."""
    settings[0].pin(1)
    end = _SoakEnd()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(link: Link) -> None:
        how, after_s = link.info.peer.details["far"], link.info.peer.details["after_s"]
        try:
            _tell(msgspec.to_builtins(await end.flood(link, how, after_s)))
        except SoakError as error:
            _tell({"error": str(error)})

    def on_link(link: Link) -> None:
        task = asyncio.ensure_future(serve(link))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async with AsyncExitStack() as stack:
        listeners = [await Listener.open(LOCAL, Hello("soak", "far"), on_link, each.options(1)) for each in settings]
        for listener in listeners:
            await stack.enter_async_context(listener)
        _tell([str(listener.address) for listener in listeners])
        await asyncio.to_thread(sys.stdin.read)


def _tell(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


# -- the near end


def soak(names: Sequence[str], settings: Sequence[Setting], seconds: float, link_s: float) -> dict[str, Any]:
    """Run the soak, and return how much was moved and the footprints. SoakError if something went wrong."""
    command = [sys.executable, "-P", "-m", "lamina.bench.soak", "--far", msgspec.json.encode(settings).decode()]
    settings[0].pin(0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as far:
        try:
            footprints = uvloop.run(_near(far, settings, seconds, link_s))
        finally:
            far.kill()
    sys.stderr.write(f"{', '.join(names)}: {_words(footprints)}\n")
    return check(footprints)


async def _near(
    far: subprocess.Popen[str], settings: Sequence[Setting], seconds: float, link_s: float
) -> list[tuple[Footprint, Footprint]]:
    assert far.stdout
    listen = far.stdout.readline
    places = [Address.parse(place) for place in json.loads(await asyncio.to_thread(listen))]
    end = _SoakEnd()
    footprints: list[tuple[Footprint, Footprint]] = []
    started = reported = time.monotonic()
    for (setting, place), (near_how, far_how) in zip(
        itertools.cycle(zip(settings, places, strict=True)), _endings(len(settings)), strict=False
    ):
        now = time.monotonic()
        if now - started >= seconds:
            break
        if now - reported >= REPORT_S:
            reported = now
            sys.stderr.write(f"{(now - started) / 60:.0f} minutes: {_words(footprints)}\n")
        after_s = random.uniform(0, 2 * link_s)  # noqa: S311
        hello = Hello("soak", "near", {"far": far_how, "after_s": after_s})
        link = await connect(place, hello, setting.options(0), deadline_s=CONNECT_S)
        own = await end.flood(link, near_how, after_s)
        answer = json.loads(await asyncio.to_thread(listen))
        if "error" in answer:
            raise SoakError(f"the far end: {answer['error']}")
        footprints.append((own, msgspec.convert(answer, Footprint)))
    return footprints


def _endings(variants: int) -> Iterator[tuple[str, str]]:
    """Yield what the near and the far end do to end each link; each variant meets all ways to end."""
    for ending in itertools.cycle(ENDINGS):
        who, how = ending.split()
        for _ in range(variants):
            yield (how, "wait") if who == "near" else ("wait", how)


def check(footprints: Sequence[tuple[Footprint, Footprint]]) -> dict[str, Any]:
    """Compare the last quarter of the links with the second quarter. SoakError if a process has grown."""
    quarter = len(footprints) // 4
    if quarter < 2:
        raise SoakError(f"only {len(footprints)} links ended in this time, too few to compare; run longer")
    found: dict[str, Any] = {
        "links": len(footprints),
        "writes": sum(each.writes for both in footprints for each in both),
        "nbytes": sum(each.nbytes for both in footprints for each in both),
    }
    for i, end in enumerate(("near", "far")):
        second, last = footprints[quarter : 2 * quarter], footprints[-quarter:]
        resident = [int(statistics.median(both[i].resident for both in part)) for part in (second, last)]
        descriptors = [min(both[i].descriptors for both in part) for part in (second, last)]
        found[end] = {"resident": resident, "descriptors": descriptors}
        if resident[1] > resident[0] + MAX_GROWTH_BYTES:
            raise SoakError(f"the memory of the {end} end grew from {resident[0]} to {resident[1]} bytes: {found}")
        if descriptors[1] > descriptors[0]:
            raise SoakError(f"the {end} end had {descriptors[0]} file descriptors, and then {descriptors[1]}: {found}")
    return found


def _words(footprints: Sequence[tuple[Footprint, Footprint]]) -> str:
    if not footprints:
        return "no link yet"
    writes = sum(each.writes for both in footprints for each in both)
    nbytes = sum(each.nbytes for both in footprints for each in both)
    last = "; ".join(f"{each.resident / 2**20:.1f} MiB, {each.descriptors} descriptors" for each in footprints[-1])
    return f"{len(footprints)} links, {writes} writes of {nbytes / 2**30:.1f} GiB; near and far have {last}"


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--far"]:
        logging.disable(logging.WARNING)
        uvloop.run(_far(msgspec.json.decode(sys.argv[2], type=list[Setting])))
        return
    parser = argparse.ArgumentParser(prog="python -m lamina.bench.soak", description="Links at full rate.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to run; default: 60")
    parser.add_argument("--link-seconds", type=float, default=LINK_S, help="mean life of a link; default: 1")
    parser.add_argument("--transport", action="append", choices=VARIANTS, help="run only this one; may be repeated")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # every aborted link would log a warning
    with tempfile.TemporaryDirectory(prefix="lamina-soak-") as folder:
        names, settings = [], []
        for name in given.transport or VARIANTS:
            try:
                settings.append(find(name, Path(folder), two_processors()))
                names.append(name)
            except TransportError as error:
                sys.stderr.write(f"{name} is left out: {error}\n")
        try:
            found = soak(names, settings, given.minutes * 60, given.link_seconds)
        except LaminaError as error:
            sys.exit(f"soak: {error}")
    _tell({"transports": names, **found})


if __name__ == "__main__":
    main()
