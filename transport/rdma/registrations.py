"""The registrations that one link uses, found by the addresses of its sources."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right

from lamina.transport.rdma.device import COPY_BYTES, RdmaDevice, RegisteredMemory


class Registrations:
    """The registrations that one link uses, by address."""

    def __init__(self, device: RdmaDevice) -> None:
        self.device = device
        self._held: list[RegisteredMemory] = []
        self._index: tuple[list[int], list[RegisteredMemory]] = [], []
        """The addresses of the registrations that lie in no other one, ascending, and these registrations."""

    def expose(self, view: memoryview) -> RegisteredMemory:
        """Register memory as ``RdmaDevice.expose`` does, and hold it for this link."""
        with self.device.lock:
            memory = self.device.expose(view)
            self._hold(memory)
        return memory

    def find(self, owner: object, address: int, nbytes: int) -> int | None:
        """The local key of the memory in which these bytes lie. None if it is not registered and need not be."""
        end = address + nbytes
        starts, found = self._index
        i = bisect_right(starts, address) - 1
        if i >= 0:
            memory = found[i]
            if end <= memory.end and memory.holds(owner):
                return memory.lkey
        if nbytes <= COPY_BYTES and not isinstance(owner, mmap.mmap):
            return None
        with self.device.lock:
            source = self.device.source(owner, address, end)
            if source is None:
                return None
            self._hold(source)
        return source.lkey

    def _hold(self, memory: RegisteredMemory) -> None:
        self._held = [held for held in self._held if held.alive]
        self._held.append(memory)
        found: list[RegisteredMemory] = []
        for held in sorted(self._held, key=lambda held: (held.address, -held.end)):
            if not found or held.end > found[-1].end:
                found.append(held)
        self._index = [held.address for held in found], found

    def close(self) -> None:
        with self.device.lock:
            held, self._held, self._index = self._held, [], ([], [])
            for memory in held:
                if memory.alive:
                    self.device.release(memory)


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of_readonly(view: memoryview) -> int:
    """The address of the first byte of a contiguous view, which may be read-only."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
