"""The bytes of a link, without a socket: a fixed header, then a payload.

A frame starts with 32 bytes, little endian::

    magic "LMNA" | version u16 | kind u16 | region key u32 | tag u32 | offset u64 | length u64

and goes on with ``length`` bytes: of a region for WRITE, of a msgpack map for MESSAGE and NOTE, none for HEARTBEAT. The
control connection carries all but WRITE, the lanes of tcp nothing else. Magic and version keep their place in every
future version, so that two releases can always name their disagreement.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import Any

from lamina.errors import HandshakeError, ProtocolError
from lamina.transport.lanes import CHUNK_BYTES
from lamina.transport.messages import decode_message, encode_message

PROTOCOL_VERSION = 10
MAGIC = b"LMNA"

_HEADER = struct.Struct("<4sHHIIQQ")
HEADER_BYTES = _HEADER.size


# Plain integers: looking up members of an enum takes longer than receiving a header.
WRITE, MESSAGE, NOTE, HEARTBEAT = 1, 2, 3, 4

MAX_NOTE = 4 << 10


class Note(dict[str, Any]):
    """A message from one end of a link to the other end itself, which their owners do not see."""


class Sign(enum.Enum):
    """A frame without contents."""

    HEARTBEAT = HEARTBEAT
    """The peer is alive."""


Event = int | dict[str, Any] | Note | Sign
"""A complete frame: the tag of a write whose bytes are all in the region, a message, a note, or a sign."""


def _header(kind: int, length: int = 0, key: int = 0, tag: int = 0, offset: int = 0) -> bytes:
    return _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, key, tag, offset, length)


HEARTBEAT_FRAME = _header(HEARTBEAT)


def write_header(key: int, offset: int, nbytes: int, tag: int) -> bytes:
    """Make the header of a WRITE. The ``nbytes`` bytes follow it, from where they lie."""
    return _HEADER.pack(MAGIC, PROTOCOL_VERSION, WRITE, key, tag, offset, nbytes)


def message_frame(message: dict[str, Any], limit: int) -> bytes:
    """Make a whole MESSAGE frame. Raises ProtocolError if the encoded message is longer than ``limit`` bytes."""
    body = encode_message(message, limit)
    return _header(MESSAGE, len(body)) + body


def note_frame(note: dict[str, Any]) -> bytes:
    """Make a whole NOTE frame."""
    body = encode_message(note, MAX_NOTE)
    return _header(NOTE, len(body)) + body


class FrameReceiver:
    """Puts arriving bytes where they belong and tells which frames are complete.

    The caller fills ``next_buffer()`` from the network, gives the number of bytes to ``received()``, and repeats. While
    the payload of a write arrives, the buffer is the region itself, so nothing is copied twice. The buffer never
    reaches beyond the frame. So one call completes at most one frame, and takes nothing of the next one.

    ``regions`` maps keys to the memory that the peer may write; its owner may add to it at any time. A receiver that
    has raised must not be used again.
    """

    def __init__(self, regions: Mapping[int, memoryview], max_message: int) -> None:
        self._regions = regions
        self._max_message = max_message
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._target = self._header
        self._filled = 0
        self._kind = 0
        self._tag = 0

    def next_buffer(self) -> memoryview:
        """The buffer for the next bytes: never empty, and never larger than CHUNK_BYTES."""
        if not self._filled and len(self._target) <= CHUNK_BYTES:
            return self._target
        return self._target[self._filled : self._filled + CHUNK_BYTES]

    def received(self, nbytes: int) -> Event | None:
        """Take the first ``nbytes`` bytes of ``next_buffer()``; returns the frame that they complete.

        Raises ProtocolError, or HandshakeError if the peer speaks another protocol version.
        """
        self._filled += nbytes
        if self._filled < len(self._target):
            return None
        self._filled = 0
        if self._target is self._header:
            payload = self._payload_of_header()
            if payload is not None:
                self._target = payload
                return None
        event = self._completed()
        self._target = self._header
        return event

    def _payload_of_header(self) -> memoryview | None:
        """Check the complete header; returns the buffer for its payload, None if it has none."""
        magic, version, self._kind, key, self._tag, offset, length = _HEADER.unpack(self._header)
        if magic != MAGIC:
            who = "the peer uses TLS and this end does not" if magic[1] == 3 else "the peer is not a Lamina node"
            raise ProtocolError(f"expected a frame that starts with {MAGIC!r}, got {magic!r}: {who}")
        if version != PROTOCOL_VERSION:
            raise HandshakeError(
                f"the peer speaks protocol version {version}, this end speaks version {PROTOCOL_VERSION}: "
                "install the same release on both"
            )
        if self._kind == WRITE:
            region = self._regions.get(key)
            if region is None:
                raise ProtocolError(f"the peer wrote to region {key}, which was not exposed to it")
            if offset + length > len(region):
                raise ProtocolError(
                    f"the peer wrote bytes {offset}..{offset + length} of region {key}, which has {len(region)}"
                )
            return region[offset : offset + length] if length else None
        if self._kind == MESSAGE:
            if not 0 < length <= self._max_message:
                allowed = f"1 to {self._max_message} are allowed" if self._max_message else "there are no messages"
                raise ProtocolError(f"the peer sent a message of {length} bytes where {allowed}")
            return memoryview(bytearray(length))
        if self._kind == NOTE:
            limit = min(self._max_message, MAX_NOTE)
            if not 0 < length <= limit:
                raise ProtocolError(f"the peer sent a note of {length} bytes where 1 to {limit} are allowed")
            return memoryview(bytearray(length))
        if self._kind != HEARTBEAT:
            raise ProtocolError(f"the peer sent a frame of the unknown kind {self._kind}")
        if length:
            raise ProtocolError(f"the peer sent {length} bytes with a HEARTBEAT, which has none")
        return None

    def _completed(self) -> Event:
        if self._kind == WRITE:
            return self._tag
        if self._kind == MESSAGE:
            return decode_message(self._target)
        if self._kind == NOTE:
            return Note(decode_message(self._target))
        return Sign.HEARTBEAT
