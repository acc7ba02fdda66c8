"""A request travels whole, and one with a value out of range is refused with the place of that value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ProtocolError
from lamina.transport.messages import decode_message, encode_message
from lamina.wire.codec import decode, encode
from lamina.wire.requests import FromClient, Generate, Request, Sampling

SAMPLINGS = st.builds(
    Sampling,
    st.floats(0, 100),
    st.integers(0, 2**40),
    st.floats(0, 1, exclude_min=True),
    st.none() | st.integers(0, 2**63 - 1),
)
REQUESTS = st.builds(
    Request,
    st.text() | st.lists(st.integers(0, 2**40)),
    st.none() | st.integers(1, 2**31),
    SAMPLINGS,
    st.integers(-100, 100),
    st.booleans(),
    st.text(max_size=256),
    st.booleans(),
)


@given(st.integers(0, 2**40), REQUESTS)
def test_a_request_comes_as_it_was_sent(id_: int, request: Request) -> None:
    """Every request within the ranges arrives over the wire as it was sent."""
    sent = Generate(id=id_, request=request)
    assert decode(decode_message(encode_message(encode(sent))), FromClient) == sent


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": [1, -1]}, r"request\.prompt\[1\]: expected int >= 0, got -1"),
        ({"prompt": None}, r"request\.prompt: expected str \| array, got None"),
        ({"max_tokens": 0}, r"request\.max_tokens: expected int >= 1, got 0"),
        ({"sampling": {"temperature": 101.0}}, r"request\.sampling\.temperature: expected float <= 100.0, got 101.0"),
        ({"sampling": {"top_k": -1}}, r"request\.sampling\.top_k: expected int >= 0, got -1"),
        ({"sampling": {"top_p": 0.0}}, r"request\.sampling\.top_p: expected float > 0.0, got 0.0"),
        ({"sampling": {"seed": 2**63}}, r"request\.sampling\.seed: "),
        ({"sampling": {"heat": 1}}, r"request\.sampling: unknown key 'heat'"),
        ({"priority": 101}, r"request\.priority: expected int <= 100, got 101"),
        ({"salt": "s" * 257}, r"request\.salt: expected str of length <= 256"),
        ({"stop": ["."]}, r"request: unknown key 'stop'"),
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    """The error says where the value is, what is allowed there, and what was found."""
    plain = {"type": "Generate", "id": 1, "request": {"prompt": [1], **wrong}}
    with pytest.raises(ProtocolError, match=message):
        decode(plain, FromClient)
