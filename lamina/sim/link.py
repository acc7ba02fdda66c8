"""A link whose two ends are in one process: what one end writes is copied into the other's region when it arrives."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from lamina.errors import ConfigError, PeerLostError, PeerSilentError, ProtocolError, TransportError, UsageError
from lamina.sim.delivery import BYE, GONE, LOST, MESSAGE, REGION, Deliveries, Delivery, copied
from lamina.transport.base import (
    MAX_REGIONS,
    MAX_TAG,
    Lane,
    LinkInfo,
    LinkState,
    Region,
    RemoteRegion,
)
from lamina.transport.link import CLOSE_DEADLINE_S
from lamina.transport.messages import decode_message, encode_message
from lamina.transport.owned import OwnedLink

if TYPE_CHECKING:
    from typing_extensions import Buffer

Trace = Callable[[str], None]
"""Takes one line, without the time."""

_CONTROL = 2
_LANES = tuple(Lane)
_new = tuple.__new__  # a named tuple without the call of its own constructor, for each write
_KINDS = ("decode", "bulk", "message", "region", "bye", "gone", "lost")


@dataclass(frozen=True)
class LinkModel:
    """How fast a link is, in each direction.

    Each lane, and the control messages, has ``bytes_per_s`` for itself: a write takes its size by that behind the
    writes before it, and ``latency_s`` more until it arrives. ``jitter_s`` is the most that chance adds; it never
    changes an order that is promised. With ``windows`` a peer's region can be computed into, as over shared memory.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    windows: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.latency_s < math.inf and 0 <= self.jitter_s < math.inf and self.bytes_per_s > 0):
            raise ConfigError(
                f"a modelled link must have a latency and a jitter of 0 s or more and more than 0 bytes/s, got {self}"
            )

    def slowed(self, times: float) -> LinkModel:
        """The same link, on which everything takes so many times as long."""
        if times == 1:
            return self
        return replace(
            self,
            latency_s=self.latency_s * times,
            bytes_per_s=self.bytes_per_s / times,
            jitter_s=self.jitter_s * times,
        )


class SimLink(OwnedLink):
    """See ``Link``. Made in pairs by ``SimNetwork``; both ends belong to one loop.

    A write counts as written at once. It is pending until it arrives, because its bytes are copied only then: a sender
    that changes a buffer too early is found out. Nothing is added to the bytes for framing.
    """

    def __init__(
        self,
        number: int,
        info: LinkInfo,
        model: LinkModel,
        deliveries: Deliveries,
        *,
        random: Random,
        trace: Trace | None,
        peer_timeout: float,
        on_end: Callable[[SimLink], None],
    ) -> None:
        super().__init__(info)
        self._number = number
        self.change(model)
        self._deliveries = deliveries
        self._loop = deliveries.loop
        self._random = random
        self._trace = trace
        self._label = f"{info.peer.name}>{info.local.name}#{number}"
        self._on_end = on_end
        self._peer: SimLink

        self._context = copy_context()
        """That of the process which this end belongs to: what is called from here belongs to it as well."""
        self._reading = False
        self._held: list[Delivery] = []
        """What was due before this end read, or while the peer could not be heard."""

        self._exposed: list[memoryview] = []
        self._known: dict[int, int] = {}
        """Sizes of the peer's regions."""
        self._free_s = [0.0, 0.0, 0.0]
        """When the last byte of either lane, and of the control messages, has left."""
        self._last_due_s = [0.0, 0.0, 0.0]
        self._pending = 0
        self._written = [0, 0]
        self._received = [0, 0]

        self._bye_arrived = False
        self._ended = asyncio.Event()
        self._is_over = False
        """Whether it is set, which is asked for everything that arrives."""

        self._peer_timeout = peer_timeout
        self._silent_since: float | None = None
        self._judges = True
        self._silence: asyncio.TimerHandle | None = None

    def __hash__(self) -> int:
        return self._number  # so that sets of links have one order in all runs

    def __repr__(self) -> str:
        return f"<SimLink {self._label} {'open' if self._open else 'closed'}>"

    def join(self, peer: SimLink) -> None:
        """``peer`` is the other end. Called once, on both, before anything is sent."""
        self._peer = peer

    # -- Link

    @property
    def state(self) -> LinkState:
        return LinkState(
            not self._open,
            self._error,
            self._pending,
            (self._written[0], self._written[1]),
            (self._received[0], self._received[1]),
        )

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
                raise UsageError(f"the lanes of {self} are in use already; give lane_loop in the first deliver")
            if lane_loop is not self._loop:
                raise UsageError(f"the lanes of {self} belong to the loop of the network, the only one there is")
        self._on_message, self._on_tag, self._on_lost = on_message, on_tag, on_lost
        self._context = copy_context()
        if peer_timeout is not None:
            self._peer_timeout = peer_timeout
        if self._lost is not None:
            self._loop.call_soon(self._tell_lost)
        self._start_reading()

    def expose(self, region: Region) -> RemoteRegion:
        self._check_open()
        self._require_lanes()
        if len(self._exposed) == MAX_REGIONS:
            raise ConfigError(f"the link to {self} exposes {MAX_REGIONS} regions already; more are not allowed")
        self._exposed.append(region.buffer)
        key = len(self._exposed)
        self._send(_CONTROL, REGION, 0, tag=key, offset=region.nbytes)
        return RemoteRegion(key, region.name, region.nbytes)

    def window(self, remote: RemoteRegion) -> memoryview | None:
        self._check_open()
        self._check_known(remote)
        return self._peer._exposed[remote.key - 1] if self._model.windows else None

    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        if not self._open:
            self._check_open()
        nbytes = 0
        pieces = []
        for buffer in buffers:
            piece = buffer if type(buffer) is memoryview else memoryview(buffer)
            if size := piece.nbytes:
                if not piece.c_contiguous:
                    raise ProtocolError(
                        f"a write to region {remote.name!r} of {self} from memory that is not contiguous"
                    )
                if piece.ndim != 1 or piece.format != "B":
                    piece = piece.cast("B")
                pieces.append(piece)
                nbytes += size
        key, _, length = remote
        if self._known.get(key) != length:
            self._check_known(remote)
        if not 0 <= offset <= offset + nbytes <= length:
            raise ProtocolError(
                f"bytes {offset}..{offset + nbytes} are outside region {remote.name!r} of {self}, which has {length}"
            )
        if not 0 <= tag <= MAX_TAG:
            raise ProtocolError(f"tag {tag} is outside 0..{MAX_TAG}")
        self._written[lane] += nbytes
        pipe = int(lane)
        self._send(pipe, pipe, nbytes, tag, offset, self._peer._exposed[key - 1], pieces)

    def send(self, message: dict[str, Any]) -> None:
        self._check_open()
        body = encode_message(message)
        self._send(_CONTROL, MESSAGE, len(body), body=body)

    async def close(self) -> None:
        opened = self._open
        self._open = False
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                if opened:
                    self._start_reading()
                    # The goodbye comes behind all that was sent before, on whatever lane.
                    self._free_s[_CONTROL] = max(self._free_s)
                    self._last_due_s[_CONTROL] = max(self._last_due_s)
                    self._send(_CONTROL, BYE, 0)
                await self._ended.wait()
        except TimeoutError:
            self._fail(TransportError(f"{self} did not close the link within {CLOSE_DEADLINE_S:g} s"))
        finally:
            self._end(TransportError(f"closing the link to {self} was cancelled"))

    # -- for the network

    def change(self, model: LinkModel) -> None:
        """What is sent from now on takes what ``model`` says, and overtakes nothing that was sent before."""
        self._model = model
        self._is_instant = model == LinkModel(windows=model.windows)

    def vanish(self) -> None:
        """End the link as it ends with its process: no callback comes here, and the peer hears of a closed socket."""
        self._end(TransportError(f"the process {self._info.local.name} of the link to {self} was killed"))

    def hear(self, *, silent: bool, judges: bool) -> None:
        """Whether the peer cannot be heard from now on, and whether this end may take it for dead then."""
        if not silent:
            self._silent_since = None
        elif self._silent_since is None or (judges and not self._judges):
            self._silent_since = self._loop.time()
        self._judges = judges
        self._listen()

    # -- what is sent

    def _send(
        self,
        pipe: int,
        kind: int,
        nbytes: int,
        tag: int = 0,
        offset: int = 0,
        target: memoryview | None = None,
        pieces: Sequence[memoryview] = (),
        body: bytes = b"",
    ) -> None:
        now_s = left_s = due_s = self._loop.time()
        self._pending += nbytes
        if not self._is_instant:
            model = self._model
            left_s = max(now_s, self._free_s[pipe]) + nbytes / model.bytes_per_s
            self._free_s[pipe] = left_s
            due_s = left_s + model.latency_s
            if model.jitter_s:
                due_s += model.jitter_s * self._random.random()
            due_s = max(due_s, self._last_due_s[pipe])
            self._last_due_s[pipe] = due_s
        deliveries = self._deliveries
        number = deliveries.next_number()
        delivery = (due_s, number, self._peer, kind, left_s, nbytes, tag, offset, target, pieces, body)
        deliveries.push(_new(Delivery, delivery), now_s)

    # -- what arrives

    def arrive(self, delivery: Delivery) -> None:
        """See ``Receiver``."""
        if self._is_over:
            return
        if not self._reading or self._silent_since is not None:
            self._held.append(delivery)
            return
        _, _, _, kind, _, nbytes, tag, position, target, pieces, _ = delivery
        if not self._peer._is_over:
            self._peer._pending -= nbytes
        if kind >= MESSAGE:
            self._take_control(delivery)
            return
        assert target is not None, "a write has a region"
        for piece in pieces:
            end = position + len(piece)
            target[position:end] = piece
            position = end
        self._received[kind] += nbytes
        if self._trace is not None:
            self._trace(f"{self._label} {_KINDS[kind]} tag={tag} bytes={nbytes}")
        if self._open and self._on_tag is not None:
            try:
                self._context.run(self._on_tag, _LANES[kind], tag)
            except Exception as error:
                self._callback_failed(error)

    def _take_control(self, delivery: Delivery) -> None:
        kind = delivery.kind
        if kind == MESSAGE:
            self._take_message(delivery)
            return
        if self._trace is not None:
            self._trace(f"{self._label} {_KINDS[kind]}")
        if kind == REGION:
            self._known[delivery.tag] = delivery.offset
        elif kind == BYE:
            self._take_bye()
        elif kind == GONE:
            self._end(None)
        else:
            self._fail(PeerLostError(f"{self} is gone"))

    def _take_message(self, delivery: Delivery) -> None:
        try:
            message = decode_message(delivery.body)
        except ProtocolError as error:
            self._fail(ProtocolError(f"{self}: {error}"))
            return
        if self._trace is not None:
            self._trace(f"{self._label} message type={message.get('type')} bytes={delivery.nbytes}")
        if self._open and self._on_message is not None:
            try:
                self._context.run(self._on_message, message)
            except Exception as error:
                self._callback_failed(error)

    def _take_bye(self) -> None:
        """All that the peer sent before has arrived: the goodbye is the last."""
        if self._open:
            # Answered, so that the peer need not take our silence for a death. What is queued here goes nowhere.
            self._free_s[_CONTROL] = self._last_due_s[_CONTROL] = self._loop.time()
            self._send(_CONTROL, GONE, 0)
            self._fail(PeerLostError(f"{self} closed the link"), said_goodbye=True)
            return
        self._bye_arrived = True
        if self._peer._bye_arrived:
            peer = self._peer
            self._end(None)
            peer._end(None)

    def _start_reading(self) -> None:
        if not self._reading:
            self._reading = True
        self._listen()

    def _listen(self) -> None:
        """Deliver what was held, or look after a peer that cannot be heard."""
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if self._is_over or not self._reading:
            return
        if self._silent_since is None:
            if self._held:
                held, self._held = self._held, []
                self._deliveries.push_again(held)
        elif self._judges:
            self._silence = self._loop.call_at(self._silent_since + self._peer_timeout, self._silent_too_long)

    def _silent_too_long(self) -> None:
        self._fail(PeerSilentError(f"{self} has been silent for {self._peer_timeout:.1f} s"))

    # -- the end

    def _tell_lost(self) -> None:
        self._context.copy().run(super()._tell_lost)  # a copy, as this may be called from within another callback

    def _end(self, error: TransportError | None) -> bool:
        if self._is_over:
            return False
        self._open = False
        self._error = error
        self._let_go()
        self._ended.set()
        self._is_over = True
        self._held.clear()
        if self._peer._is_over:  # nobody writes to either end's regions any more
            self._exposed.clear()
            self._peer._exposed.clear()
        self._pending = 0
        if self._silence is not None:
            self._silence.cancel()
        if self._trace is not None:
            self._trace(f"{self._label} ended{f': {error}' if error is not None else ''}")
        self._on_end(self)
        self._part()
        return True

    def _part(self) -> None:
        """The peer gets what has left this end, then hears of the end."""
        peer = self._peer
        if peer._is_over:
            return
        peer._held = [copied(delivery) for delivery in peer._held]
        now_s = self._loop.time()
        last_s = max(self._deliveries.sender_ended(peer), now_s + self._model.latency_s)
        number = self._deliveries.next_number()
        self._deliveries.push(Delivery(last_s, number, peer, LOST, last_s, 0), now_s)

    def _require_lanes(self) -> None:
        if self._info.transport == "control":
            raise ConfigError(f"the link to {self} only carries messages: it was made with kind 'control'")

    def _check_known(self, remote: RemoteRegion) -> None:
        if self._known.get(remote.key) != remote.nbytes:
            raise ProtocolError(f"{self} has exposed no region {remote.name!r} of {remote.nbytes} bytes")
