"""What a transport implements: the two lanes of a link, and how both ends set them up.

A link consists of a control connection, which ``link`` handles, and of lanes, in which alone transports differ.
A transport is a module with two functions::

    def offer(options: Options) -> dict[str, Any]       # what this end can do; UpgradeError says why it cannot
    async def upgrade(session: Session) -> Lanes        # runs on both ends at once; UpgradeError says what failed
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from lamina.errors import HandshakeError, TransportError
from lamina.transport.base import Lane, Region

CHUNK_BYTES = 512 << 10
"""The largest piece that is moved at once. It bounds how long bulk keeps the loop from looking at the decode lane:
copying a chunk takes 50 to 100 microseconds."""


class LanesOwner(Protocol):
    """What lanes report to their link."""

    def delivered(self, lane: Lane, tag: int) -> None:
        """Take a tag whose bytes have all arrived. The link may have ended when this returns."""

    def lanes_failed(self, error: TransportError) -> None:
        """Learn that nothing more will arrive or can be sent. Never called from within ``write``."""

    def send_note(self, note: dict[str, Any]) -> None:
        """Have ``Lanes.take_note`` called at the other end, in order with the descriptions of ``expose``."""


class Lanes(ABC):
    """Both lanes of a link. ``upgrade`` makes them; from ``start`` on they belong to the loop in which it is called.

    ``expose``, ``learn`` and ``window`` may be called in another thread, and so may the counters be read. The link
    checks what it can before it calls: regions are known; offsets, lengths and tags are in range.
    """

    bytes_written: Sequence[int]
    """Bytes of writes that the medium has taken, by lane. Every subclass has these three."""
    bytes_received: Sequence[int]
    """Bytes of writes that have arrived, by lane."""
    pending_bytes: Sequence[int]
    """Bytes of writes whose buffers the lane still needs, by lane."""

    def __init__(self) -> None:
        self.tags_written = [0, 0]
        """Number of writes that ``write`` took, by lane."""
        self.tags_received = [0, 0]
        """Number of writes that arrived, by lane, counted before they are delivered."""

    @abstractmethod
    def start(self, owner: LanesOwner) -> None:
        """Deliver what arrives to ``owner``, from the next round of this loop on. Called once."""

    @abstractmethod
    def expose(self, key: int, region: Region) -> dict[str, Any]:
        """Let the peer write ``region``; returns what its ``learn`` needs, as a few plain values."""

    @abstractmethod
    def learn(self, key: int, nbytes: int, details: dict[str, Any]) -> None:
        """Take a region that the peer exposed. ``details`` comes from the wire; ProtocolError for impossible ones."""

    @abstractmethod
    def window(self, key: int) -> memoryview | None:
        """Return the peer's region, as ``Link.window`` does."""

    @abstractmethod
    def write(self, lane: Lane, key: int, offset: int, pieces: list[memoryview], nbytes: int, tag: int) -> None:
        """Write as ``Link.write`` does. ``pieces`` are views of bytes, none of them empty, and the list may be kept."""

    def take_note(self, note: dict[str, Any]) -> None:
        """Take a note of the other end's lanes. Raises ProtocolError for an impossible one."""
        raise NotImplementedError

    @abstractmethod
    def poll(self) -> bool:
        """Receive and deliver what has arrived, without waiting; True if anything had.

        A call takes a bounded piece of each lane, and calls the owner before it returns.
        """

    @abstractmethod
    async def drain(self, lane: Lane) -> None:
        """Wait until the lane needs no buffer any more; raises the error of ``close`` if that comes first."""

    @abstractmethod
    def close(self, error: TransportError) -> None:
        """Release everything at once; coroutines that wait in ``drain`` get ``error``.

        Called once, perhaps before ``start``, perhaps from within ``LanesOwner.delivered``. Afterwards no byte of any
        region changes through this link.
        """


class UpgradeError(HandshakeError):
    """These two nodes cannot use a transport. The message says which step failed and what to do about it."""
