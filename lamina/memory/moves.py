"""Blocks of a tenant go to another memory node, or come from one: both ends of the link, on the device's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamina.errors import ProtocolError, TransportError, UsageError
from lamina.memory.fair_queue import ROUNDS
from lamina.runtime.mailbox import Mailbox
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.moves import MOVE_CHUNKS, MOVE_HEADER, BlockSpan, MoveGeometry, MoveHeader
from lamina.wire.tags import Kind, Tag, pack
from lamina.wire.tenants import Send

if TYPE_CHECKING:
    from lamina.memory.tenant import Tenant

_REFUSED = 1
"""The slot in the tag of a credit whose chunk was not wanted. That of others is 0."""


class Sending:
    """A transfer on its way out: how many of its pieces were sent, and the reason if it has ended early."""

    def __init__(self, message: Send) -> None:
        self.message = message
        self.sent = 0
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        """The transfer has ended; the first reason stays."""
        self.failure = self.failure or reason


class SendingLane:
    """Sends blocks of ``tenant`` over ``link``, one transfer after the other.

    What the link delivers on its lanes goes to `on_tag`. ``on_end`` is told the number of every transfer that has
    ended, with the reason if it has failed.
    """

    def __init__(
        self,
        link: Link,
        tenant: Tenant,
        chunks: RemoteRegion,
        peer_timeout: float,
        on_end: Callable[[int, str | None], None],
    ) -> None:
        """``peer_timeout``: the seconds that the other node may take to store a chunk."""
        self._link = link
        self._tenant = tenant
        self._peer_timeout = peer_timeout
        self._on_end = on_end
        self._geometry = g = MoveGeometry.of(tenant.attach)
        self._remote = chunks
        self._buffer = views.outgoing(link, chunks, MOVE_CHUNKS * g.chunk_bytes)
        self._parts = views.parts(self._buffer, MOVE_CHUNKS, g.chunk_bytes, torch.uint8)
        self._idle: Mailbox[int] = Mailbox()
        for i in range(MOVE_CHUNKS):
            self._idle.put(i)
        self._queue: Mailbox[Sending] = Mailbox()
        self._known: dict[int, Sending] = {}
        """The transfers that have not ended."""
        self._now: Sending | None = None
        """The transfer that is sent now: all chunks that are on their way belong to it."""

    def send(self, message: Send) -> None:
        """Send blocks when all that was asked for before is there."""
        self._known[message.transfer] = sending = Sending(message)
        self._queue.put(sending)

    def forget(self, transfer: int) -> None:
        """Stop a transfer. Its end is not told."""
        if (sending := self._known.pop(transfer, None)) is not None:
            sending.fail("it was given up")

    async def run(self) -> None:
        """Send until cancelled. TransportError if the other node does not take chunks any more."""
        while True:
            self._now = sending = await self._queue.get()
            await self._send(sending)
            if self._known.pop(sending.message.transfer, None) is not None:
                self._on_end(sending.message.transfer, sending.failure)

    async def _send(self, sending: Sending) -> None:
        g, blocks = self._geometry, sending.message.blocks
        while sending.sent < g.pieces(blocks) and sending.failure is None:
            i = await self._free_buffer()
            try:
                nbytes, _ = await self._tenant.share.run(self._stage, i, sending)
            except UsageError as error:  # the sequence is over, or never had these blocks
                sending.fail(str(error))
                self._idle.put(i)
                break
            offset = i * g.chunk_bytes
            source = self._buffer[offset : offset + nbytes]
            self._link.write(Lane.BULK, self._remote, offset, [source], pack(Kind.CHUNK, 0, 0, i))
            await _let_others_compute()
        # All is there when all buffers have come back.
        for i in [await self._free_buffer() for _ in range(MOVE_CHUNKS)]:
            self._idle.put(i)

    async def _free_buffer(self) -> int:
        try:
            async with asyncio.timeout(self._peer_timeout):
                return await self._idle.get()
        except TimeoutError:
            raise TransportError(f"{self._link} has stored no block within {self._peer_timeout:g} s") from None

    def _stage(self, i: int, sending: Sending) -> int:
        """Copy as many pieces as fit to a buffer, and return the bytes to send. Those of a sequence that goes on do not
        change, as they are full."""
        told, backend = sending.message, self._tenant.backend
        tables = backend.cache.full_blocks(told.sequence, told.first, told.blocks)
        first, stop = sending.sent, MOVE_HEADER
        for span in self._geometry.spans(told.blocks, first):
            blocks = tables[backend.cache.group_of(span.layer)][span.start : span.stop]
            plain = _plain(self._parts[i], span, self._geometry)
            backend.read(span.layer, blocks, plain)
            sending.sent += len(blocks)
            stop = span.offset + plain.numel()
        header = MoveHeader(told.transfer, first, sending.sent - first).pack()
        start = i * self._geometry.chunk_bytes
        self._buffer[start : start + len(header)] = header
        return stop

    def on_tag(self, lane: Lane, packed: int) -> None:
        """Take in the tag of a write by the other memory node."""
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CREDIT or tag.step >= MOVE_CHUNKS:
            raise ProtocolError(f"{tag} from a memory node; expected a credit for a buffer below {MOVE_CHUNKS}")
        if tag.slot == _REFUSED and self._now is not None:
            self._now.fail(f"{self._link} does not expect it any more")
        self._idle.put(tag.step)

    def close(self) -> None:
        """Let go of the memory. `run` has ended."""
        self._buffer = memoryview(b"")
        self._parts.clear()


class ReceivingLane:
    """Stores the blocks that another memory node sends over ``link`` for ``tenant``.

    What the link delivers on its lanes goes to `on_tag`.
    """

    def __init__(self, link: Link, tenant: Tenant, answers: RemoteRegion, peer_timeout: float) -> None:
        """Credits are written to ``answers``. ``peer_timeout``: the seconds that the other node may take between two
        chunks of a transfer."""
        self._link = link
        self._tenant = tenant
        self._answers = answers
        self._peer_timeout = peer_timeout
        self._geometry = g = MoveGeometry.of(tenant.attach)
        self.region = Region("moves", MOVE_CHUNKS * g.chunk_bytes)
        self._parts = views.parts(self.region.buffer, MOVE_CHUNKS, g.chunk_bytes, torch.uint8)
        self._arrived: Mailbox[int] = Mailbox()
        self._begun: Arriving | None = None
        """The transfer of which some pieces have come."""

    async def run(self) -> None:
        """Store until cancelled. ProtocolError for what the other node must not send."""
        while True:
            i = await self._next()
            header = MoveHeader.unpack(self.region.buffer[i * self._geometry.chunk_bytes :])
            arriving = self._tenant.arriving.get(header.transfer)
            if arriving is not None:
                self._begun = arriving
                stored, _ = await self._tenant.share.run(self._store, i, header, arriving)
                if not stored:
                    arriving = None
                elif arriving.received == self._geometry.pieces(arriving.blocks):
                    self._begun = None
                    self._tenant.end_arrival(arriving, None)
            self._link.write(Lane.BULK, self._answers, 0, [], pack(Kind.CREDIT, 0 if arriving else _REFUSED, 0, i))
            await _let_others_compute()

    async def _next(self) -> int:
        """Wait for a chunk; a transfer whose next one does not come ends meanwhile."""
        if (begun := self._begun) is not None:
            try:
                async with asyncio.timeout(self._peer_timeout):
                    return await self._arrived.get()
            except TimeoutError:
                self._begun = None
                self._tenant.end_arrival(begun, f"{self._link} has sent no block within {self._peer_timeout:g} s")
        return await self._arrived.get()

    def _store(self, i: int, header: MoveHeader, arriving: Arriving) -> bool:
        """Store a chunk; return False for a transfer that is not expected any more."""
        backend = self._tenant.backend
        if header.transfer not in self._tenant.arriving:
            return False
        if header.first != arriving.received:
            raise ProtocolError(
                f"{self._link} sends piece {header.first} of transfer {header.transfer}; expected {arriving.received}"
            )
        tables = backend.cache.transfers.blocks(header.transfer)
        for span in self._geometry.spans(arriving.blocks, header.first):
            blocks = tables[backend.cache.group_of(span.layer)][span.start : span.stop]
            backend.write(span.layer, blocks, _plain(self._parts[i], span, self._geometry))
            arriving.received += len(blocks)
        if arriving.received != header.first + header.pieces:
            raise ProtocolError(
                f"{self._link} sends {header.pieces} pieces of transfer {header.transfer} in one chunk; expected "
                f"{arriving.received - header.first}"
            )
        return True

    def on_tag(self, lane: Lane, packed: int) -> None:
        """Take in the tag of a write by the other memory node."""
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CHUNK or tag.step >= MOVE_CHUNKS:
            raise ProtocolError(f"{tag} from a memory node; expected a chunk in a buffer below {MOVE_CHUNKS}")
        self._arrived.put(tag.step)

    def close(self, reason: str) -> None:
        """A transfer that was under way has ended. `run` has ended too."""
        if self._begun is not None:
            self._tenant.end_arrival(self._begun, reason)
        self.region.close()
        self._parts.clear()


class Arriving:
    """A transfer that is expected, until all of it is there. ``on_end`` is told of that, or why it will not be."""

    def __init__(self, transfer: int, blocks: int, on_end: Callable[[int, str | None], None]) -> None:
        self.transfer = transfer
        self.blocks = blocks
        self.on_end = on_end
        self.received = 0
        """The pieces that are there."""


def _plain(part: Tensor, span: BlockSpan, geometry: MoveGeometry) -> Tensor:
    """Return a view of some blocks in a chunk, uint8 [blocks, bytes]."""
    return views.shaped(part, (span.stop - span.start, geometry.piece_bytes[span.layer]), span.offset)


async def _let_others_compute() -> None:
    """Let the steps compute that have come meanwhile: moves give way to them after each chunk."""
    for _ in range(ROUNDS):
        await asyncio.sleep(0)
