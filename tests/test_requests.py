"""A request travels whole, and one with a value out of range is refused with the place of that value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import ProtocolError
from lamina.transport.messages import decode_message, encode_message
from lamina.wire.codec import decode, encode
from lamina.wire.requests import (
    FromClient,
    Generate,
    Generated,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Piece,
    PromptScored,
    Regex,
    Request,
    Sampling,
    Score,
    ToClient,
)

IDS = st.lists(st.integers(0, 2**40), max_size=9)
TEXTS = st.text(min_size=1, max_size=1024)
SAMPLINGS = st.builds(
    Sampling,
    st.floats(0, 100),
    st.integers(0, 2**40),
    st.floats(0, 1, exclude_min=True),
    st.none() | st.integers(0, 2**63 - 1),
    st.floats(0, 1),
    st.floats(0.01, 100),
    st.floats(-100, 100),
    st.floats(-100, 100),
    st.dictionaries(st.integers(0, 2**40), st.floats(-100, 100)),
)
CONSTRAINTS = st.one_of(
    st.builds(JsonSchema, st.text()),
    st.builds(JsonObject),
    st.builds(Regex, TEXTS),
    st.builds(OneOf, st.lists(st.text(), min_size=1, max_size=9)),
    st.builds(Grammar, TEXTS),
)
TOPS = st.none() | st.integers(0, 20)
REQUESTS = st.builds(
    Request,
    st.text() | st.lists(st.integers(0, 2**40)),
    st.none() | st.integers(1, 2**31),
    SAMPLINGS,
    st.integers(-100, 100),
    st.booleans(),
    st.text(max_size=256),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**40),
    st.booleans(),
    st.lists(TEXTS, max_size=4),
    IDS,
    st.booleans(),
    st.lists(TEXTS | st.lists(st.integers(0, 2**40), min_size=1, max_size=9), max_size=4),
    st.booleans(),
    TOPS,
    TOPS,
    st.none() | CONSTRAINTS,
)
SCORES = st.builds(
    Score, st.floats(-1e9, 0), st.integers(1, 2**31), st.lists(st.tuples(st.integers(0, 2**40), st.floats(-1e9, 0)))
)
PIECES = st.builds(Piece, st.integers(0, 2**40), st.integers(0, 2**40), st.text(), st.none() | SCORES)


@given(st.integers(0, 2**40), REQUESTS)
def test_a_request_comes_as_it_was_sent(id_: int, request: Request) -> None:
    """Every request within the ranges arrives over the wire as it was sent."""
    sent = Generate(id=id_, request=request)
    assert decode(decode_message(encode_message(encode(sent))), FromClient) == sent


@given(st.lists(PIECES, max_size=9), st.lists(SCORES, max_size=9))
def test_an_answer_comes_as_it_was_sent(pieces: list[Piece], scores: list[Score]) -> None:
    """Its pieces and scores too."""
    for sent in (Generated(pieces=pieces), PromptScored(id=1, scores=scores)):
        assert decode(decode_message(encode_message(encode(sent))), ToClient) == sent


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
        ({"stop": ["."] * 17}, r"request\.stop: expected array of length <= 16"),
        ({"stop": [""]}, r"request\.stop\[0\]: expected str of length >= 1, got ''"),
        ({"stops": ["."]}, r"request: unknown key 'stops'"),
        ({"constraint": {"type": "Poem"}}, r"request\.constraint\.type: invalid value 'Poem'"),
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    """The error says where the value is, what is allowed there, and what was found."""
    plain = {"type": "Generate", "id": 1, "request": {"prompt": [1], **wrong}}
    with pytest.raises(ProtocolError, match=message):
        decode(plain, FromClient)
