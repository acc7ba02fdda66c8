"""A ring of tags in memory that two processes share: one writes it, the other reads it, and neither ever waits.

One file holds the rings of both lanes in one direction. Each side advances a counter of its own and looks at the
other's, so there is nothing to lock, but it relies on a processor that shows stores to others in the order in which
they were made, as x86-64 does: first the bytes of a write, then its tag, then the counter. A counter is eight aligned
bytes, which ``memoryview`` reads and writes in one go.

Nothing in the file is believed: the other side may be broken, or worse.
"""

from __future__ import annotations

import mmap
import os
import threading

from lamina.errors import ProtocolError

SLOTS = 1024
"""Tags that may be under way on a lane. A power of two."""

_LINE = 64
"""Bytes of a cache line: words that different sides write lie on lines of their own."""
_LANE_BYTES = 3 * _LINE + 4 * SLOTS
RING_BYTES = _LINE + 2 * _LANE_BYTES
"""Size of the file: a line for both lanes, whose first word says that the reader sleeps; then each lane."""

# Words of eight bytes in a lane.
HEAD = 0
"""Tags written so far, by the writer."""
NBYTES = 1
"""Bytes of the writes that they belong to, by the writer."""
TAIL = 8
"""Tags read so far, by the reader, who need not say it at once."""
STARVED = 16
"""Set by the writer when it waits for TAIL, cleared by the reader when it wakes the writer."""

_fence = threading.Lock()
_take, _give = _fence.acquire, _fence.release


def fence() -> None:
    """Let no load that follows happen before a store that precedes, which is the one thing x86-64 may swap.

    Whoever is about to sleep says so, and then looks again; whoever wrote looks whether the other sleeps. If either
    looked before its store was visible, both could miss what the other did. Python offers no barrier, but taking a free
    lock is an atomic read-modify-write in every version of CPython, which is a full barrier on x86-64.
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
        """Word 0 is set by the reader before it sleeps, and cleared by the writer when it wakes the reader."""
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
        """Whether ``put`` may be called. If not, the reader wakes this side when it has read some.

        Raises ProtocolError when the reader says what cannot be.
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
        """Show the reader the tag of a write of ``nbytes``, all of which have been stored, and wake it if it sleeps."""
        head = self._head
        words = self._words
        self._slots[head % SLOTS] = tag
        self._nbytes = words[NBYTES] = self._nbytes + nbytes
        self._head = words[HEAD] = head + 1
        _take(), _give()  # as ``fence``, which would take as long again to call
        if self._asleep[0]:
            self._asleep[0] = 0
            ring(self._doorbell)


def ring(doorbell: int) -> None:
    try:  # noqa: SIM105 - a fifth of the time of ``suppress``
        os.eventfd_write(doorbell, 1)
    except BlockingIOError:
        pass  # 2**64 rings are waiting to be heard: one more makes no difference
