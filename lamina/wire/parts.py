"""Send messages that are longer than a link takes at once, in parts."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from lamina.errors import ProtocolError
from lamina.transport import Link
from lamina.transport.messages import decode_message, encode_message
from lamina.wire.codec import Message, encode

PART_BYTES = 1 << 19
MAX_WHOLE = 1 << 30
"""The most bytes of a message in parts: steps of thousands of rows that all have masks and penalties."""


class Part(Message):
    """Holds the next bytes of a message. Nothing else comes between the parts of one message."""

    data: Annotated[bytes, Meta(min_length=1, max_length=PART_BYTES)]
    more: bool
    """Whether another part of the same message follows."""


def send_whole(link: Link, message: Message) -> None:
    """Send a message of any length up to ``MAX_WHOLE``; raise ProtocolError for a longer one."""
    plain = encode(message)
    try:
        link.send(plain)
    except ProtocolError:  # hardly any message is too long, so none is measured before
        body = encode_message(plain, MAX_WHOLE)
        for start in range(0, len(body), PART_BYTES):
            stop = start + PART_BYTES
            link.send(encode(Part(data=body[start:stop], more=stop < len(body))))


class Parts:
    """Puts the parts of one message after the other together."""

    def __init__(self) -> None:
        self._body = bytearray()

    def add(self, part: Part) -> dict[str, Any] | None:
        """Take the next part; return the message, as a plain map, if it is the last. Raises ProtocolError if it gets
        too long, or is none."""
        self._body += part.data
        if len(self._body) > MAX_WHOLE:
            raise ProtocolError(f"a message in parts takes more than {MAX_WHOLE} bytes, which are allowed")
        if part.more:
            return None
        body, self._body = self._body, bytearray()
        return decode_message(body)
