"""What every transport promises.

Everything here belongs to the thread of the event loop: call it there, and callbacks come there. The one exception
in sight is ``Link.poll``, which a device thread may one day call for itself while the loop leaves the link alone.
"""

from __future__ import annotations

import enum
import logging
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from lamina.errors import CapacityError, ConfigError, ProtocolError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("lamina.transport")

MAX_TAG = 2**32 - 1


class Lane(enum.IntEnum):
    """Each lane is ordered in itself; bulk never delays decode by more than one bounded chunk."""

    DECODE = 0
    """q, k, v, o and control messages."""
    BULK = 1
    """Prefilled and moved KV."""


@dataclass(frozen=True)
class Hello:
    """What an end says about itself. The transport does not interpret it; ``details`` holds plain values."""

    role: str
    name: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # They end up in log lines and error messages, where a line break or a megabyte would do harm.
        for what, text, limit in (("role", self.role, 32), ("name", self.name, 128)):
            if not (isinstance(text, str) and 0 < len(text) <= limit and text.isprintable()):
                raise ConfigError(f"the {what} of a node must be 1 to {limit} printable characters, got {text!r:.200}")
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
    """Page-aligned, zeroed memory of this process that peers may be allowed to write.

    The pages are taken when they are first touched. One region may be exposed on several links. Close the links
    before the region: what a peer writes to a closed region goes into memory that nobody reads.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        if nbytes < 1:
            raise ConfigError(f"region {name!r} must have at least one byte, got {nbytes}")
        self.name = name
        self.nbytes = nbytes
        try:
            # Private, because a forked child must not share it; anonymous pages may also become huge pages.
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise CapacityError(f"no memory for the {nbytes} bytes of region {name!r}: {error}") from error
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


class Link(ABC):
    """A connection to one other node.

    The owner sets ``on_tag``, ``on_message`` and ``on_lost`` together, right after ``connect`` returned or inside
    ``on_link``: the link starts to read when the first of them is set, and what arrives for one that is not set is
    dropped. A callback that raises ends the link with that error, because what it should have done is now missing.

    A link ends once: by ``close`` or ``abort`` of this end, silently, or by anything else, which calls ``on_lost``
    exactly once. From then on no other callback comes, and every operation raises.
    """

    transport: ClassVar[str]
    """Name of the implementation: ``tcp``."""
    peer_timeout: float
    """Silence, in seconds, after which the peer is taken for dead. The owner may change it at any time."""

    def __init__(self, local: Hello, peer: Hello, peer_address: str) -> None:
        self.local = local
        self.peer = peer
        self.peer_address = peer_address
        self.error: TransportError | None = None
        """Why the link ended; None while it lives and after a complete ``close``."""
        self._open = True
        self._regions: dict[int, memoryview] = {}
        self._on_tag: Callable[[Lane, int], None] | None = None
        self._on_message: Callable[[dict[str, Any]], None] | None = None
        self._on_lost: Callable[[TransportError], None] | None = None

    def __str__(self) -> str:
        return f"{self.peer.name} ({self.peer.role}, {self.peer_address})"

    # -- what arrives

    @property
    def on_tag(self) -> Callable[[Lane, int], None] | None:
        """Called with lane and tag when all bytes of a write are in the region."""
        return self._on_tag

    @on_tag.setter
    def on_tag(self, callback: Callable[[Lane, int], None] | None) -> None:
        self._on_tag = callback
        self._start_reading()

    @property
    def on_message(self) -> Callable[[dict[str, Any]], None] | None:
        """Called with a control message: a map of bounded plain values, not validated any further."""
        return self._on_message

    @on_message.setter
    def on_message(self, callback: Callable[[dict[str, Any]], None] | None) -> None:
        self._on_message = callback
        self._start_reading()

    @property
    def on_lost(self) -> Callable[[TransportError], None] | None:
        """Called once with the error when the link ends for a reason other than this end's close or abort."""
        return self._on_lost

    @on_lost.setter
    def on_lost(self, callback: Callable[[TransportError], None] | None) -> None:
        self._on_lost = callback
        self._start_reading()

    @abstractmethod
    def _start_reading(self) -> None:
        """From the next round of the loop on, deliver what arrives. Called several times."""

    @abstractmethod
    def poll(self) -> bool:
        """Receive and deliver what has arrived, without waiting; True if there was anything.

        Takes a bounded piece of each lane: call it again while it returns True. Callbacks are called from within.
        """

    # -- what is sent

    def expose(self, region: Region) -> RemoteRegion:
        """Allow the peer to write ``region`` from now on; the result goes to the peer in a control message."""
        self._check_open()
        key = len(self._regions) + 1
        self._regions[key] = region.buffer
        return RemoteRegion(key, region.name, region.nbytes)

    @abstractmethod
    def write(self, lane: Lane, remote: RemoteRegion, offset: int, buffers: Sequence[Buffer], tag: int) -> None:
        """Put ``buffers``, one after the other, at byte ``offset`` of a region of the peer, then deliver ``tag`` there.

        One-sided and ordered within its lane; the tag (32 bits, unsigned) comes after all bytes. Never waits: what the
        network does not take at once is queued, without a copy, so the buffers belong to the link until ``drain``
        returned or the peer answered. ``buffers`` may be empty: then only the tag travels. Raises ProtocolError, before
        anything is sent, where offset, length or tag are out of range, and the link's error when it has ended.
        A failure of the network is not raised here but reported through ``on_lost``.
        """

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Send a control message, ordered with the writes of the decode lane; never waits.

        Raises ProtocolError if it takes more than ``MAX_MESSAGE`` bytes or cannot be encoded.
        """

    @property
    @abstractmethod
    def pending_bytes(self) -> int:
        """Bytes queued on all lanes and not yet taken by the network; the caller bounds it if it must be bounded."""

    @property
    @abstractmethod
    def bytes_written(self) -> tuple[int, int]:
        """Bytes handed to the network since the link exists, framing included; index with a Lane."""

    @property
    @abstractmethod
    def bytes_received(self) -> tuple[int, int]:
        """Bytes taken from the network since the link exists, framing included; index with a Lane."""

    @abstractmethod
    async def drain(self, lane: Lane = Lane.DECODE) -> None:
        """Wait until the network has taken everything queued on ``lane``; raises the link's error if it ends first.

        Being cancelled changes nothing about the queue.
        """

    # -- the end

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return not self._open

    @abstractmethod
    async def close(self) -> None:
        """Send what is queued, say goodbye, and wait for the peer to close too, within a deadline.

        Never raises a TransportError: if the queue cannot be sent, that is logged and kept in ``error``. Closing twice
        is fine. When it is cancelled, the link is ended at once.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End the link now; what is queued is lost. ``reason`` goes into the log and into ``error``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- for implementations, which clear ``_open`` when the link begins to end

    def _check_open(self) -> None:
        if not self._open:
            raise self.error or TransportError(f"the link to {self} is closed")

    def _check_write(self, remote: RemoteRegion, offset: int, nbytes: int, tag: int) -> None:
        self._check_open()
        if not 0 <= offset <= offset + nbytes <= remote.nbytes:
            raise ProtocolError(
                f"bytes {offset}..{offset + nbytes} are outside region {remote.name!r} of {self}, "
                f"which has {remote.nbytes}"
            )
        if not 0 <= tag <= MAX_TAG:
            raise ProtocolError(f"tag {tag} is outside 0..{MAX_TAG}")
