"""The receiver of frames, byte by byte and without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import HandshakeError, ProtocolError, TransportError
from lamina.transport.frames import (
    CHUNK_BYTES,
    HEADER_BYTES,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    MAX_NOTE,
    MESSAGE,
    NOTE,
    PROTOCOL_VERSION,
    FrameReceiver,
    Note,
    Sign,
    message_frame,
    note_frame,
    write_header,
)

relaxed = settings(deadline=None)  # other tests may have the machine

REGION_BYTES = 300
MAX_MESSAGE = 200

u32 = st.integers(0, 2**32 - 1)


@st.composite
def writes(draw):
    data = draw(st.binary(max_size=REGION_BYTES))
    offset = draw(st.integers(0, REGION_BYTES - len(data)))
    tag = draw(u32)
    return write_header(1, offset, len(data), tag) + data, tag


plain_maps = st.dictionaries(st.text("aé", max_size=5), st.integers(-5, 300) | st.binary(max_size=8), max_size=5)
messages = plain_maps.map(lambda body: (message_frame(body, MAX_MESSAGE), body))
notes = plain_maps.map(lambda body: (note_frame(body), Note(body)))
signs = st.just((HEARTBEAT_FRAME, Sign.HEARTBEAT))
frames = st.lists(writes() | messages | notes | signs, min_size=1, max_size=8)


def header_of(kind: int, length: int, key: int = 0, offset: int = 0, tag: int = 0) -> bytes:
    """A header with any kind."""
    header = bytearray(write_header(key, offset, length, tag))
    header[6] = kind
    return bytes(header)


def new_receiver() -> tuple[FrameReceiver, bytearray]:
    memory = bytearray(REGION_BYTES)
    return FrameReceiver({1: memoryview(memory)}, MAX_MESSAGE), memory


def feed(receiver: FrameReceiver, data: bytes, pieces=lambda: CHUNK_BYTES) -> list[object]:
    """What a socket does that holds ``data`` and gives as much at once as ``pieces()`` says."""
    events = []
    while data:
        buffer = receiver.next_buffer()
        nbytes = min(len(buffer), len(data), pieces())
        assert nbytes > 0, "an empty buffer would look like the end of the connection"
        buffer[:nbytes] = data[:nbytes]
        data = data[nbytes:]
        event = receiver.received(nbytes)
        if event is not None:
            events.append(event)
    return events


@relaxed
@given(frames, st.data())
def test_any_split_gives_the_same_events(sent, data):
    """However the network cuts the bytes, the events and the memory are the same."""
    stream = b"".join(frame for frame, _ in sent)
    whole, whole_memory = new_receiver()
    split, split_memory = new_receiver()

    expected = [(type(event), event) for _, event in sent]  # a note equals the message with the same content
    assert [(type(event), event) for event in feed(whole, stream)] == expected
    pieces = feed(split, stream, lambda: data.draw(st.integers(1, 40)))
    assert [(type(event), event) for event in pieces] == expected
    assert whole_memory == split_memory


def check_survives(stream: bytes) -> None:
    """Whatever comes: valid events or an error of the protocol, and no memory beyond the message limit."""
    receiver, memory = new_receiver()
    largest = 0

    def pieces() -> int:
        nonlocal largest
        largest = max(largest, len(receiver.next_buffer()))
        return 7

    try:
        for event in feed(receiver, stream, pieces):
            assert isinstance(event, int | dict | Sign)
    except (ProtocolError, HandshakeError):
        pass
    assert largest <= max(REGION_BYTES, MAX_MESSAGE)
    assert len(memory) == REGION_BYTES


@relaxed
@given(st.binary(max_size=400))
def test_random_bytes(stream):
    """Noise is at worst an error of the protocol."""
    check_survives(stream)


@relaxed
@given(frames, st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=5))
def test_damaged_frames(sent, flips):
    """So are valid frames with flipped bits."""
    stream = bytearray(b"".join(frame for frame, _ in sent))
    for position, bits in flips:
        stream[position % len(stream)] ^= bits
    check_survives(bytes(stream))


@relaxed
@given(kind=st.integers(0, 6), key=u32, tag=u32, offset=st.integers(0, 2**64 - 1), length=st.integers(0, 2**64 - 1))
def test_any_header(kind, key, tag, offset, length):
    """Every combination of fields is checked before anything is done about it."""
    check_survives(header_of(kind, length, key, offset, tag) + bytes(100))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, REGION_BYTES + 1), (REGION_BYTES, 1), (2**64 - 1, 1), (1, 2**64 - 1), (REGION_BYTES + 1, 0)],
)
def test_write_outside_the_region(offset, length):
    """A write that leaves its region is refused at its header."""
    receiver, memory = new_receiver()

    with pytest.raises(ProtocolError, match="region 1, which has 300"):
        feed(receiver, write_header(1, offset, length, 0))
    assert not any(memory)


def test_write_to_unknown_region():
    """So is one to a region that was never exposed."""
    with pytest.raises(ProtocolError, match="region 2, which was not exposed"):
        feed(new_receiver()[0], write_header(2, 0, 0, 0))


@pytest.mark.parametrize("length", [0, MAX_MESSAGE + 1, 2**64 - 1])
def test_length_of_a_message(length):
    """A message has at least one byte and at most as many as were agreed, whatever its header claims."""
    with pytest.raises(ProtocolError, match=f"message of {length} bytes where 1 to 200 are allowed"):
        feed(new_receiver()[0], header_of(MESSAGE, length))


@pytest.mark.parametrize(
    ("max_message", "length", "limit"),
    [(MAX_MESSAGE, 0, MAX_MESSAGE), (MAX_MESSAGE, MAX_MESSAGE + 1, MAX_MESSAGE), (1 << 20, MAX_NOTE + 1, MAX_NOTE)],
)
def test_length_of_a_note(max_message, length, limit):
    """A note is short, even where messages may be long."""
    receiver = FrameReceiver({}, max_message)

    with pytest.raises(ProtocolError, match=f"note of {length} bytes where 1 to {limit} are allowed"):
        feed(receiver, header_of(NOTE, length))


@pytest.mark.parametrize(
    ("kind", "length", "reason"),
    [
        (MESSAGE, 1, "a message of 1 bytes where there are no messages"),
        (NOTE, 1, "a note of 1 bytes where 1 to 0 are allowed"),
        (HEARTBEAT, 1, "1 bytes with a HEARTBEAT"),
        (0, 0, "the unknown kind 0"),
        (HEARTBEAT + 1, 0, "the unknown kind 5"),
    ],
)
def test_what_has_no_place_on_a_lane(kind, length, reason):
    """Where only writes travel there is no memory for anything else."""
    with pytest.raises(ProtocolError, match=reason):
        feed(FrameReceiver({}, 0), header_of(kind, length))


def test_tls_to_a_plain_end():
    """Whoever starts to speak TLS here is told what is wrong."""
    with pytest.raises(ProtocolError, match="the peer uses TLS and this end does not"):
        feed(new_receiver()[0], bytes.fromhex("16030102 00010001 fc0303") + bytes(30))


def test_other_version():
    """A frame of another release is refused by naming both versions, whatever else it holds."""
    header = bytearray(32)
    header[:6] = b"LMNA" + (PROTOCOL_VERSION + 6).to_bytes(2, "little")

    with pytest.raises(
        HandshakeError,
        match=f"speaks protocol version {PROTOCOL_VERSION + 6}, this end speaks version {PROTOCOL_VERSION}:",
    ):
        feed(new_receiver()[0], bytes(header))


def test_not_lamina():
    """What does not start with the magic is named as not a Lamina node."""
    with pytest.raises(ProtocolError, match="not a Lamina node"):
        feed(new_receiver()[0], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def test_large_payload_goes_straight_into_the_region():
    """The buffer to fill is the region itself, a bounded piece of it at a time."""
    memory = memoryview(bytearray(CHUNK_BYTES + 10))
    receiver = FrameReceiver({1: memory}, 0)
    feed(receiver, write_header(1, 4, CHUNK_BYTES + 5, 9))

    first = receiver.next_buffer()
    assert len(first) == CHUNK_BYTES
    first[:2] = b"ab"
    assert bytes(memory[4:6]) == b"ab"
    assert receiver.received(len(first)) is None
    assert len(receiver.next_buffer()) == 5
    assert receiver.received(5) == 9


def test_header_is_as_documented():
    """The layout of the header is part of the protocol."""
    header = write_header(key=0x01020304, offset=5, nbytes=6, tag=7)

    assert HEADER_BYTES == 32
    assert header == bytes.fromhex("4c4d4e41 0a00 0100 04030201 07000000 0500000000000000 0600000000000000")


def test_sender_refuses_long_message():
    """The limit holds on both ends."""
    with pytest.raises(TransportError, match="200 are allowed"):
        message_frame({"x": bytes(200)}, MAX_MESSAGE)


def test_sender_refuses_long_note():
    """Notes are for set-up: whatever does not fit is a mistake here."""
    with pytest.raises(TransportError, match=f"{MAX_NOTE} are allowed"):
        note_frame({"x": bytes(MAX_NOTE)})
