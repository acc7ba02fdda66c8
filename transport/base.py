"""The contract of a link: what every transport promises, and what ``testing`` checks.

- The receiving end owns the memory, a ``Region``, and describes it to the peer once, at set-up. After that nothing is
  negotiated, allocated or serialised for a write.
- A write is one-sided. The peer sees its tag when all its bytes have arrived, never before.
- Each of the two lanes is ordered. No order is promised between the lanes, nor between writes and control messages,
  which travel on a connection of their own. Messages are ordered among themselves.
- No call waits. What the medium does not take at once is queued, without a copy.
- A link ends once, and its owner learns why: the peer closed it, died, fell silent or broke the protocol.

A link belongs to the thread of the event loop in which it was made: it is called there and calls back there.
``Link.deliver`` can give its lanes to the loop of another thread, the one that computes. That thread then writes and
receives tags itself, without a detour through the first.
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
"""One end may expose this many regions on one link."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Operations that must be impossible on the file of a region before another process may rely on it."""


class Lane(enum.IntEnum):
    """Each lane is ordered; bulk delays decode by one bounded chunk at most."""

    DECODE = 0
    """Carries what a step waits for: step plans, q, k, v, o, and the carries between compute nodes."""
    BULK = 1
    """Carries the keys and values of prompts."""


@dataclass(frozen=True)
class Hello:
    """How an end introduces itself. The transport does not interpret it; ``details`` holds plain values."""

    role: str
    name: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Both end up in log lines and error messages, where a line break, a quote or a megabyte would do harm.
        for what, text, limit in (("role", self.role, 32), ("name", self.name, 128)):
            if not (isinstance(text, str) and 0 < len(text) <= limit and text.isprintable() and '"' not in text):
                raise ConfigError(
                    f"the {what} of a node must be 1 to {limit} printable characters without quotes, got {text!r:.200}"
                )
        if not isinstance(self.details, dict):
            raise ConfigError(f"the details of a node must be a map, got {type(self.details).__name__}")


class RemoteRegion(NamedTuple):
    """The description of a region at the other end: a plain tuple that travels once, in a control message."""

    key: int
    name: str
    nbytes: int

    @classmethod
    def from_wire(cls, value: object) -> RemoteRegion:
        """Check a description that came in a control message. Raises ProtocolError."""
        match value:
            case [int(key), str(name), int(nbytes)] if 0 <= key < 2**32 and 0 < nbytes < 2**63 and len(name) <= 128:
                return cls(key, name, nbytes)
        raise ProtocolError(f"expected the description of a region (key, name, nbytes), got {value!r:.200}")


class Region:
    """Memory of this process that peers may be allowed to write.

    One region may be exposed on several links. Close the links before the region: a peer may still write to the memory
    of a closed region, and those bytes are lost.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        """Map page-aligned, zeroed memory. Its pages are allocated at the first touch.

        Raises CapacityError where the memory cannot be mapped.
        """
        if nbytes < 1:
            raise ConfigError(f"region {name!r} must have at least one byte, got {nbytes}")
        try:
            fd = os.memfd_create("lamina", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._close_file = weakref.finalize(self, os.close, fd)
            os.ftruncate(fd, nbytes)
            # Another process that maps the file could otherwise shorten it, and a touch of the missing part kills.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            memory = mmap.mmap(fd, nbytes)
            memory.madvise(mmap.MADV_DONTFORK)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"no memory for the {nbytes} bytes of region {name!r}: {error}") from error
        self.name = name
        self.nbytes = nbytes
        self.fd = fd
        """The file behind the memory, which other processes of this host can map."""
        self._buffer: memoryview | None = memoryview(memory)

    @property
    def buffer(self) -> memoryview:
        """The bytes of the region, writable, format ``B``. Raises TransportError when the region is closed."""
        if self._buffer is None:
            raise TransportError(f"region {self.name!r} is closed")
        return self._buffer

    def close(self) -> None:
        """Release the memory. It is unmapped with its last view, so views that were handed out stay valid."""
        self._buffer = None
        self._close_file()


def address_of(view: memoryview) -> int:
    """The address of the first byte of a writable view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class LinkInfo(NamedTuple):
    """The facts about a link that never change."""

    local: Hello
    peer: Hello
    address: str
    """The peer's address."""
    transport: str
    """The transport of the lanes: ``rdma``, ``shm`` or ``tcp``; ``control`` for a link without lanes."""
    choice: str
    """A sentence for the log: what each end asked for, which transport was taken, and why."""


class LinkState(NamedTuple):
    """A snapshot of a link, which stays as it is."""

    closed: bool
    """Whether nothing can be sent any more."""
    error: TransportError | None
    """The reason why the link ended; None while it lives and after a complete ``close``."""
    pending_bytes: int
    """Bytes of writes and messages that the medium has not taken. The link sets no limit; the caller may."""
    bytes_written: tuple[int, int]
    """Bytes of writes that the medium has taken so far, framing included, by lane."""
    bytes_received: tuple[int, int]
    """Bytes of writes that have arrived so far, framing included, by lane."""


class Link(ABC):
    """A connection to one other node.

    The link starts to read with the first ``deliver``. It drops what arrives for a callback that was not given. A
    callback that raises ends the link with that error, because the work that it should have done is missing.

    A link ends once. ``close`` and ``abort`` of this end are silent; any other end calls ``on_lost`` exactly once.
    After the end no other callback is called, and every operation raises.

    ``close`` and ``abort`` are two methods because they promise different things. ``close`` sends what is queued and
    waits for the peer, so it is a coroutine. ``abort`` can be called anywhere, also inside a callback, and the link
    has ended when it returns.
    """

    @property
    @abstractmethod
    def info(self) -> LinkInfo:
        """The names of both ends, and how bytes travel between them."""

    @property
    @abstractmethod
    def state(self) -> LinkState:
        """A snapshot of the link. It can be read after the end too."""

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

        The first call starts the reading, in the next round of the loop. A later call hands the link to another owner:
        it replaces all three callbacks.

        - ``on_message`` receives each control message: a map of bounded plain values, not validated any further.
        - ``on_tag`` receives lane and tag when all bytes of a write are in the region.
        - ``on_lost`` receives the error when the link ends for a reason other than this end's close or abort. If the
          link has already ended so, the callback is called in the next round of the loop.
        - ``lane_loop`` is the loop in whose thread the owner calls ``write`` and the link calls ``on_tag``. It must run
          until the link is closed. The default is the link's own loop. Only the first call may name another;
          a later call raises UsageError.
        - ``peer_timeout`` is the silence, in seconds, after which the link takes the peer for dead. None leaves it
          unchanged.
        """

    # -- what is sent

    @abstractmethod
    def expose(self, region: Region) -> RemoteRegion:
        """Allow the peer to write ``region`` from now on.

        The caller sends the result to the peer in a control message.
        """

    @abstractmethod
    def window(self, remote: RemoteRegion) -> memoryview | None:
        """The peer's region itself where the transport maps it into this process (shm); None where it does not.

        A caller that computes straight into the window passes that slice of it to ``write``, and nothing is copied.
        """

    @abstractmethod
    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        """Put ``buffers``, one after the other, at byte ``offset`` of a region of the peer, then deliver ``tag`` there.

        Writes are ordered within their lane, and the tag (32 bits, unsigned) comes after all bytes. The call never
        waits. What the medium does not take at once is queued without a copy, so the caller must not change the buffers
        before the peer has answered or ``state.pending_bytes`` is 0. If ``buffers`` is empty, only the tag travels.

        Raises ProtocolError, before anything is sent, for an offset, length or tag out of range, and the link's error
        after its end. A failure of the network is not raised here; ``on_lost`` reports it.
        """

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Send a control message. Messages are ordered among themselves only. The call never waits.

        Raises ProtocolError for a message of more than ``MAX_MESSAGE`` bytes, or one that cannot be encoded.
        """

    # -- the end

    @abstractmethod
    async def close(self) -> None:
        """Send what is queued, say goodbye, and wait until the peer has closed too, within a deadline.

        It never raises a TransportError: a queue that cannot be sent is logged, and ``state`` holds the error. It may
        be called twice. Cancelling it ends the link at once.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End the link now. What is queued is lost; ``reason`` goes into the log and into ``state``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
