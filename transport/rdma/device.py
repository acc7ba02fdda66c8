"""An RDMA device, which a process opens once, and the memory that is registered with it."""

from __future__ import annotations

import atexit
import contextlib
import errno
import mmap
import os
import resource
import threading
import weakref
from pathlib import Path
from typing import Any

from lamina.errors import CapacityError, TransportError
from lamina.transport.base import address_of
from lamina.transport.lanes import UpgradeError
from lamina.transport.rdma.bindings import pyverbs

MAX_GATHER = 30
"""One work request gathers at most this many pieces of memory; more do not fit into those of common devices."""
COPY_BYTES = 16 << 10
"""A source of up to this size is copied to registered memory; registering a larger one costs less than copying it."""
MIN_MEMLOCK = 64 << 20
"""In bytes. A node with a lower limit of locked memory could not register what it exposes."""
_CAP_IPC_LOCK = 14
MemoryKey = tuple[int, int, bool]
"""The address, the bytes, and whether peers may write there."""


class RegisteredMemory:
    """Registered memory of this process, with a count of its users. Each user releases it once."""

    __slots__ = ("_keep", "_key", "_mr", "address", "end", "lkey", "owner", "rkey", "users")

    def __init__(self, mr: Any, key: MemoryKey, keep: object, owner: weakref.ref[mmap.mmap] | None) -> None:
        self._mr = mr
        self._key = key
        self._keep = keep
        """The object that keeps the memory mapped."""
        self.owner = owner
        """The mapping whose end also ends the registration; None if the registration keeps its memory."""
        self.address = key[0]
        self.end = key[0] + key[1]
        self.lkey: int = mr.lkey
        self.rkey: int = mr.rkey
        self.users = 1

    @property
    def alive(self) -> bool:
        return self._mr is not None

    def holds(self, owner: object) -> bool:
        """Whether the memory of ``owner`` at these addresses is the memory that was registered."""
        return self._mr is not None and (self.owner is None or self.owner() is owner)

    def close(self) -> None:
        if self._mr is not None:
            mr, self._mr, self._keep, self.owner = self._mr, None, None, None
            with contextlib.suppress(pyverbs().Error):
                mr.close()


class RdmaDevice:
    """An open device: one context, one protection domain, and all memory that is registered with them.

    Links share registrations, so memory is pinned once, whatever the number of peers that may write it. A peer that
    learns the key of a region that is exposed to another peer could write it too; the nodes of a cluster trust each
    other that far.
    """

    def __init__(self, name: str) -> None:
        verbs = pyverbs()
        try:
            self.context = verbs.Context(name=name)
            self.pd = verbs.PD(self.context)
            attributes = self.context.query_device()
        except verbs.Error as error:
            raise UpgradeError(
                f"RDMA device {name} cannot be opened ({error}): check that this user may open /dev/infiniband/uverbs*"
            ) from error
        self.name = name
        self._pid = os.getpid()
        self.ports: int = attributes.phys_port_cnt
        self.max_gather = min(attributes.max_sge, MAX_GATHER)
        self.max_queue = min(attributes.max_qp_wr, attributes.max_cqe // 2 - 1)
        self._memories: dict[MemoryKey, RegisteredMemory] = {}
        self.lock = threading.RLock()
        """Held while registrations change: one thread exposes regions, and another writes from them."""

    def register(self, address: int, nbytes: int, access: int = 0) -> Any:
        """Register memory; the caller closes the result. Raises CapacityError where the memory cannot be locked."""
        verbs = pyverbs()
        try:
            return verbs.MR(self.pd, nbytes, access, address=address)
        except verbs.Error as error:
            what = f"{nbytes} bytes of memory cannot be registered with RDMA device {self.name}"
            if getattr(error, "error_code", None) == errno.ENOMEM:
                raise CapacityError(f"{what}: no more may be locked. {_memlock_advice()}") from error
            raise TransportError(f"{what}: {error}") from error

    def expose(self, view: memoryview) -> RegisteredMemory:
        """Register memory that peers may write, and keep the memory mapped."""
        e = pyverbs().e
        key = (address_of(view), view.nbytes, True)
        if memory := self._memories.get(key):
            memory.users += 1
            return memory
        mr = self.register(*key[:2], e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)
        memory = self._memories[key] = RegisteredMemory(mr, key, view, None)
        return memory

    def source(self, owner: object, address: int, end: int) -> RegisteredMemory | None:
        """Find the registration of a source's memory: an existing one, or a new one of the mapping ``owner``.

        A new one ends with the mapping. None for other memory, which may be freed and reused at any time.
        """
        for memory in list(self._memories.values()):
            if memory.address <= address and end <= memory.end and memory.holds(owner):
                memory.users += 1
                return memory
        if not isinstance(owner, mmap.mmap):
            return None
        key = (address_of(memoryview(owner)), len(owner), False)
        mr = self.register(*key[:2])
        memory = RegisteredMemory(mr, key, None, weakref.ref(owner, lambda _: self._forget(memory)))
        self._memories[key] = memory
        return memory

    def close(self) -> None:
        """Close the device at the end of the process, because pyverbs fails if the interpreter does so."""
        if os.getpid() == self._pid:  # a device that a child inherited by fork is still the parent's
            with contextlib.suppress(pyverbs().Error):
                self.context.close()  # closes all that belongs to it too

    def release(self, memory: RegisteredMemory) -> None:
        memory.users -= 1
        if memory.users == 0:
            self._forget(memory)

    def _forget(self, memory: RegisteredMemory) -> None:
        with self.lock:
            if self._memories.get(memory._key) is memory:
                del self._memories[memory._key]
            memory.close()


_devices: dict[tuple[int, str], RdmaDevice] = {}


def open_device(name: str) -> RdmaDevice:
    """Open a device, or return the open one. A child cannot use one inherited by fork. Raises UpgradeError."""
    key = (os.getpid(), name)
    if key not in _devices:
        device = _devices[key] = RdmaDevice(name)
        atexit.register(device.close)
    return _devices[key]


def check_memlock() -> None:
    """Raise UpgradeError where the limit of locked memory is too low for a node."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_MEMLOCK and not _may_lock():
        raise UpgradeError(f"too little memory may be registered for RDMA. {_memlock_advice()}")


def _memlock_advice() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    value = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    return (
        f"RLIMIT_MEMLOCK is {value} here: set LimitMEMLOCK=infinity for the service, or `ulimit -l unlimited`, or "
        "memlock in /etc/security/limits.conf"
    )


def _may_lock() -> bool:
    """Whether this process has CAP_IPC_LOCK, to which the limit does not apply."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
