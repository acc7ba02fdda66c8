"""Control messages: msgpack maps with text keys and plain values, decoded within limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from lamina.errors import ProtocolError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_MESSAGE = 1 << 20
MAX_DEPTH = 16

_SCALARS = frozenset({str, bytes, int, float, bool, type(None)})


def encode_message(message: dict[str, Any], limit: int = MAX_MESSAGE) -> bytes:
    """Encode ``message``. Raises ProtocolError if it is longer than ``limit`` bytes or not made of plain values."""
    try:
        body: bytes = msgpack.packb(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"this message cannot be encoded: {error}") from error
    if len(body) > limit:
        raise ProtocolError(f"this message takes {len(body)} bytes, {limit} are allowed")
    return body


def decode_message(body: Buffer) -> dict[str, Any]:
    """Decode a message of the peer, whose length the caller has bounded; raises ProtocolError.

    Text and byte strings cannot be longer than the message. Containers could claim to be: a few bytes announce an
    array of millions, and a thousand of them nest. So a first pass, which builds nothing, checks that all elements are
    there. The memory that the second pass takes is then proportional to the length of the message.
    """
    nbytes = memoryview(body).nbytes
    try:
        scanner = msgpack.Unpacker(max_buffer_size=nbytes, read_size=1)
        scanner.feed(body)
        scanner.skip()
        message = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ProtocolError(f"the peer sent a message that is not valid msgpack: {reason}") from error
    if type(message) is not dict:
        raise ProtocolError(f"the peer sent a message that is not a map but of type {type(message).__name__}")
    _check_plain(message, depth=1)
    return message


def _check_plain(container: dict[Any, Any] | list[Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ProtocolError(f"the peer sent a message that nests deeper than {MAX_DEPTH} levels")
    if isinstance(container, dict):
        for key in container:
            if type(key) is not str:
                raise ProtocolError(f"the peer sent a message with a key of type {type(key).__name__}")
        container = list(container.values())
    for value in container:
        kind = type(value)
        if kind is dict or kind is list:
            _check_plain(value, depth + 1)
        elif kind not in _SCALARS:
            raise ProtocolError(f"the peer sent a message with a value of type {kind.__name__}")
