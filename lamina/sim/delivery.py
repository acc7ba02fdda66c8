"""What is under way between the ends of links, in the order in which it arrives."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from lamina.sim.loop import VirtualLoop

# Plain integers: comparing members of an enum takes longer than all else that is done with them. The first two are the
# numbers of the lanes.
DECODE, BULK, MESSAGE, REGION, BYE, GONE, LOST = range(7)
"""A write on either lane; a control message; a region that was exposed; the goodbye of an end that closes, and the
answer to it; the word that the other end is there no more."""


class Receiver(Protocol):
    """The end of a link at which something arrives."""

    def arrive(self, delivery: Delivery) -> None:
        """Take what is due now. Never raises."""


class Delivery(NamedTuple):
    """Something that is under way. Deliveries sort by the moment they are due, then by the order of sending."""

    due_s: float
    number: int
    receiver: Receiver
    kind: int
    left_s: float
    """When the last byte leaves the sender, which may end from then on without harm to this delivery."""
    nbytes: int
    tag: int = 0
    """The tag of a write, or the key of a region."""
    offset: int = 0
    target: memoryview | None = None
    """The region that a write is for."""
    pieces: Sequence[memoryview] = ()
    """What is written. The bytes are the sender's until they arrive: what it does to them meanwhile is what arrives."""
    body: bytes = b""
    """A control message, encoded."""


class Deliveries:
    """Holds all that is under way in a network: a heap with one timer of the loop for the next moment something is due,
    and a queue for what is due at once.

    Whatever is due at one moment is delivered in one callback, so a write costs the loop much less than one.
    """

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.next_number = itertools.count(1).__next__
        self._heap: list[Delivery] = []
        self._timer: asyncio.Handle | None = None
        self._timer_s = math.inf
        self._soon: deque[Delivery] = deque()
        """What was sent at the present moment and is due at it. It comes after what the heap has for this moment, which
        was sent before."""
        self._called = False

    def push(self, delivery: Delivery, now_s: float) -> None:
        """Have ``delivery`` arrive when it is due, never from within this call, which is made at ``now_s``."""
        due_s = delivery[0]
        if due_s <= now_s:
            self._soon.append(delivery)
            if not self._called:
                self._called = True
                self.loop.call_soon(self._deliver_soon)
            return
        heappush(self._heap, delivery)
        if due_s < self._timer_s:
            self._set_timer(due_s)

    def push_again(self, held: Iterable[Delivery]) -> None:
        """Have deliveries that could not be taken when they were due arrive in the next round, in their order."""
        now = self.loop.time()
        for delivery in held:
            self.push(delivery._replace(due_s=now), now)

    def sender_ended(self, receiver: Receiver) -> float:
        """The end that sends to ``receiver`` is there no more: what has not left it never arrives.

        All else does, with the bytes that are there now. Returns when the last of it does.
        """
        now = self.loop.time()
        kept = []
        last_s = now
        for delivery in self._heap:
            if delivery.receiver is receiver:
                if delivery.left_s > now:
                    continue
                last_s = max(last_s, delivery.due_s)
                delivery = copied(delivery)
            kept.append(delivery)
        self._heap[:] = kept  # in place: this may be called from within a delivery
        heapify(self._heap)
        for i, delivery in enumerate(self._soon):
            if delivery.receiver is receiver:
                self._soon[i] = copied(delivery)
        return last_s

    def _set_timer(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(due_s, self._deliver)
        self._timer_s = due_s

    def _deliver(self) -> None:
        self._timer, self._timer_s = None, math.inf
        heap, now = self._heap, self.loop.time()
        while heap and heap[0].due_s <= now:
            delivery = heappop(heap)
            delivery.receiver.arrive(delivery)
        if heap and heap[0].due_s < self._timer_s:
            self._set_timer(heap[0].due_s)

    def _deliver_soon(self) -> None:
        """Deliver what is due at the moment at which it was sent."""
        self._called = False
        if self._timer_s <= self.loop.time():
            self._deliver()
        soon = self._soon
        # What is sent from within waits for the next round, so that two ends that answer each other at once leave the
        # loop to others as well.
        for _ in range(len(soon)):
            delivery = soon.popleft()
            delivery.receiver.arrive(delivery)


def copied(delivery: Delivery) -> Delivery:
    """The same, with bytes of its own."""
    if not delivery.pieces:
        return delivery
    return delivery._replace(pieces=[memoryview(b"".join(delivery.pieces))])
