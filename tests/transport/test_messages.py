"""Control messages stay plain, shallow and small, whatever bytes arrive."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ProtocolError
from lamina.transport.messages import MAX_DEPTH, MAX_MESSAGE, decode_message, encode_message

relaxed = settings(deadline=None)  # other tests may have the machine
text = st.text("aé\0 \U0001f4a3", max_size=40)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | text
    | st.binary(max_size=50)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8
)


@relaxed
@given(st.dictionaries(text, values, max_size=5))
def test_round_trip(message):
    """What is plain comes back as it was."""
    assert decode_message(encode_message(message)) == message


@relaxed
@given(st.binary(max_size=200))
def test_random_bytes(body):
    """Any bytes are a plain map or an error of the protocol."""
    try:
        message = decode_message(body)
    except ProtocolError:
        return
    assert type(message) is dict
    assert all(type(key) is str for key in message)


def nested(depth: int) -> bytes:
    """A map with lists in it, ``depth`` containers in all."""
    return b"\x81\xa1x" + b"\x91" * (depth - 1) + b"\xc0"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (b"\x81\xa1x", "not valid msgpack"),
        (b"\x80\x80", "not valid msgpack"),
        (b"\x90", "not a map"),
        (b"\x01", "not a map"),
        (b"\x81\x01\x02", "not valid msgpack"),
        (b"\x81\xc4\x01x\x02", "key of type bytes"),
        (b"\x81\xa1x\x81\xc4\x01x\x02", "key of type bytes"),
        (b"\x81\xa1x\xa1\xff", "not valid msgpack"),
        (msgpack.packb({"x": msgpack.ExtType(5, b"code")}), "value of type ExtType"),
        (msgpack.packb({"x": [msgpack.Timestamp(1, 2)]}), "value of type Timestamp"),
        (nested(MAX_DEPTH + 1), "deeper than 16"),
        (nested(1000), "deeper than 16"),
        (nested(MAX_MESSAGE - 3), "not valid msgpack"),
    ],
)
def test_refused(body, reason):
    """What is no shallow, plain map with text keys is refused with the reason."""
    with pytest.raises(ProtocolError, match=reason):
        decode_message(body)


def test_deepest_allowed():
    """The limit itself is allowed."""
    assert decode_message(nested(MAX_DEPTH))


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xdb", b"\xc6"], ids=["array", "map", "text", "bytes"])
@pytest.mark.parametrize("claim", [90_000, 2**32 - 1])
def test_bombs(head, claim):
    """Containers that announce more than the message holds, or just not, cost no memory, though a thousand nest."""
    bomb = b"\x81\xa1x" + (head + claim.to_bytes(4, "big")) * 1000 + bytes(90_000)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="not valid msgpack"):
            decode_message(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


@pytest.mark.parametrize("message", [{"x": object()}, {"x": 2**64}, {"x": {1, 2}}, {"x": "\ud800"}])
def test_sender_refuses(message):
    """What cannot be encoded is the sender's error."""
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode_message(message)
