"""The link between two nodes: a control connection, and the lanes of the transport on which they agreed.

This module contains what all transports have in common: messages, heartbeats, the peer's death, regions and their
numbers, callbacks, and the order in which a link ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVarTuple

from lamina.errors import ConfigError, PeerLostError, PeerSilentError, ProtocolError, TransportError, UsageError
from lamina.transport.base import MAX_REGIONS, MAX_TAG, Lane, LinkInfo, LinkState, Region, RemoteRegion
from lamina.transport.connection import Connection, hear_out
from lamina.transport.frames import HEADER_BYTES, HEARTBEAT_FRAME, Event, FrameReceiver, Note, message_frame, note_frame
from lamina.transport.lanes import Lanes
from lamina.transport.messages import MAX_MESSAGE
from lamina.transport.owned import OwnedLink
from lamina.transport.stream import TcpStream

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEARTBEATS_PER_TIMEOUT = 4
CLOSE_DEADLINE_S = 5.0
_HEARTBEAT = memoryview(HEARTBEAT_FRAME)

Ts = TypeVarTuple("Ts")


class NodeLink(OwnedLink):
    """The implementation of ``Link``. ``connect`` and ``Listener`` make it when both ends have agreed.

    The lanes may have a loop of their own, in another thread. ``_in_lane_loop`` calls a function in that thread,
    ``_in_own_loop`` calls one in the link's. ``write`` and the methods under "what the lanes report" are called in the
    thread of the lanes, all other methods in the link's.
    """

    def __init__(
        self,
        info: LinkInfo,
        control: TcpStream,
        lanes: Lanes | None,
        *,
        peer_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        """The peer tolerates ``heartbeat_timeout`` seconds of silence, this end ``peer_timeout`` seconds."""
        super().__init__(info)
        self._loop = self._lane_loop = asyncio.get_running_loop()
        self._control = Connection(control, FrameReceiver({}, MAX_MESSAGE), self._on_frame, self._control_failed)
        self._lanes = lanes
        self._exposed = 0
        self._known: dict[int, int] = {}
        """The size of each region of the peer, by key."""
        self._reading = False
        self._lanes_closed = asyncio.Event()
        self._said_bye = False
        self._peer_bye: tuple[int, int] | None = None
        """The number of writes that the peer sent on each lane, once it has said that no more will come."""
        self._ended = asyncio.Event()

        # Silence is counted in periods rather than seconds. No period passes while this process is stopped or its loop
        # is blocked, so the peer is not blamed for what this end could not hear.
        self._peer_timeout = peer_timeout
        self._period = min(peer_timeout, heartbeat_timeout) / HEARTBEATS_PER_TIMEOUT
        self._silent_periods = 0
        self._heard_bytes = 0
        self._timer = self._loop.call_later(self._period, self._each_period)

    # -- Link

    @property
    def state(self) -> LinkState:
        pending, lanes = self._control.pending_bytes, self._lanes
        if lanes is None:
            return LinkState(not self._open, self._error, pending, (0, 0), (0, 0))
        (sent, sent_bulk), (heard, heard_bulk) = lanes.bytes_written, lanes.bytes_received
        pending += sum(lanes.pending_bytes)
        return LinkState(not self._open, self._error, pending, (sent, sent_bulk), (heard, heard_bulk))

    def deliver(
        self,
        *,
        on_message: Callable[[dict[str, Any]], None] | None = None,
        on_tag: Callable[[Lane, int], None] | None = None,
        on_lost: Callable[[TransportError], None] | None = None,
        lane_loop: asyncio.AbstractEventLoop | None = None,
        peer_timeout: float | None = None,
    ) -> None:
        if lane_loop is not None:
            if self._reading:
                raise UsageError(f"the lanes of {self} are in use already: give lane_loop in the first call of deliver")
            self._lane_loop = lane_loop
        if peer_timeout is not None:
            self._peer_timeout = peer_timeout
        self._on_message, self._on_tag, self._on_lost = on_message, on_tag, on_lost
        if self._lost is not None:
            self._loop.call_soon(self._tell_lost)
        self._start_reading()

    def expose(self, region: Region) -> RemoteRegion:
        self._check_open()
        lanes = self._require_lanes()
        if self._exposed == MAX_REGIONS:
            raise ConfigError(f"the link to {self} exposes {MAX_REGIONS} regions already; more are not allowed")
        key = self._exposed + 1
        details = lanes.expose(key, region)
        self._exposed = key
        self._note({"region": [key, region.nbytes, details]})
        return RemoteRegion(key, region.name, region.nbytes)

    def window(self, remote: RemoteRegion) -> memoryview | None:
        self._check_open()
        self._check_known(remote)
        return self._require_lanes().window(remote.key)

    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        if not self._open:
            self._check_open()
        nbytes = 0
        pieces = []
        for buffer in buffers:
            piece = memoryview(buffer)
            if piece.nbytes:
                if not piece.c_contiguous:
                    raise ProtocolError(
                        f"a write to region {remote.name!r} of {self} from memory that is not contiguous"
                    )
                if piece.ndim != 1 or piece.format != "B":
                    piece = piece.cast("B")
                pieces.append(piece)
                nbytes += piece.nbytes
        if self._known.get(remote.key) != remote.nbytes:
            self._check_known(remote)
        if not 0 <= offset <= offset + nbytes <= remote.nbytes:
            raise ProtocolError(
                f"bytes {offset}..{offset + nbytes} are outside region {remote.name!r} of {self}, "
                f"which has {remote.nbytes}"
            )
        if not 0 <= tag <= MAX_TAG:
            raise ProtocolError(f"tag {tag} is outside 0..{MAX_TAG}")
        assert self._lanes is not None, "else no region is known"
        self._lanes.write(lane, remote.key, offset, pieces, nbytes, tag)

    def send(self, message: dict[str, Any]) -> None:
        self._check_open()
        frame = message_frame(message, MAX_MESSAGE)
        self._control.push([memoryview(frame)], len(frame))

    async def close(self) -> None:
        opened = self._open
        self._open = False
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                if opened and not self._ended.is_set():
                    await self._say_bye()
                await self._ended.wait()
                if self._lanes is not None:
                    await self._lanes_closed.wait()
        except TransportError:
            pass  # the link ended in another way meanwhile
        except TimeoutError:
            self._fail(TransportError(f"{self} did not close the link within {CLOSE_DEADLINE_S:g} s"))
        finally:
            self._end(TransportError(f"closing the link to {self} was cancelled"))

    # -- what the lanes report

    def delivered(self, lane: Lane, tag: int) -> None:
        on_tag = self._on_tag
        if on_tag is not None and self._open:
            try:
                on_tag(lane, tag)
            except Exception as error:
                self._on_tag = None
                self._in_own_loop(self._callback_failed, error)
        if self._peer_bye is not None:
            self._count_received()

    def _count_received(self) -> None:
        received = tuple(self._lanes.tags_received) if self._lanes else (0, 0)
        self._in_own_loop(self._received_of_bye, received)

    def lanes_failed(self, error: TransportError) -> None:
        self._in_own_loop(self._lanes_failed, error)

    def send_note(self, note: dict[str, Any]) -> None:
        self._in_own_loop(self._note, {"lanes": note})

    def _take_note(self, note: dict[str, Any]) -> None:
        assert self._lanes is not None
        try:
            self._lanes.take_note(note)
        except ProtocolError as error:
            self._in_own_loop(self._fail, ProtocolError(f"{self}: {error}"))

    def _close_lanes(self, reason: TransportError) -> None:
        assert self._lanes is not None
        self._lanes.close(reason)
        self._in_own_loop(self._lanes_closed.set)

    # -- what arrives on the control connection

    def _on_frame(self, event: Event) -> None:
        try:
            if isinstance(event, Note):
                self._on_note(event)
            elif isinstance(event, dict) and self._open and self._on_message is not None:
                self._on_message(event)
        except ProtocolError as error:
            if isinstance(event, Note):
                self._fail(ProtocolError(f"{self}: {error}"))
            else:
                self._callback_failed(error)
        except Exception as error:
            self._callback_failed(error)

    def _on_note(self, note: Note) -> None:
        match note:
            case {"region": [int(key), int(nbytes), dict(details)]}:
                number = len(self._known) + 1
                if key != number or key > MAX_REGIONS or not 0 < nbytes < 2**63:
                    raise ProtocolError(f"the peer exposed region {key} of {nbytes} bytes where {number} was expected")
                if self._lanes is None:
                    raise ProtocolError("the peer exposed a region on a link without lanes")
                self._lanes.learn(key, nbytes, details)
                self._known[key] = nbytes
            case {"lanes": dict(details)} if self._lanes is not None:
                self._in_lane_loop(self._take_note, details)
            case {"bye": [int(decode), int(bulk)]} if decode >= 0 and bulk >= 0:
                self._peer_bye = (decode, bulk)
                self._in_lane_loop(self._count_received)
            case {"gone": True} if not self._open:
                self._end(None)
            case _:
                raise ProtocolError(f"the peer sent a note of an unknown kind: {dict(note)!r:.200}")

    def _received_of_bye(self, received: tuple[int, ...]) -> None:
        """End the link if all has arrived that the peer sent before its goodbye."""
        if received != self._peer_bye:
            return
        if self._open:
            # Without an answer the peer would take the silence of this end for a death. What is queued here is lost.
            self._note({"gone": True})
            self._fail(PeerLostError(f"{self} closed the link"), said_goodbye=True)
        elif self._said_bye:
            self._end(None)

    def _lanes_failed(self, error: TransportError) -> None:
        """A lane may end before the goodbye has been read from the control connection: read that first."""
        if not self._said_bye and self._peer_bye is None:
            hear_out(self._control.receive)
        if not self._said_bye:
            self._fail(self._of_peer(error))

    def _control_failed(self, error: TransportError) -> None:
        if isinstance(error, ProtocolError):
            self._fail(self._of_peer(error))
            return
        if not self._apart:
            # What the peer wrote before it died may still lie in the lanes; the owner gets it first.
            hear_out(self._poll)
        self._fail(self._of_peer(error))

    def _of_peer(self, error: TransportError) -> TransportError:
        """The same error with the peer's name: "m0 ... is gone", or "m0 ...: it sent nonsense"."""
        return type(error)(f"{self} {error}" if isinstance(error, PeerLostError) else f"{self}: {error}")

    # -- the end

    async def _say_bye(self) -> None:
        self._start_reading()
        if self._apart:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._drain_all(), self._lane_loop))
        else:
            await self._drain_all()
        self._note({"bye": list(self._lanes.tags_written) if self._lanes else [0, 0]})
        await self._control.drain()
        self._said_bye = True
        if self._peer_bye is not None:
            self._in_lane_loop(self._count_received)

    async def _drain_all(self) -> None:
        if self._lanes is not None:
            for lane in Lane:
                await self._lanes.drain(lane)

    def _end(self, error: TransportError | None) -> bool:
        if self._ended.is_set():
            return False
        self._open = False
        self._error = error
        self._let_go()
        self._ended.set()
        self._timer.cancel()
        reason = error or TransportError(f"the link to {self} is closed")
        self._control.close(reason)
        if self._lanes is not None:
            (self._in_lane_loop if self._reading else self._in_own_loop)(self._close_lanes, reason)
        return True

    # -- inside

    def _start_reading(self) -> None:
        if self._reading or self._ended.is_set():
            return
        self._reading = True
        if self._lanes is not None:
            self._in_lane_loop(self._lanes.start, self)
        self._control.start_reading()

    def _poll(self) -> bool:
        """Receive and deliver what has arrived on the lanes, without waiting; True if anything had."""
        lanes = self._lanes
        return lanes is not None and self._reading and not self._ended.is_set() and lanes.poll()

    @property
    def _apart(self) -> bool:
        return self._lane_loop is not self._loop

    def _in_lane_loop(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call ``function`` in the loop of the lanes; at once, if that is the link's own."""
        if self._apart:
            _hand_over(self._lane_loop, function, *arguments)
        else:
            function(*arguments)

    def _in_own_loop(self, function: Callable[[*Ts], object], *arguments: *Ts) -> None:
        """Call ``function`` in the link's own loop; at once, if the lanes share it."""
        if self._apart:
            _hand_over(self._loop, function, *arguments)
        else:
            function(*arguments)

    def _each_period(self) -> None:
        self._timer = self._loop.call_later(self._period, self._each_period)
        if self._reading:
            # Some loops run timers before sockets, so bytes may have arrived that were not read: read before judging.
            self._control.receive()
            if not self._apart:
                self._poll()
            if self._ended.is_set():
                return
            heard_bytes = self._control.bytes_received + sum(self._lanes.bytes_received if self._lanes else ())
            self._silent_periods = 0 if heard_bytes != self._heard_bytes else self._silent_periods + 1
            self._heard_bytes = heard_bytes
            if self._silent_periods * self._period >= self._peer_timeout:
                self._fail(PeerSilentError(f"{self} has been silent for {self._peer_timeout:.1f} s"))
                return
        if not self._control.pending_bytes:
            self._control.push([_HEARTBEAT], HEADER_BYTES)

    def _note(self, note: dict[str, Any]) -> None:
        frame = note_frame(note)
        self._control.push([memoryview(frame)], len(frame))

    def _require_lanes(self) -> Lanes:
        if self._lanes is None:
            raise ConfigError(f"the link to {self} only carries messages: it was made with kind 'control'")
        return self._lanes

    def _check_known(self, remote: RemoteRegion) -> None:
        if self._known.get(remote.key) != remote.nbytes:
            raise ProtocolError(f"{self} has exposed no region {remote.name!r} of {remote.nbytes} bytes")


def _hand_over(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed, and with it all that it would have told
        loop.call_soon_threadsafe(function, *arguments)
