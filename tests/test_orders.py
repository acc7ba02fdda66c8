"""Orders arrive as they were sent, fit into a message, and are refused if they cannot be carried out."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from lamina.errors import ProtocolError
from lamina.transport.messages import MAX_MESSAGE, decode_message, encode_message
from lamina.wire import parts
from lamina.wire.codec import decode, encode
from lamina.wire.orders import Choice, Done, Limits, Order, Targets, TokenRun
from lamina.wire.parts import Part, Reassembly
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling, Score

LIMITS = Limits(slots=2, tokens=16, memory_nodes=frozenset({0, 1, 2}), context=100, vocabulary=1000, block_tokens=4)
RUN = TokenRun(7, 10, [1, 2], Placement((0, 2), 256), choice=Choice(Sampling(seed=0), 12))


def order(*runs: TokenRun, slot: int = 0) -> Order:
    return Order(epoch=1, slot=slot, step=3, runs=list(runs))


def moved(*parts: tuple[int, int, int]) -> TokenRun:
    return changed(RUN, placement=replace(RUN.placement, moved=parts))


TOKENS = st.lists(st.integers(0, 999), max_size=5).map(lambda tokens: array("i", tokens).tobytes())


def chosen(**changes: Any) -> Order:
    return order(changed(RUN, choice=changed(RUN.choice, **changes)))


def batched(bounds: list[int]) -> list[tuple[int, int]]:
    """Every second gap between bounds."""
    return list(zip(bounds[::2], bounds[1::2], strict=False))


RUNS = st.builds(
    TokenRun,
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.lists(st.integers(0, 999), min_size=1, max_size=4),
    st.builds(
        Placement,
        st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
        st.none() | st.integers(1, 256),
        st.sets(st.integers(0, 25), max_size=6).map(
            lambda bounds: tuple((4 * a, 4 * b, 1) for a, b in batched(sorted(bounds)))
        ),
    ),
    st.just(0),
    st.none()
    | st.builds(
        Choice,
        st.builds(
            Sampling,
            st.floats(0, 100),
            st.integers(0, 50),
            st.floats(0.01, 1),
            st.integers(0, 2**63 - 1),
            repetition_penalty=st.floats(0.5, 2),
            logit_bias=st.dictionaries(st.integers(0, 999), st.floats(-100, 100), max_size=3),
        ),
        st.integers(0, 100),
        TOKENS,
        TOKENS,
        st.lists(st.integers(0, 999), max_size=3),
        st.none() | st.binary(min_size=125, max_size=128),
        st.none() | st.integers(0, 20),
    ),
    st.none()
    | st.builds(Targets, st.just(0), st.lists(st.integers(0, 999), min_size=1, max_size=1), st.integers(0, 20)),
)


@given(st.lists(RUNS, min_size=1, max_size=4), st.integers(0, 1), st.integers(0, 2**30))
def test_orders_come_back(runs: list[TokenRun], slot: int, step: int) -> None:
    """A random order arrives over the wire as it was sent, and is within the limits."""
    sent = Order(epoch=1, slot=slot, step=step, runs=runs)
    come = decode(decode_message(encode_message(encode(sent))), Order)

    assert come == sent
    LIMITS.check(come)


def test_the_largest_step_fits_into_a_message() -> None:
    """The most sequences, prompt tokens and memory nodes that a file can configure fit into one message."""
    run = TokenRun(2**31, 10**6, [200_000], Placement(tuple(range(32)), 256))
    rows = [changed(run, choice=Choice(Sampling(0.7, 40, 0.95, 2**63 - 1), 10**6 + 1))] * 4096
    prompt = changed(run, start=0, tokens=[200_000] * 65536, local_tokens=65536)

    assert len(encode_message(encode(order(*rows, prompt)))) < MAX_MESSAGE


def test_a_choice_without_a_seed_is_refused() -> None:
    """The front draws seeds, so that every compute node that samples draws the same token."""
    plain = encode(order(RUN))
    plain["runs"][0][5][0]["seed"] = None
    with pytest.raises(ProtocolError, match="the choice for position 12 has no seed"):
        decode(plain, Order)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (order(RUN, slot=2), "expected a slot below 2"),
        (order(*[RUN] * 9), "at most 16 tokens"),
        (order(changed(RUN, start=0, local_tokens=4), RUN), "those whose past is remote first"),
        (order(changed(RUN, placement=Placement((0, 3)))), "memory nodes among"),
        (order(changed(RUN, placement=Placement((-1,)))), "memory nodes among"),
        (order(changed(RUN, placement=Placement(()))), "memory nodes among"),
        (order(changed(RUN, placement=replace(RUN.placement, stripe=0))), "stripe=0"),
        (order(moved((0, 4, 3))), "memory nodes among"),
        (order(moved((4, 12, 1), (8, 16, 2))), "moved parts"),
        (order(moved((8, 12, 1), (0, 4, 2))), "moved parts"),
        (order(moved((0, 6, 1))), "whole blocks of 4"),
        (order(moved((4, 4, 1))), "moved parts"),
        (order(moved((0, 400, 1))), "moved parts"),
        (order(moved((-4, 4, 1))), "moved parts"),
        (order(changed(RUN, start=99)), "positions below 100"),
        (order(changed(RUN, local_tokens=2**39)), "positions below 100"),
        (order(changed(RUN, tokens=[1000])), "tokens below 1000"),
        (chosen(banned=[3, 1000]), "a choice"),
        (chosen(prompt=array("i", [1000]).tobytes()), "a choice"),
        (chosen(answer=array("i", [5, -1]).tobytes()), "a choice"),
        (chosen(answer=bytes(4 * 101)), "a choice"),
        (chosen(sampling=Sampling(seed=0, logit_bias={1000: 1.0})), "a choice"),
        (order(changed(RUN, targets=Targets(1, [1, 2], 0))), "2 targets from row 1"),
        (order(changed(RUN, targets=Targets(0, [1000], 0))), "1 targets from row 0"),
    ],
)
def test_what_cannot_be_done_is_refused(wrong: Order, message: str) -> None:
    """An order with any value out of range is refused with a sentence that names the range."""
    LIMITS.check(order(RUN))
    with pytest.raises(ProtocolError, match=message):
        LIMITS.check(wrong)


def test_scores_come_back() -> None:
    """Those of tokens and of prompts, with probabilities of 0, and tokens that could not be chosen."""
    score = Score(-1.5, 3, [(7, -0.25), (2, float("-inf"))])
    sent = Done(
        slot=0,
        step=1,
        tokens=[5, None, -1],
        compute_s=0.5,
        attention_s=[(1, 0.25, 0.125)],
        scores=[score, None, None],
        prompt_scores=[[score, None], []],
    )
    assert decode(decode_message(encode_message(encode(sent))), Done) == sent


@pytest.mark.parametrize("wrong", [b"123", b"12345"])
def test_tokens_that_are_cut_off_are_refused(wrong: bytes) -> None:
    """They are 4 bytes each."""
    plain = encode(order(RUN))
    plain["runs"][0][5][3] = wrong
    with pytest.raises(ProtocolError, match="tokens that are not 4 bytes each"):
        decode(plain, Order)


def test_parts_of_a_message_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that never sends the last part takes no more memory than the longest message."""
    monkeypatch.setattr(parts, "MAX_WHOLE", 100)
    come = Reassembly()
    assert come.add(Part(data=bytes(60), more=True)) is None
    with pytest.raises(ProtocolError, match="takes more than 100 bytes"):
        come.add(Part(data=bytes(60), more=True))
