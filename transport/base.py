"""The contract: what every transport promises, and what ``testing`` checks of each of them.

- Whoever will be written to owns the memory, a ``Region``, and describes it to the peer once, at set-up. After that
  nothing is negotiated, allocated or serialised for a write.
- A write is one-sided. Its tag is seen at the far side when all its bytes are, never before.
- Each of the two lanes is ordered in itself. Between the lanes no order is promised, nor between writes and control
  messages, which travel on a connection of their own; messages are ordered among themselves.
- Nothing waits inside a call. What the medium does not take at once is queued, without a copy.
- A link ends once, and whoever waits on it learns why, whether the peer closed, died, fell silent or sent nonsense.

A link belongs to the thread of the event loop that it was made in: call it there, and callbacks come there. Its lanes
may be given to the loop of another thread, the one that computes, by ``Link.deliver``: then that thread writes and is
told of tags itself, without a way through the first.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import fcntl
import logging
import mmap
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from lamina.errors import CapacityError, ConfigError, ProtocolError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("lamina.transport")

MAX_TAG = 2**32 - 1
MAX_REGIONS = 1024
"""Regions that one end may expose on one link."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""What must be impossible with the file of a region before another process relies on it."""


class Lane(enum.IntEnum):
    """Each lane is ordered in itself; bulk never delays decode by more than one bounded chunk."""

    DECODE = 0
    """What every layer of a step waits for: step plans, q, k, v, o and carries."""
    BULK = 1
    """Prefilled and moved KV."""


@dataclass(frozen=True)
class Hello:
    """What an end says about itself. The transport does not interpret it; ``details`` holds plain values."""

    role: str
    name: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # They end up in log lines and error messages, where a line break, a quote or a megabyte would do harm.
        for what, text, limit in (("role", self.role, 32), ("name", self.name, 128)):
            if not (isinstance(text, str) and 0 < len(text) <= limit and text.isprintable() and '"' not in text):
                raise ConfigError(
                    f"the {what} of a node must be 1 to {limit} printable characters but quotes, got {text!r:.200}"
                )
        if not isinstance(self.details, dict):
            raise ConfigError(f"the details of a node must be a map, got {type(self.details).__name__}")


class RemoteRegion(NamedTuple):
    """Description of a region of the other end: a plain tuple that travels in a control message, once."""

    key: int
    name: str
    nbytes: int

    @classmethod
    def from_wire(cls, value: object) -> RemoteRegion:
        """Check what came out of a control message; raises ProtocolError."""
        match value:
            case [int(key), str(name), int(nbytes)] if 0 <= key < 2**32 and 0 < nbytes < 2**63 and len(name) <= 128:
                return cls(key, name, nbytes)
        raise ProtocolError(f"expected the description of a region (key, name, nbytes), got {value!r:.200}")


class Region:
    """Memory of this process that peers may be allowed to write.

    One region may be exposed on several links. Close the links before the region: what a peer writes to a closed
    region goes into memory that nobody reads.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        """Page-aligned, zeroed memory, whose pages are taken when they are first touched; CapacityError if not."""
        if nbytes < 1:
            raise ConfigError(f"region {name!r} must have at least one byte, got {nbytes}")
        try:
            fd = os.memfd_create("lamina", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, fd)
            os.ftruncate(fd, nbytes)
            # A process that maps it too could otherwise shorten it, which kills whoever touches what is gone.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            memory = mmap.mmap(fd, nbytes)
            memory.madvise(mmap.MADV_DONTFORK)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"no memory for the {nbytes} bytes of region {name!r}: {error}") from error
        self.name = name
        self.nbytes = nbytes
        self.fd = fd
        """The file behind the memory, for processes of this host that map it too."""
        self._buffer: memoryview | None = memoryview(memory)

    @property
    def buffer(self) -> memoryview:
        """All bytes of the region, writable, format ``B``. Raises TransportError when the region is closed."""
        if self._buffer is None:
            raise TransportError(f"region {self.name!r} is closed")
        return self._buffer

    def close(self) -> None:
        """Let go of the memory. It is unmapped with the last view of it: views handed out stay valid."""
        self._buffer = None


def address_of(view: memoryview) -> int:
    """Where the first byte of a writable view lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class LinkInfo(NamedTuple):
    """What both ends agreed on when they made a link."""

    local: Hello
    peer: Hello
    address: str
    """Where the peer is."""
    transport: str
    """What moves the bytes: ``rdma``, ``shm`` or ``tcp``; ``control`` for a link without lanes."""
    choice: str
    """What either end asked for, what was taken, and why, in words."""


class LinkState(NamedTuple):
    """A snapshot of a link."""

    closed: bool
    """Whether nothing can be sent any more."""
    error: TransportError | None
    """Why the link ended; None while it lives and after a complete ``close``."""
    pending_bytes: int
    """Bytes of writes and messages that the medium has not taken; the caller bounds it if it must be bounded."""
    bytes_written: tuple[int, int]
    """Bytes of writes handed to the medium since the link exists, framing included; index with a Lane."""
    bytes_received: tuple[int, int]
    """Bytes of writes that arrived since the link exists, framing included; index with a Lane."""


class Link(ABC):
    """A connection to one other node.

    The link starts to read with the first ``deliver``. What arrives for a callback that is not given is dropped. A
    callback that raises ends the link with that error, because what it should have done is now missing.

    A link ends once: by ``close`` or ``abort`` of this end, silently, or by anything else, which calls ``on_lost``
    exactly once. From then on no other callback comes, and every operation raises. ``close`` and ``abort`` are two
    because they promise different things: the one sends what is queued and waits for the peer, so it must be awaited;
    the other may be called anywhere, also inside a callback, and has ended the link when it returns.
    """

    @property
    @abstractmethod
    def info(self) -> LinkInfo:
        """Who is at the ends, and how bytes travel; it never changes."""

    @property
    @abstractmethod
    def state(self) -> LinkState:
        """How the link is now. It stays readable after the end."""

    def __str__(self) -> str:
        peer = self.info.peer
        return f"{peer.name} ({peer.role}, {self.info.address})"

    @abstractmethod
    def deliver(
        self,
        *,
        on_message: Callable[[dict[str, Any]], None] | None = None,
        on_tag: Callable[[Lane, int], None] | None = None,
        on_lost: Callable[[TransportError], None] | None = None,
        lane_loop: asyncio.AbstractEventLoop | None = None,
        peer_timeout: float | None = None,
    ) -> None:
        """Deliver what arrives to these callbacks from now on.

        The first call starts the reading, from the next round of the loop on. A later call hands the link to another
        owner: all three callbacks are replaced.

        - ``on_message`` gets each control message: a map of bounded plain values, not validated any further.
        - ``on_tag`` gets lane and tag when all bytes of a write are in the region.
        - ``on_lost`` gets the error, once, when the link ends for a reason other than this end's close or abort. If
          it has ended so already, the new owner's ``on_lost`` is called in the next round of the loop.
        - ``lane_loop`` is the loop in whose thread ``write`` is called and ``on_tag`` calls: the link's own unless
          the first call names another, which has to run until the link is closed. UsageError in a later call.
        - ``peer_timeout`` is the silence, in seconds, after which the peer is taken for dead; None leaves it as it is.
        """

    # -- what is sent

    @abstractmethod
    def expose(self, region: Region) -> RemoteRegion:
        """Allow the peer to write ``region`` from now on; the result goes to the peer in a control message."""

    @abstractmethod
    def window(self, remote: RemoteRegion) -> memoryview | None:
        """The peer's region itself, where the transport maps it into this process (shm); None where it does not.

        Whoever computes straight into the place for which a write is meant passes that slice of the window to
        ``write``, and nothing is copied.
        """

    @abstractmethod
    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        """Put ``buffers``, one after the other, at byte ``offset`` of a region of the peer, then deliver ``tag`` there.

        One-sided and ordered within its lane; the tag (32 bits, unsigned) comes after all bytes. Never waits: what the
        medium does not take at once is queued, without a copy, so the buffers belong to the link until the peer has
        answered or nothing is pending. ``buffers`` may be empty: then only the tag travels. Raises ProtocolError,
        before anything is sent, where offset, length or tag are out of range, and the link's error when it has ended.
        A failure of the network is not raised here but reported through ``on_lost``.
        """

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Send a control message, ordered among messages only; never waits.

        Raises ProtocolError if it takes more than ``MAX_MESSAGE`` bytes or cannot be encoded.
        """

    # -- the end

    @abstractmethod
    async def close(self) -> None:
        """Send what is queued, say goodbye, and wait for the peer to close too, within a deadline.

        Never raises a TransportError: if the queue cannot be sent, that is logged and kept in ``state``. Closing twice
        is fine. When it is cancelled, the link is ended at once.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End the link now; what is queued is lost. ``reason`` goes into the log and into ``state``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
