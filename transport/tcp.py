"""Lanes over TCP: one connection for each lane, and no copy between a region and the kernel."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lamina.errors import ProtocolError, TransportError
from lamina.transport.base import Lane, Region
from lamina.transport.connection import Connection
from lamina.transport.frames import HEADER_BYTES, Event, FrameReceiver, write_header
from lamina.transport.lanes import Lanes, LanesOwner
from lamina.transport.options import Options
from lamina.transport.stream import TcpStream

if TYPE_CHECKING:
    from lamina.transport.handshake import Session


def offer(options: Options) -> dict[str, Any]:
    """Offer TCP, which is always possible."""
    return {}


async def upgrade(session: Session) -> Lanes:
    """Make a connection for each lane, encrypted if the control connection is."""
    decode = await session.lane(Lane.DECODE)
    try:
        bulk = await session.lane(Lane.BULK)
    except BaseException:
        decode.close()
        raise
    return TcpLanes((decode, bulk), busy_poll=session.options.busy_poll)


class TcpLanes(Lanes):
    """Both lanes of a link over TCP."""

    def __init__(self, streams: tuple[TcpStream, TcpStream], *, busy_poll: bool) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._busy_poll = busy_poll
        self._regions: dict[int, memoryview] = {}
        self._connections = tuple(
            Connection(stream, FrameReceiver(self._regions, 0), self._arrival(lane), self._failed)
            for lane, stream in zip(Lane, streams, strict=True)
        )
        self._owner: LanesOwner | None = None
        self._closed = False

    def start(self, owner: LanesOwner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        for connection in self._connections:
            connection.adopt(self._loop)
        if self._busy_poll:
            self._loop.call_soon(self._spin)
            return
        for connection in self._connections:
            connection.start_reading()

    def expose(self, key: int, region: Region) -> dict[str, Any]:
        self._regions[key] = region.buffer
        return {}

    def learn(self, key: int, nbytes: int, details: dict[str, Any]) -> None:
        """Keep nothing: a write names its region by key, and the receiving end checks it."""

    def window(self, key: int) -> memoryview | None:
        return None

    def write(self, lane: Lane, key: int, offset: int, pieces: list[memoryview], nbytes: int, tag: int) -> None:
        pieces.insert(0, memoryview(write_header(key, offset, nbytes, tag)))
        self.tags_written[lane] += 1
        self._connections[lane].push(pieces, HEADER_BYTES + nbytes)

    def poll(self) -> bool:
        decode, bulk = self._connections
        heard = decode.receive()
        return bulk.receive() or heard

    @property
    def pending_bytes(self) -> list[int]:  # type: ignore[override]
        return [connection.pending_bytes for connection in self._connections]

    @property
    def bytes_written(self) -> list[int]:  # type: ignore[override]
        return [connection.bytes_written for connection in self._connections]

    @property
    def bytes_received(self) -> list[int]:  # type: ignore[override]
        return [connection.bytes_received for connection in self._connections]

    async def drain(self, lane: Lane) -> None:
        await self._connections[lane].drain()

    def close(self, error: TransportError) -> None:
        self._closed = True
        self._regions.clear()
        for connection in self._connections:
            connection.close(error)

    def _arrival(self, lane: Lane) -> Any:
        received = self.tags_received

        def deliver(event: Event) -> None:
            if type(event) is int:
                received[lane] += 1
                assert self._owner is not None
                self._owner.delivered(lane, event)
            else:
                self._failed(ProtocolError(f"the peer sent {event!r:.100} on a lane, where only writes travel"))

        return deliver

    def _failed(self, error: TransportError) -> None:
        if not self._closed and self._owner is not None:
            self._owner.lanes_failed(error)

    def _spin(self) -> None:
        if not self._closed:
            self.poll()
            self._loop.call_soon(self._spin)
