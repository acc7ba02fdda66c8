"""A ring of tags in memory that two processes share: one writes it, the other reads it, and neither ever waits.

One file contains the rings of both lanes in one direction. Each side advances a counter of its own and reads the
other's, so nothing is locked. This relies on a processor that shows stores to others in the order in which they were
made, as x86-64 does: first the bytes of a write, then its tag, then the counter. A counter has eight aligned bytes,
which ``memoryview`` reads and writes with one access.

Nothing in the file is trusted, because the other side may be broken or hostile.
"""

from __future__ import annotations

import mmap
import os
import threading

from lamina.errors import ProtocolError

SLOTS = 1024
"""The number of tags that may be in flight on a lane, a power of two."""

_LINE = 64
"""The bytes of a cache line. Words that different sides write lie on different lines."""
_LANE_BYTES = 3 * _LINE + 4 * SLOTS
RING_BYTES = _LINE + 2 * _LANE_BYTES
"""The size of the file: a line for both lanes, whose first word says that the reader sleeps, and then each lane."""

# The index of each word in a lane; words have eight bytes.
HEAD = 0
"""The number of tags written so far. The writer sets it."""
NBYTES = 1
"""The bytes of their writes. The writer sets it."""
TAIL = 8
"""The number of tags read so far. The reader sets it, perhaps late."""
STARVED = 16
"""The writer sets it when it waits for TAIL, and the reader clears it when it wakes the writer."""

_fence = threading.Lock()
_take, _give = _fence.acquire, _fence.release


def fence() -> None:
    """Prevent that a later load happens before an earlier store, the one reordering that x86-64 may do.

    A side that is about to sleep says so and then looks again; a side that has written looks whether the other sleeps.
    If either looked before its store was visible, both could miss what the other did. Python offers no barrier. But
    taking a free lock is an atomic read-modify-write in every version of CPython, which is a full barrier on x86-64.
    """
    _take()
    _give()


class Rings:
    """One file of rings, mapped: its words and slots by lane."""

    def __init__(self, fd: int) -> None:
        """``fd`` has RING_BYTES and may be closed afterwards."""
        memory = mmap.mmap(fd, RING_BYTES)
        memory.madvise(mmap.MADV_DONTFORK)
        view = memoryview(memory)
        self.asleep = view[:_LINE].cast("Q")
        """The reader sets word 0 before it sleeps, and the writer clears it when it wakes the reader."""
        lanes = [view[start : start + _LANE_BYTES] for start in (_LINE, _LINE + _LANE_BYTES)]
        self.words = [lane[: 3 * _LINE].cast("Q") for lane in lanes]
        self.slots = [lane[3 * _LINE :].cast("I") for lane in lanes]


class RingWriter:
    """The writer's side of one lane."""

    def __init__(self, rings: Rings, lane: int, doorbell: int) -> None:
        """``doorbell`` is the reader's eventfd."""
        self._asleep = rings.asleep
        self._words = rings.words[lane]
        self._slots = rings.slots[lane]
        self._doorbell = doorbell
        self._head = 0
        self._tail = 0
        self._nbytes = 0

    def has_room(self) -> bool:
        """Whether ``put`` may be called. If not, the reader wakes this side when it has read some tags.

        Raises ProtocolError when the reader's counter is impossible.
        """
        if self._head - self._tail < SLOTS:
            return True
        if self._look():
            return True
        self._words[STARVED] = 1
        fence()
        return self._look()

    def _look(self) -> bool:
        tail = self._words[TAIL]
        if not self._tail <= tail <= self._head:
            raise ProtocolError(
                f"the peer says that it read {tail} tags of a ring, where {self._tail} to {self._head} are possible"
            )
        self._tail = tail
        return self._head - tail < SLOTS

    def put(self, tag: int, nbytes: int) -> None:
        """Show the reader the tag of a write whose ``nbytes`` have been stored, and wake the reader if it sleeps."""
        head = self._head
        words = self._words
        self._slots[head % SLOTS] = tag
        self._nbytes = words[NBYTES] = self._nbytes + nbytes
        self._head = words[HEAD] = head + 1
        _take(), _give()  # like ``fence``, a call of which would double the time
        if self._asleep[0]:
            self._asleep[0] = 0
            ring(self._doorbell)


def ring(doorbell: int) -> None:
    try:  # noqa: SIM105 - a fifth of the time of ``suppress``
        os.eventfd_write(doorbell, 1)
    except BlockingIOError:
        pass  # the counter is full, so the doorbell is rung already
