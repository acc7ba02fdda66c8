"""What a transport implements: the two lanes of a link, and how both ends agree on them.

A link is a control connection, which ``link`` looks after, and lanes, which are all that differs between transports.
A transport is a module with these names::

    def offer(options: Options) -> dict[str, Any]       # what this end can do; UpgradeError says why it cannot
    async def upgrade(session: Session) -> Lanes        # on both ends at once; UpgradeError says which step failed
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from lamina.errors import HandshakeError, TransportError
from lamina.transport.base import Lane, Region

CHUNK_BYTES = 512 << 10
"""The most that is moved at once. It bounds how long bulk keeps the loop from looking at the decode lane: copying as
much takes 50 to 100 microseconds."""


class Owner(Protocol):
    """What lanes tell their link."""

    def delivered(self, lane: Lane, tag: int) -> None:
        """All bytes of a write are there. The link may be at its end when this returns."""

    def lanes_failed(self, error: TransportError) -> None:
        """Nothing more will arrive, or can be sent. Not from within ``write``."""

    def send_note(self, note: dict[str, Any]) -> None:
        """Have ``Lanes.take_note`` called at the other end, in order with what ``expose`` described."""


class Lanes(ABC):
    """Both lanes of a link. Made by ``upgrade``; from ``start`` on they belong to the loop that it is called in.

    ``expose``, ``learn`` and ``window`` may be called in another thread. The link has checked everything that it can
    before it calls: regions are known, offsets, lengths and tags in range.
    """

    bytes_written: Sequence[int]
    """Bytes of writes handed to the medium, by lane; every subclass has these three."""
    bytes_received: Sequence[int]
    """Bytes of writes that arrived, by lane."""
    pending_bytes: Sequence[int]
    """Bytes of writes whose buffers are still needed, by lane."""

    def __init__(self) -> None:
        self.tags_written = [0, 0]
        """Writes that ``write`` took, by lane."""
        self.tags_received = [0, 0]
        """Writes that arrived, by lane; counted before they are delivered."""

    @abstractmethod
    def start(self, owner: Owner) -> None:
        """From the next round of this loop on, deliver what arrives to ``owner``. Called once."""

    @abstractmethod
    def expose(self, key: int, region: Region) -> dict[str, Any]:
        """Let the peer write ``region``; returns what its ``learn`` must know, as a few plain values."""

    @abstractmethod
    def learn(self, key: int, nbytes: int, details: dict[str, Any]) -> None:
        """The peer exposed a region. ``details`` comes from the wire: ProtocolError for what cannot be."""

    @abstractmethod
    def window(self, key: int) -> memoryview | None:
        """See ``Link.window``."""

    @abstractmethod
    def write(self, lane: Lane, key: int, offset: int, pieces: list[memoryview], nbytes: int, tag: int) -> None:
        """See ``Link.write``. ``pieces`` are views of bytes, ``nbytes`` in all, none of them empty; keep the list."""

    def take_note(self, note: dict[str, Any]) -> None:
        """The other end's lanes sent this. ProtocolError for what cannot be."""
        raise NotImplementedError

    @abstractmethod
    def poll(self) -> bool:
        """Receive and deliver what has arrived, without waiting; True if there was anything.

        Takes a bounded piece of each lane. The owner is told from within.
        """

    @abstractmethod
    async def drain(self, lane: Lane) -> None:
        """Wait until no buffer of ``lane`` is needed any more; raises what ``close`` is given if that comes first."""

    @abstractmethod
    def close(self, error: TransportError) -> None:
        """Let go of everything at once; whoever waits in ``drain`` gets ``error``.

        Called once, perhaps before ``start``, perhaps from within ``Owner.delivered``. Afterwards no byte of any region
        changes on account of this link.
        """


class UpgradeError(HandshakeError):
    """A transport that cannot be had between these two nodes: which step failed, and what to do about it."""
