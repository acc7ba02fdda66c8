"""The memory of a node: taken once, lent to tenants in ranges, each of which is cut into extents for its blocks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lamina.errors import CapacityError, ConfigError, UsageError

ALIGNMENT = 64
"""Bytes: extents and blocks start at multiples of a cache line."""

EXTENT_BYTES = 2 << 20
"""The size of extents where memory is plentiful: that of a huge page."""

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_DONTNEED, _MADV_POPULATE_WRITE = 14, 4, 23
_POPULATE_BYTES = 16 << 20
"""Taken at once, for some milliseconds: no other thread can map anything meanwhile, so longer would look like death."""
_MPOL_BIND = 2
_MBIND = {"x86_64": 237, "aarch64": 235}
"""The number of the system call, which is used directly so that no libnuma is needed."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a `Memory` got: ``huge_bytes`` lie in huge pages; ``numa`` is the NUMA node that it is bound to."""

    nbytes: int
    huge_bytes: int
    numa: int | None


class Range:
    """Bytes of memory, ``tensor`` (uint8 [nbytes]): all of a `Memory`, or what is lent of one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.nbytes = tensor.numel()
        self.device = tensor.device


class Memory(Range):
    """``nbytes`` of memory, all of it there from the start: whatever is missing is missed here and not in a step.

    On the CPU it is one private anonymous mapping, in huge pages where the system has them, bound to the NUMA node
    ``numa``, page-aligned, and zero at first; on a CUDA device it is one allocation. `CapacityError` if it cannot be
    had, `ConfigError` if there is no such NUMA node or the system does not allow binding to it.
    """

    def __init__(self, nbytes: int, *, device: torch.device | str = "cpu", numa: int | None = None) -> None:
        if nbytes < ALIGNMENT:
            raise CapacityError(f"a memory of {nbytes} bytes is too small; expected at least {ALIGNMENT}")
        self.nbytes = nbytes
        self.device = torch.device(device)
        self.numa = numa
        self._address = 0
        if self.device.type == "cpu":
            super().__init__(self._map())
        else:
            if numa is not None:
                raise ConfigError(f"numa: only memory of the CPU has a NUMA node, got {numa} on {self.device}")
            try:
                super().__init__(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
            except RuntimeError as error:
                raise self._missing(str(error)) from error

    def report(self) -> MemoryReport:
        """What was taken. Reads the list of this process's mappings: not for the hot path."""
        return MemoryReport(self.nbytes, self._huge_bytes(), self.numa)

    def close(self) -> None:
        """Give the memory back, whoever still holds a view of it. Nothing may be read or written afterwards."""
        if self._address:
            # Not unmapped, since a view that somebody kept must not become a wild pointer; its pages are gone.
            _libc.madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self.nbytes), _MADV_DONTNEED)
            self._address = 0
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def _map(self) -> torch.Tensor:
        for where, available in available_bytes(self.numa).items():
            if self.nbytes > available:
                raise self._missing(f"{available} are available {where}")
        slack = _HUGE_PAGE if self.nbytes >= _HUGE_PAGE else 0
        try:
            mapping = mmap.mmap(-1, self.nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise self._missing(str(error)) from error
        whole = np.frombuffer(mapping, dtype=np.uint8)
        start = -whole.ctypes.data % _HUGE_PAGE if slack else 0
        own = whole[start : start + self.nbytes]
        address, size = ctypes.c_void_p(own.ctypes.data), ctypes.c_size_t(self.nbytes)
        _libc.madvise(address, size, _MADV_HUGEPAGE)  # a wish; ordinary pages serve as well
        if self.numa is not None:
            self._bind(address, self.numa)
        for first in range(0, self.nbytes, _POPULATE_BYTES):
            piece = own[first : first + _POPULATE_BYTES]
            if _libc.madvise(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(len(piece)), _MADV_POPULATE_WRITE):
                if ctypes.get_errno() != errno.EINVAL:  # a kernel that does not know it
                    raise self._missing(os.strerror(ctypes.get_errno()))
                piece[:: mmap.PAGESIZE] = 0
        self._address = own.ctypes.data
        return torch.from_numpy(own)

    def _bind(self, address: ctypes.c_void_p, node: int) -> None:
        nodes = numa_nodes()
        if node not in nodes:
            raise ConfigError(f"numa: expected one of this machine's NUMA nodes {sorted(nodes)}, got {node}")
        words = (ctypes.c_ulong * (node // 64 + 1))()
        words[node // 64] = 1 << node % 64
        number = _MBIND.get(platform.machine())
        mask_bits = ctypes.c_ulong(64 * len(words) + 1)
        size = ctypes.c_ulong(-(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        if number is None or _libc.syscall(
            ctypes.c_long(number), address, size, ctypes.c_long(_MPOL_BIND), words, mask_bits, ctypes.c_long(0)
        ):
            reason = os.strerror(ctypes.get_errno()) if number else f"not known how on {platform.machine()}"
            raise ConfigError(f"numa: memory cannot be bound to NUMA node {node} here ({reason}); leave it out")

    def _huge_bytes(self) -> int:
        try:
            lines = Path("/proc/self/smaps").read_text().splitlines()
        except OSError:
            return 0
        found, inside = 0, False
        for line in lines:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                first, stop = int(match[1], 16), int(match[2], 16)
                inside = first < self._address + self.nbytes and self._address < stop
            elif inside and line.startswith("AnonHugePages:"):
                found += int(line.split()[1]) * 1024
        return found

    def _missing(self, reason: str) -> CapacityError:
        return CapacityError(f"{self.nbytes} bytes of memory cannot be had on {self.device}: {reason}")


class Loans:
    """A `Memory` lent to tenants: to each of them one range, the first that is free and long enough.

    Ranges begin at pages. What a range holds when it is lent is anything. Belongs to one thread.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._lent: dict[str, tuple[int, int]] = {}
        """By tenant, where its range begins and ends."""

    def lend(self, tenant: str, nbytes: int | None = None) -> Range:
        """A range of ``nbytes``, by default the longest that is free; `CapacityError` says who has how much.

        `UsageError` for a tenant that has one already.
        """
        if tenant in self._lent:
            raise UsageError(f"tenant {tenant} has memory already")
        free = self._free()
        longest = max(stop - start for start, stop in free)
        size = longest if nbytes is None else nbytes
        if not 0 < size <= longest:
            raise CapacityError(self._refusal(nbytes, longest, sum(stop - start for start, stop in free)))
        start = next(start for start, stop in free if stop - start >= size)
        self._lent[tenant] = (start, start + size)
        return Range(self.memory.tensor[start : start + size])

    def give_back(self, tenant: str) -> None:
        """Nothing of the tenant's range may be read or written afterwards. `UsageError` for one that has none."""
        if tenant not in self._lent:
            raise UsageError(f"tenant {tenant} gives memory back, but has none")
        del self._lent[tenant]

    def _free(self) -> list[tuple[int, int]]:
        """Beginning and end of what lies before, between and behind the ranges that are lent."""
        free, start = [], 0
        for first, stop in sorted(self._lent.values()):
            free.append((start, first))
            start = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.memory.nbytes)
        return [*free, (start, self.memory.nbytes)]

    def _refusal(self, asked: int | None, longest: int, free: int) -> str:
        have = (
            ", ".join(f"{tenant} has {stop - start}" for tenant, (start, stop) in self._lent.items())
            or "nobody has any"
        )
        if asked is None:
            return (
                f"none of the {self.memory.nbytes} bytes of memory is free ({have}); "
                "give others quotas, or wait until somebody leaves"
            )
        return (
            f"a quota of {asked} bytes cannot be had: of {self.memory.nbytes} bytes {free} are free, {longest} of them "
            f"in one piece ({have}); ask for less, give those a quota that have none, or wait until somebody leaves"
        )


class Pool:
    """A range of memory in extents of equal size, which the blocks of a cache take as they need them.

    Extent ``i`` is the bytes from ``i * extent_bytes``. A block never spans extents, so an extent must hold the largest
    block, and what is left over of each extent is lost: see `fit_extent`. Belongs to one thread.
    """

    def __init__(self, memory: Range, *, extent_bytes: int) -> None:
        if extent_bytes < ALIGNMENT or extent_bytes % ALIGNMENT:
            raise UsageError(f"extent_bytes: expected a multiple of {ALIGNMENT} above 0, got {extent_bytes}")
        self.memory = memory
        self.extent_bytes = extent_bytes
        self.extents = memory.nbytes // extent_bytes
        self._free = list(range(self.extents))[::-1]
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """Extents that can be taken now."""
        return len(self._free)

    def take(self) -> int:
        """An extent; `CapacityError` when there is none left."""
        if not self._free:
            raise CapacityError(f"all {self.extents} extents of {self.extent_bytes} bytes are taken")
        extent = self._free.pop()
        self._taken.add(extent)
        return extent

    def give(self, extent: int) -> None:
        """Hand an extent back; `UsageError` for one that is not taken."""
        if extent not in self._taken:
            raise UsageError(f"extent {extent} is handed back, but not taken")
        self._taken.remove(extent)
        self._free.append(extent)


def most_blocks(extents: int, extent_bytes: int, block_bytes: Sequence[int]) -> int:
    """The most blocks n, such that n blocks of each of these sizes fit into so many extents together."""
    per_extent = [extent_bytes // nbytes for nbytes in block_bytes]
    if not all(per_extent):
        return 0
    low, high = 0, extents * max(per_extent)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(-(-middle // count) for count in per_extent) <= extents:
            low = middle
        else:
            high = middle - 1
    return low


def fit_extent(nbytes: int, block_bytes: Sequence[int]) -> int:
    """The extent size that lets ``nbytes`` hold the most blocks of these sizes, equally many of each.

    Among sizes that hold as many but for 1 in 200, the largest, since extents are work; at most `EXTENT_BYTES`, or 16
    of the largest blocks where these are more, so that little is left over of an extent, and hardly more than a 64th
    of the memory, so that little is lost where the last extent of each size is not full.
    """
    largest = max(block_bytes)
    limit = max(min(max(EXTENT_BYTES, 16 * largest), nbytes // 64), min(4 * largest, nbytes), largest)
    candidates = {largest}
    for size in set(block_bytes):
        # From the limit downwards; more sizes than these bring nothing.
        candidates |= {size * count for count in range(limit // size, max(0, limit // size - 64), -1)}
    held = {size: most_blocks(nbytes // size, size, block_bytes) for size in candidates if largest <= size <= limit}
    best = max(held.values())
    return max(size for size, blocks in held.items() if 200 * blocks >= 199 * best)


def numa_nodes() -> set[int]:
    """The NUMA nodes of this machine; {0} where the system does not say."""
    return {int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")} or {0}


def numa_node_of(cpus: frozenset[int]) -> int | None:
    """The NUMA node that all of these processors belong to, or None if they have none in common."""
    for node in numa_nodes():
        if cpus and all(Path(f"/sys/devices/system/node/node{node}/cpu{cpu}").exists() for cpu in cpus):
            return node
    return None


def available_bytes(numa: int | None = None, *, root: Path = Path("/")) -> dict[str, int]:
    """What could still be had without swapping, by where: on this machine, in the control groups (version 2) of this
    process, and on the NUMA node ``numa``. Left out is what the system, whose files are below ``root``, does not say.

    Files that are kept in memory count as free: the system drops them when it needs their place.
    """
    found = {}
    machine = _numbers(root / "proc/meminfo", r"^(\w+):\s+(\d+) kB$")
    if "MemAvailable" in machine:
        found["on this machine"] = machine["MemAvailable"] * 1024
    group = re.search(r"^0::(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    own = top / group[1].lstrip("/") if group else top
    for folder in (own, *own.parents):
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            kept = _numbers(folder / "memory.stat", r"^(\w+) (\d+)$")
            files = kept.get("active_file", 0) + kept.get("inactive_file", 0)
            free = max(0, int(limit) - int(used) + files)
            found["in its control group"] = min(free, found.get("in its control group", free))
        if folder == top:
            break
    node = _numbers(root / f"sys/devices/system/node/node{numa}/meminfo", r"^Node \d+ ([\w()]+):\s+(\d+) kB$")
    if numa is not None and "MemFree" in node:
        files = node.get("Active(file)", 0) + node.get("Inactive(file)", 0)
        found[f"on NUMA node {numa}"] = (node["MemFree"] + files) * 1024
    return found


def _numbers(path: Path, pattern: str) -> dict[str, int]:
    """Names and numbers in the lines of a file of the system."""
    return {name: int(number) for name, number in re.findall(pattern, _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
