"""The bandwidth of this machine's memory, and work measured in turns with plain reads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import cycle, pairwise
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from lamina.attention.native.library import Workers
from lamina.attention.pool import Memory
from lamina.errors import ConfigError
from lamina.table import print_text

Name = TypeVar("Name", bound=Hashable)

REPEATS = 5
SAMPLE_S = 0.02
"""A sample continues from layer to layer for at least this long."""

SETTLE_S, INTEL_SETTLE_S = 0.02, 0.25
"""How long OpenMP threads spin in search of work before they release the cores; Intel's runtime spins longer."""

READ_CACHES, MIN_READ_BYTES = 4, 256 << 20
"""A plain read covers this many times the size of the last-level caches, and at least this many bytes."""

ASSUMED_CACHE = 32 << 20
"""The size of the last-level caches where the kernel does not report it."""

MAX_OTHERS = 0.1
"""The number of cores busy with other work beyond which a note says so."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The medians of a measurement.

    ``ratio`` is the median of the ratios of each sample to the plain reads around it, not the ratio of the medians.
    """

    seconds: float
    gbps: float
    read_gbps: float
    ratio: float


class Bandwidth:
    """Plain reads of a buffer much larger than the caches, with the vector loads of the native kernel."""

    def __init__(self, threads: int) -> None:
        self._workers = Workers(threads)
        self._one = Workers(1)
        self._buffer = Memory(read_bytes())
        self.isa = self._workers.isa

    def close(self) -> None:
        self._workers.close()
        self._one.close()
        self._buffer.close()

    def one_thread(self) -> float:
        """Return the median GB/s of a few plain reads with one thread."""
        return statistics.median(self._read(self._one) for _ in range(REPEATS))

    def all_threads(self) -> float:
        """Return the median GB/s of a few plain reads with all threads."""
        return statistics.median(self._read(self._workers) for _ in range(REPEATS))

    def compare(self, work: Callable[[int], object], layers: int, nbytes: int, *, one: bool, settle: bool) -> Measured:
        """Call ``work``, which reads ``nbytes`` in each layer, for layer after layer, in turns with plain reads.

        The plain reads use one thread if ``one``, else all. ``settle`` says that threads of ``work`` may still spin
        when it returns, and makes each read wait until they have stopped.
        """
        workers = self._one if one else self._workers
        pause = _settle_seconds() if settle else 0.0
        around = cycle(range(layers))
        _sample(work, around)
        time.sleep(_settle_seconds())  # the threads that filled the caches may spin as well
        reads, samples = [self._read(workers)], []
        for _ in range(REPEATS):
            samples.append(_sample(work, around))
            time.sleep(pause)
            reads.append(self._read(workers))
        rates = [nbytes / seconds / 1e9 for seconds in samples]
        beside = [(before + after) / 2 for before, after in pairwise(reads)]
        return Measured(
            seconds=statistics.median(samples),
            gbps=statistics.median(rates),
            read_gbps=statistics.median(reads),
            ratio=statistics.median(rate / read for rate, read in zip(rates, beside, strict=True)),
        )

    def _read(self, workers: Workers) -> float:
        started = time.perf_counter()
        workers.read(self._buffer.tensor)
        return self._buffer.nbytes / (time.perf_counter() - started) / 1e9


def in_turns(calls: Mapping[Name, Callable[[int], object]], layers: int) -> dict[Name, float]:
    """Return the median seconds that each of ``calls`` takes for a layer, sampled in turns."""
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    arounds = {name: cycle(range(layers)) for name in calls}
    pause = _settle_seconds()
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            seconds = _sample(call, arounds[name])
            if repeat:  # the first warms up
                samples[name].append(seconds)
            time.sleep(pause)
    return {name: statistics.median(found) for name, found in samples.items()}


def _sample(call: Callable[[int], object], layers: Iterator[int]) -> float:
    """Return the mean seconds per layer over one sample."""
    calls, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < SAMPLE_S:
        call(next(layers))
        calls += 1
    return seconds / calls


class OtherWork:
    """The load that other processes have put on this process's cores since this object was created."""

    def __init__(self) -> None:
        self._started, self._busy = time.perf_counter(), _others_seconds()

    def cores(self) -> float:
        """Return the average number of cores that were busy with other work."""
        return max(0.0, (_others_seconds() - self._busy) / (time.perf_counter() - self._started))

    def mention(self, console: Console) -> float:
        """Return `cores`, and print a note if there are more than ``MAX_OTHERS``."""
        cores = self.cores()
        if cores > MAX_OTHERS:
            print_text(f"other work kept {cores:.2f} cores busy; a quiet machine gives better figures", console)
        return cores


def _others_seconds() -> float:
    ours = time.process_time()
    names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, irq, softirq and, on a virtual machine, what its host kept for itself
    ticks = sum(int(line[i]) for line in lines if line[0] in names for i in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK") - ours


def read_bytes() -> int:
    """Return the size of the buffer for plain reads."""
    return max(READ_CACHES * cache_bytes(), MIN_READ_BYTES)


@cache
def cache_bytes() -> int:
    """Return the total size of the last-level caches of the processors that this process may use."""
    caches: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0):
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache")
        levels = [index for index in folder.glob("index*") if (index / "size").exists()]
        if levels:
            last = max(levels, key=lambda index: int((index / "level").read_text()))
            size = (last / "size").read_text().strip()
            caches[(last / "shared_cpu_list").read_text()] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(
                size[-1], 0
            )
    return sum(caches.values()) or ASSUMED_CACHE


def check_threads(threads: int | None) -> int:
    """Return the value of ``--threads``, by default all cores. ConfigError if it exceeds the cores."""
    cores = len(os.sched_getaffinity(0))
    if threads is not None and threads > cores:
        raise ConfigError(f"--threads: expected at most {cores}, the cores that this process may use, got {threads}")
    return threads or cores


def free_bytes() -> int:
    """Return how much memory can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _settle_seconds() -> float:
    return INTEL_SETTLE_S if "libiomp5" in Path("/proc/self/maps").read_text() else SETTLE_S
