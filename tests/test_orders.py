"""Orders arrive as they were sent, fit into a message, and are refused if they cannot be carried out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from lamina.errors import ProtocolError
from lamina.transport.messages import MAX_MESSAGE, decode_message, encode_message
from lamina.wire.codec import decode, encode
from lamina.wire.orders import Choice, Limits, Order, TokenRun
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling

LIMITS = Limits(slots=2, tokens=16, memory_nodes=frozenset({0, 1, 2}), context=100, vocabulary=1000)
RUN = TokenRun(7, 10, [1, 2], Placement((0, 2), 256), choice=Choice(Sampling(seed=0), 12))


def order(*runs: TokenRun, slot: int = 0) -> Order:
    return Order(epoch=1, slot=slot, step=3, runs=list(runs))


RUNS = st.builds(
    TokenRun,
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.lists(st.integers(0, 999), min_size=1, max_size=4),
    st.builds(
        Placement, st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), st.none() | st.integers(1, 256)
    ),
    st.just(0),
    st.none()
    | st.builds(
        Choice,
        st.builds(Sampling, st.floats(0, 100), st.integers(0, 50), st.floats(0.01, 1), st.integers(0, 2**63 - 1)),
        st.integers(0, 100),
    ),
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
        (order(changed(RUN, start=99)), "positions below 100"),
        (order(changed(RUN, local_tokens=2**39)), "positions below 100"),
        (order(changed(RUN, tokens=[1000])), "tokens below 1000"),
    ],
)
def test_what_cannot_be_done_is_refused(wrong: Order, message: str) -> None:
    """An order with any value out of range is refused with a sentence that names the range."""
    LIMITS.check(order(RUN))
    with pytest.raises(ProtocolError, match=message):
        LIMITS.check(wrong)
