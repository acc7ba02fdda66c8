"""Questions on a link and their answers."""

from __future__ import annotations

from lamina.transport import Link
from lamina.wire.codec import Message, encode

MAX_PENDING_BYTES = 4 * 2**20
"""What a client or monitor may leave unread before its link is ended."""


def answer(link: Link, message: Message) -> bool:
    """Send to a client or monitor, unless it is gone; end the link of one that does not read, and return False."""
    state = link.state
    if state.closed:
        return False
    if state.pending_bytes > MAX_PENDING_BYTES:
        link.abort(f"{state.pending_bytes} bytes are left unread")
        return False
    link.send(encode(message))
    return True
