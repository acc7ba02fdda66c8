"""One lane over RDMA: a queue pair, and the account of what is in flight on it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.errors import CapacityError, PeerLostError, TransportError
from lamina.transport.base import Lane, address_of
from lamina.transport.rdma.bindings import pyverbs, status_in_words
from lamina.transport.rdma.device import COPY_BYTES
from lamina.transport.rdma.queue_pair import Piece, QueuePair
from lamina.transport.rdma.registrations import Registrations, address_of_readonly

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from lamina.transport.rdma.lanes import RdmaLanes


STAGING_BYTES = 256 << 10
"""The size of the registered memory of each lane to which small sources are copied."""
SIGNAL_WRITES, SIGNAL_BYTES = 16, 1 << 20
"""A request asks for a completion at the latest after so many requests or bytes."""
MAX_COMPLETIONS = 64
"""The most completions of a lane that are taken at once."""


class RdmaWrite:
    """A write, and how much of it was given to the device."""

    __slots__ = ("address", "at", "index", "nbytes", "registered", "rkey", "tag", "views")

    def __init__(self, buffers: Sequence[Buffer], nbytes: int, address: int, rkey: int, tag: int) -> None:
        self.views = [view for buffer in buffers if (view := memoryview(buffer)).nbytes]
        self.nbytes = nbytes
        self.address = address
        """The address at the peer of the next request."""
        self.rkey = rkey
        self.tag = socket.htonl(tag)
        self.index = 0
        self.at = 0
        """The next byte of view number ``index``."""
        self.registered: list[Any] = []
        """Registrations for this write alone; they end with its last request."""

    def release(self) -> None:
        for mr in self.registered:
            with contextlib.suppress(pyverbs().Error):
                mr.close()


class WorkRequest:
    """A request that the device has, and what it gives back when it is complete."""

    __slots__ = ("nbytes", "serial", "staged", "write")

    def __init__(self, serial: int, nbytes: int, staged: int, write: RdmaWrite | None) -> None:
        self.serial = serial
        self.nbytes = nbytes
        self.staged = staged
        """The bytes of staging memory that it takes."""
        self.write = write
        """The write whose last request this is."""


class RdmaLane:
    """A lane's queue pair, and the account of what is in flight on it."""

    def __init__(
        self,
        lanes: RdmaLanes,
        lane: Lane,
        pair: QueuePair,
        registrations: Registrations,
        staging: memoryview,
        staging_key: int,
    ) -> None:
        self.pair = pair
        self.psn = secrets.randbits(24)
        self.credits = self.max_credits = 0
        """The receives that the peer is known to have posted, and how many it can have."""
        self.more = False
        """Whether the device may have more completions than were taken last."""
        self._lanes = lanes
        self._lane = lane
        self._registrations = registrations
        self._closed: TransportError | None = None
        self._drainers: list[asyncio.Future[None]] = []
        self._arrival_opcode = pyverbs().e.IBV_WC_RECV_RDMA_WITH_IMM

        self._waiting: deque[RdmaWrite] = deque()
        """Writes for which there is no room yet; part of the first one may be in flight."""
        self._sent: deque[WorkRequest] = deque()
        """Requests that the device has and that are not known to be complete."""
        self.pending_bytes = 0
        self._room = pair.queue
        self._serial = self._signalled = 0
        """The serial of the last request, and of the last one that asks for a completion."""
        self._signal_writes = min(SIGNAL_WRITES, pair.queue // 4)
        self._unsignalled_bytes = 0
        self._unseen_bytes = 0
        """The bytes of requests without a tag, which the peer learns from a note."""
        self._watched = self._stuck_periods = 0

        # A request that carries its bytes inline takes them from here.
        self._inline = memoryview(bytearray(max(1, pair.inline_bytes)))
        self._inline_address = address_of(self._inline)
        # Staging memory is a ring, which is given back in the order in which it was taken.
        self._staging = staging
        self._staging_address = address_of(staging)
        self._staging_key = staging_key
        self._staging_at = self._staging_used = 0

        self._arrived: deque[tuple[int, int]] = deque()
        """Tags that are not delivered yet, and the bytes of their writes."""
        self._heard_probe = False
        self._taken = 0
        """The number of receives that arrivals took since ``batch`` were last posted."""
        self._returned = 0
        """The number of receives that were posted and of which the peer does not know."""

    # -- sending

    def write(self, write: RdmaWrite) -> None:
        self.pending_bytes += write.nbytes
        if self._waiting:
            self._waiting.append(write)
            return
        try:
            if self._post(write):
                return
        except (TransportError, CapacityError, pyverbs().Error) as error:
            self._fail(f"a write could not be sent: {error}")
        self._waiting.append(write)
        self._await_completions()

    def mark(self) -> None:
        """Make sure that a completion will come after all requests so far."""
        if self._serial != self._signalled and not self._closed:
            try:
                self._hand_over([], 0, 0, None, None, 0, signal=True, inline=False)
            except pyverbs().Error as error:
                self._fail(f"the device takes no more: {error}")

    def give_credits(self, count: int) -> bool:
        """Take ``count`` receives that the peer has posted; False if it cannot have that many."""
        if self.credits + count > self.max_credits:
            return False
        self.credits += count
        self._post_waiting()
        return True

    def look_pending(self) -> int:
        """Ask the device, and return the bytes of writes that are not known to be complete."""
        if self.pending_bytes and not self._closed:
            self.mark()
            self._reap_aside()
        return self.pending_bytes

    async def drain(self) -> None:
        if self._closed:
            raise self._closed
        if not self.pending_bytes and not self._waiting:
            return
        done = asyncio.get_running_loop().create_future()
        self._drainers.append(done)
        try:
            self._await_completions()
            await done
        finally:
            if done in self._drainers:
                self._drainers.remove(done)

    def arm(self) -> None:
        """Ask to be woken by arrivals, and by completions of writes only if something waits for them."""
        if not self._lanes.busy_poll:
            self.pair.arm(not (self._waiting or self._drainers))

    def stuck_periods(self) -> int:
        """The number of calls since the device last completed a request of those that it has."""
        oldest = self._sent[0].serial if self._sent else 0
        self._stuck_periods = self._stuck_periods + 1 if oldest and oldest == self._watched else 0
        self._watched = oldest
        if oldest:
            self.mark()
        return self._stuck_periods

    def _await_completions(self) -> None:
        self.mark()
        self.arm()
        self._reap_aside()

    def _post_waiting(self) -> None:
        try:
            while self._waiting and self._post(self._waiting[0]):
                self._waiting.popleft()
            if self._drainers and not self._waiting:
                self.mark()
        except (TransportError, CapacityError, pyverbs().Error) as error:
            self._fail(f"a write could not be sent: {error}")

    def _post(self, write: RdmaWrite) -> bool:
        """Give ``write`` to the device as far as there is room; True if all of it was given."""
        # One place is kept for a mark.
        while self._room > 1 and self.credits:
            if write.nbytes <= self.pair.inline_bytes:
                at = 0
                for view in write.views:
                    self._inline[at : at + view.nbytes] = view.cast("B")
                    at += view.nbytes
                pieces = [(self._inline_address, at, 0)] if at else []
                self._hand_over(pieces, write.address, write.rkey, write.tag, write, 0, signal=False, inline=at > 0)
                return True
            pieces, nbytes, staged = self._gather(write)
            if not pieces:
                self.mark()  # the requests that take the staging memory may not have asked for a completion
                return False
            last = write.index == len(write.views)
            self._hand_over(
                pieces,
                write.address,
                write.rkey,
                write.tag if last else None,
                write if last else None,
                staged,
                signal=last and bool(write.registered),
                inline=False,
            )
            write.address += nbytes
            if last:
                return True
        return False

    def _gather(self, write: RdmaWrite) -> tuple[list[Piece], int, int]:
        """Gather pieces of ``write`` for one request; returns them, their bytes, and the staging memory taken."""
        pieces: list[Piece] = []
        total = used = 0
        while write.index < len(write.views) and len(pieces) < self.pair.max_gather and total < self.pair.max_bytes:
            view, at = write.views[write.index], write.at
            nbytes = min(view.nbytes - at, self.pair.max_bytes - total)
            address, key = 0, None
            if not view.readonly:
                address = address_of(view) + at
                key = self._registrations.find(view.obj, address, nbytes)
            if key is None and view.nbytes <= COPY_BYTES:
                taken = self._stage(nbytes)
                if not taken:
                    break
                used += taken
                start = self._staging_at - nbytes
                self._staging[start : start + nbytes] = view.cast("B")[at : at + nbytes]
                address, key = self._staging_address + start, self._staging_key
            elif key is None:
                start = address_of_readonly(view)
                mr = self._registrations.device.register(start + at, nbytes)
                write.registered.append(mr)
                address, key = start + at, mr.lkey
            if pieces and key == pieces[-1][2] and address == sum(pieces[-1][:2]):
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + nbytes, key)
            else:
                pieces.append((address, nbytes, key))
            total += nbytes
            write.at += nbytes
            if write.at == view.nbytes:
                write.index, write.at = write.index + 1, 0
        return pieces, total, used

    def _stage(self, nbytes: int) -> int:
        """Take ``nbytes`` in one piece, which ends at ``_staging_at``; returns the bytes taken, 0 without room."""
        start, taken = self._staging_at, nbytes
        if start + nbytes > STAGING_BYTES:
            start, taken = 0, STAGING_BYTES - start + nbytes
        if self._staging_used + taken > STAGING_BYTES:
            return 0
        self._staging_used += taken
        self._staging_at = start + nbytes
        return taken

    def _hand_over(
        self,
        pieces: list[Piece],
        address: int,
        rkey: int,
        tag: int | None,
        write: RdmaWrite | None,
        staged: int,
        *,
        signal: bool,
        inline: bool,
    ) -> None:
        """Post a request and account for it. ``write`` is the write whose last request it is, if any."""
        nbytes = sum(piece[1] for piece in pieces)
        serial = self._serial + 1
        self._unsignalled_bytes += nbytes
        if signal or serial - self._signalled >= self._signal_writes or self._unsignalled_bytes >= SIGNAL_BYTES:
            signal = True
            self._signalled = serial
            self._unsignalled_bytes = 0
        self._serial = serial
        self._sent.append(WorkRequest(serial, nbytes, staged, write))
        self._room -= 1
        self._lanes.bytes_written[self._lane] += nbytes
        if tag is None:
            self._unseen_bytes += nbytes
        else:
            self.credits -= 1
            if self._unseen_bytes and self._lanes.owner is not None:
                self._lanes.owner.send_note({"lane": int(self._lane), "bytes": self._unseen_bytes})
                self._unseen_bytes = 0
        self.pair.post(serial, pieces, address, rkey, tag, signal=signal, inline=inline)

    # -- what the device tells

    def reap(self) -> None:
        """Take completions: account for those of writes, and keep those of arrivals for ``deliver``."""
        if self._closed:
            return
        count, completions = self.pair.poll(MAX_COMPLETIONS)
        self.more = count == MAX_COMPLETIONS
        sent = 0
        for completion in completions:
            if completion.status:
                self._fail(status_in_words(completion.status))
                return
            serial = completion.wr_id
            if serial:
                sent = serial
                continue
            if completion.opcode != self._arrival_opcode:
                self._fail("the peer sent something that is not a write")
                return
            self._taken += 1
            if self._heard_probe:
                self._arrived.append((socket.ntohl(completion.imm_data), completion.byte_len))
            self._heard_probe = True
        if sent:
            self._completed(sent)
        if self._taken >= self.pair.batch:
            self.return_receives()

    def deliver(self) -> bool:
        """Deliver what arrived to the owner; True if there was anything."""
        lanes, lane, arrived = self._lanes, self._lane, self._arrived
        if not arrived or lanes.owner is None:
            return False
        while arrived and not lanes.closed:
            tag, nbytes = arrived.popleft()
            lanes.tags_received[lane] += 1
            lanes.bytes_received[lane] += nbytes
            lanes.owner.delivered(lane, tag)
        return True

    def probed(self) -> bool:
        """Whether the first writes of both ends have arrived."""
        self.reap()
        return self._heard_probe and not self._sent

    def return_receives(self) -> None:
        """Post receives in place of those that were taken, and tell the peer."""
        while self._taken >= self.pair.batch:
            self.pair.post_receives()
            self._taken -= self.pair.batch
            self._returned += self.pair.batch
        if self._returned and self._lanes.owner is not None:
            self._lanes.owner.send_note({"lane": int(self._lane), "credits": self._returned})
            self._returned = 0

    def _reap_aside(self) -> None:
        """Call ``reap`` where nothing may be delivered, and have it delivered soon."""
        self.reap()
        if self._arrived or self.more:
            self._lanes.deliver_soon()

    def _completed(self, serial: int) -> None:
        sent = self._sent
        while sent and sent[0].serial <= serial:
            request = sent.popleft()
            self._room += 1
            self.pending_bytes -= request.nbytes
            self._staging_used -= request.staged
            if request.write is not None and request.write.registered:
                request.write.release()
        if self._waiting:
            self._post_waiting()
        if self._drainers and not self.pending_bytes and not self._waiting:
            for done in self._drainers:
                if not done.done():
                    done.set_result(None)

    def _fail(self, reason: str) -> None:
        self._lanes.fail(PeerLostError(f"cannot be reached over RDMA any more: {reason}"))

    def close(self, error: TransportError) -> None:
        self._closed = error
        self.pair.close()
        for request in self._sent:
            if request.write is not None:
                request.write.release()
        for write in self._waiting:
            write.release()
        self._sent.clear()
        self._waiting.clear()
        self._arrived.clear()
        self.pending_bytes = 0
        self._staging.release()
        for done in self._drainers:
            if not done.done():
                done.set_exception(error)
