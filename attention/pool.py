"""A node takes its memory once, divides it among tenants under quotas, and cuts each tenant's range into extents."""

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

from lamina.attention.available import available_bytes
from lamina.attention.layout import ALIGNMENT
from lamina.errors import CapacityError, ConfigError, UsageError

EXTENT_BYTES = 2 << 20
"""Extents have this size where memory is plentiful: that of a huge page."""

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_DONTNEED, _MADV_POPULATE_WRITE = 14, 4, 23
_POPULATE_BYTES = 16 << 20
"""Memory is taken in steps of this size, of some milliseconds each. No other thread of the process can map memory
during a step, so a longer one would make the node look dead to its peers."""
_MPOL_BIND = 2
_MBIND = {"x86_64": 237, "aarch64": 235}
"""On each architecture the system call mbind has this number. It is called directly, so that no libnuma is needed."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """A `Memory` reports what it got: ``huge_bytes`` lie in huge pages, and it is bound to the NUMA node ``numa``."""

    nbytes: int
    huge_bytes: int
    numa: int | None


class MemoryRange:
    """A range is some bytes of memory, ``tensor`` (uint8 [nbytes]): all of a `Memory`, or one tenant's part of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.nbytes = tensor.numel()
        self.device = tensor.device


class Memory(MemoryRange):
    """A memory has ``nbytes`` that are all there from the start, so that a shortage shows here and not in a step.

    On the CPU it is one private anonymous mapping, in huge pages where the system has them, bound to the NUMA node
    ``numa``, page-aligned, and zero at first; on a CUDA device it is one allocation. `CapacityError` if the system
    refuses it, `ConfigError` if there is no such NUMA node or the system does not allow binding to it.
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
        """Report what was taken. This reads the list of the process's mappings, which is too slow for the hot path."""
        return MemoryReport(self.nbytes, self._huge_bytes(), self.numa)

    def close(self) -> None:
        """Return the memory to the system, even if views of it are left. No caller may read or write it afterwards."""
        if self._address:
            # The range stays mapped, so that a view that is left does not become a wild pointer; its pages are gone.
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
        _libc.madvise(address, size, _MADV_HUGEPAGE)  # this may be refused; ordinary pages serve as well
        if self.numa is not None:
            self._bind(address, self.numa)
        for first in range(0, self.nbytes, _POPULATE_BYTES):
            piece = own[first : first + _POPULATE_BYTES]
            if _libc.madvise(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(len(piece)), _MADV_POPULATE_WRITE):
                if ctypes.get_errno() != errno.EINVAL:  # the error of a kernel that does not know the advice
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
        if self.nbytes < _HUGE_PAGE:
            return 0
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


class QuotaPool:
    """The pool divides a `Memory` among tenants under quotas: each has one range, the first that was long enough.

    Ranges begin at pages. The content of a new range is undefined. The pool belongs to one thread.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._ranges: dict[str, tuple[int, int]] = {}
        """Each tenant's range begins and ends at these bytes."""

    def allocate(self, tenant: str, quota: int | None = None) -> MemoryRange:
        """Allocate a range of ``quota`` bytes to a tenant, by default the longest that is free.

        `CapacityError` says how much each tenant has. `UsageError` for a tenant that has a range already.
        """
        if tenant in self._ranges:
            raise UsageError(f"tenant {tenant} has memory already")
        free = self._gaps()
        longest = max(stop - start for start, stop in free)
        size = longest if quota is None else quota
        if not 0 < size <= longest:
            raise CapacityError(self._refusal(quota, longest, sum(stop - start for start, stop in free)))
        start = next(start for start, stop in free if stop - start >= size)
        self._ranges[tenant] = (start, start + size)
        return MemoryRange(self.memory.tensor[start : start + size])

    def free(self, tenant: str) -> None:
        """Free the range of a tenant, which it must not read or write afterwards; `UsageError` if it has none."""
        if tenant not in self._ranges:
            raise UsageError(f"tenant {tenant} frees memory, but has none")
        del self._ranges[tenant]

    def _gaps(self) -> list[tuple[int, int]]:
        """Return the beginning and end of each gap before, between and behind the ranges of tenants."""
        free, start = [], 0
        for first, stop in sorted(self._ranges.values()):
            free.append((start, first))
            start = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, self.memory.nbytes)
        return [*free, (start, self.memory.nbytes)]

    def _refusal(self, quota: int | None, longest: int, free: int) -> str:
        have = (
            ", ".join(f"{tenant} has {stop - start}" for tenant, (start, stop) in self._ranges.items())
            or "no tenant has any"
        )
        if quota is None:
            return (
                f"none of the {self.memory.nbytes} bytes of memory is free ({have}); "
                "give other tenants quotas, or wait until one leaves"
            )
        return (
            f"a quota of {quota} bytes cannot be had: of {self.memory.nbytes} bytes {free} are free, {longest} of them "
            f"in one piece ({have}); ask for less, give a quota to tenants without one, or wait until one leaves"
        )


class ExtentPool:
    """The pool cuts a range of memory into extents of equal size, which the blocks of one cache take as they need them.

    Extent ``i`` begins at byte ``i * extent_bytes``. A block never spans extents, so an extent must hold the largest
    block, and the rest of each extent is lost: see `fit_extent`. The pool belongs to one thread.
    """

    def __init__(self, memory: MemoryRange, *, extent_bytes: int) -> None:
        if extent_bytes < ALIGNMENT or extent_bytes % ALIGNMENT:
            raise UsageError(f"extent_bytes: expected a multiple of {ALIGNMENT} above 0, got {extent_bytes}")
        self.memory = memory
        self.extent_bytes = extent_bytes
        self.extents = memory.nbytes // extent_bytes
        self._free = list(range(self.extents))[::-1]
        self._allocated: set[int] = set()

    @property
    def available(self) -> int:
        """The pool has this many free extents."""
        return len(self._free)

    def allocate(self) -> int:
        """Allocate an extent and return its number; `CapacityError` if none is free."""
        if not self._free:
            raise CapacityError(f"all {self.extents} extents of {self.extent_bytes} bytes are allocated")
        extent = self._free.pop()
        self._allocated.add(extent)
        return extent

    def free(self, extent: int) -> None:
        """Free an extent; `UsageError` for one that is not allocated."""
        if extent not in self._allocated:
            raise UsageError(f"extent {extent} is to be freed, but not allocated")
        self._allocated.remove(extent)
        self._free.append(extent)


def most_blocks(extents: int, extent_bytes: int, block_bytes: Sequence[int]) -> int:
    """Return the largest n such that n blocks of each of these sizes fit together into this many extents."""
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
    """Return the extent size with which ``nbytes`` hold the most blocks of these sizes, equally many of each.

    Among the sizes that hold at least 199 of every 200 of these blocks, the largest is chosen, because each extent
    costs work. It is at most `EXTENT_BYTES`, or 16 of the largest blocks where these are more, so that little of an
    extent is lost; and it is hardly more than a 64th of the memory, because the last extent of each block size may stay
    nearly empty.
    """
    largest = max(block_bytes)
    limit = max(min(max(EXTENT_BYTES, 16 * largest), nbytes // 64), min(4 * largest, nbytes), largest)
    candidates = {largest}
    for size in set(block_bytes):
        # The 64 sizes below the limit are enough: smaller ones bring nothing.
        candidates |= {size * count for count in range(limit // size, max(0, limit // size - 64), -1)}
    held = {size: most_blocks(nbytes // size, size, block_bytes) for size in candidates if largest <= size <= limit}
    best = max(held.values())
    return max(size for size, blocks in held.items() if 200 * blocks >= 199 * best)


def numa_nodes() -> set[int]:
    """Return the NUMA nodes of this machine; {0} where the system does not say."""
    return {int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")} or {0}


def numa_node_of(cpus: frozenset[int]) -> int | None:
    """Return the NUMA node to which all of these processors belong, or None if they have none in common."""
    for node in numa_nodes():
        if cpus and all(Path(f"/sys/devices/system/node/node{node}/cpu{cpu}").exists() for cpu in cpus):
            return node
    return None
