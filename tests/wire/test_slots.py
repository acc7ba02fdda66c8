"""The protocol of a batch slot, on integers."""

from __future__ import annotations

import random

import pytest

from lamina.errors import ProtocolError
from lamina.wire.slots import MemorySlot
from lamina.wire.tags import STEP_MASK, Kind, Tag

LAYERS = 6


def _tag(kind: Kind, layer: int = 0, step: int = 3) -> Tag:
    return Tag(kind, 0, layer, step)


def _begun(*, stores: bool = True) -> MemorySlot:
    slot = MemorySlot(0, LAYERS)
    assert slot.receive(_tag(Kind.PLAN))
    slot.planned(slot.step, stores=stores)
    return slot


def test_a_whole_step_is_let_in() -> None:
    """A plan, then of each layer query, keys and values, and the answer, and then the next plan."""
    slot = _begun()
    for layer in range(LAYERS):
        assert slot.receive(_tag(Kind.QUERY, layer))
        assert slot.receive(_tag(Kind.KEY_VALUE, layer))
        slot.answered(3)
    assert slot.receive(_tag(Kind.PLAN, step=4))


def test_a_step_that_stores_nothing_has_queries_alone() -> None:
    """Queries come and are answered without keys; keys in such a step are an error."""
    slot = _begun(stores=False)
    assert slot.receive(_tag(Kind.QUERY, 0))
    slot.answered(slot.step)
    assert slot.receive(_tag(Kind.QUERY, 2))
    with pytest.raises(ProtocolError, match="keys and values of layer 2 in step 3 of batch slot 0, which stores none"):
        slot.receive(_tag(Kind.KEY_VALUE, 2))


def test_keys_that_came_before_the_plan_was_read_are_checked_then() -> None:
    """Query and keys may arrive while the plan waits to be read; if it stores none, that is found when it is read."""
    slot = MemorySlot(0, LAYERS)
    for kind in (Kind.PLAN, Kind.QUERY, Kind.KEY_VALUE):
        assert slot.receive(_tag(kind))
    with pytest.raises(ProtocolError, match="which stores none"):
        slot.planned(slot.step, stores=False)


def test_a_plan_gives_up_the_step_before() -> None:
    """At any moment: what is still said of the step before is stale, and changes nothing."""
    for asked in range(3):
        slot = MemorySlot(0, LAYERS)
        for kind in (Kind.PLAN, Kind.QUERY, Kind.KEY_VALUE)[: asked + 1]:
            assert slot.receive(_tag(kind, 1))
        assert slot.receive(_tag(Kind.PLAN, step=4))
        slot.planned(3, stores=False)
        slot.answered(3)
        assert not slot.receive(_tag(Kind.KEY_VALUE, 1))
        slot.planned(4, stores=True)
        assert slot.receive(_tag(Kind.QUERY, 0, step=4))
        assert slot.receive(_tag(Kind.KEY_VALUE, 0, step=4))


@pytest.mark.parametrize("layer", [0, 1, LAYERS])
def test_layers_increase_and_exist(layer: int) -> None:
    """A query of an earlier layer, of the same one again, or of one that the model has not, is an error."""
    slot = _begun()
    assert slot.receive(_tag(Kind.QUERY, 1))
    assert slot.receive(_tag(Kind.KEY_VALUE, 1))
    slot.answered(slot.step)
    with pytest.raises(ProtocolError, match=f"a query of layer {layer} .* after one of layer 1; expected increasing"):
        slot.receive(_tag(Kind.QUERY, layer))


def test_one_query_at_a_time() -> None:
    """The next query may only come after the answer."""
    slot = _begun()
    assert slot.receive(_tag(Kind.QUERY, 1))
    with pytest.raises(ProtocolError, match="after one of layer 1 that is not answered"):
        slot.receive(_tag(Kind.QUERY, 2))


@pytest.mark.parametrize("before", [[], [Kind.QUERY, Kind.KEY_VALUE]])
def test_keys_come_once_between_query_and_answer(before: list[Kind]) -> None:
    """Keys without a query, and keys twice, are errors."""
    slot = _begun()
    for kind in before:
        assert slot.receive(_tag(kind, 2))
    with pytest.raises(ProtocolError, match="expected them once, between the query"):
        slot.receive(_tag(Kind.KEY_VALUE, 2))


def test_writes_of_an_older_step_and_of_other_kinds_are_stale() -> None:
    """They change nothing: the present step goes on."""
    slot = _begun()
    assert not slot.receive(_tag(Kind.QUERY, 0, step=2))
    assert not slot.receive(_tag(Kind.KEY_VALUE, 0, step=2))
    assert not slot.receive(_tag(Kind.OUTPUT, 0))
    assert slot.receive(_tag(Kind.QUERY, 0))


def test_any_sequence_of_writes_is_let_in_exactly_if_the_protocol_allows_it() -> None:
    """Compared with a plain description of what is allowed, over random writes."""
    dice = random.Random(1)
    accepted = refused = 0
    for _ in range(3000):
        slot, stores = MemorySlot(0, LAYERS), dice.random() < 0.7
        step, layer, asked, stored = -1, -1, False, False
        for _ in range(20):
            kind = dice.choice([Kind.PLAN, Kind.QUERY, Kind.KEY_VALUE])
            tag = Tag(kind, 0, min(LAYERS, max(0, layer + dice.randint(0, 2))), max(step, 0) + (kind is Kind.PLAN))
            stale = kind is not Kind.PLAN and tag.step & STEP_MASK != step
            allowed = {
                Kind.PLAN: True,
                Kind.QUERY: not asked and layer < tag.layer < LAYERS,
                Kind.KEY_VALUE: asked and not stored and stores and tag.layer == layer,
            }[kind]
            if not (stale or allowed):
                refused += 1
                with pytest.raises(ProtocolError):
                    slot.receive(tag)
                break
            accepted += 1
            assert slot.receive(tag) is not stale
            if stale:
                continue
            if kind is Kind.PLAN:
                step, layer, asked, stored = tag.step, -1, False, False
                slot.planned(slot.step, stores=stores)
            elif kind is Kind.QUERY:
                layer, asked, stored = tag.layer, True, False
            else:
                stored = True
            if asked and (stored or not stores):
                slot.answered(slot.step)
                asked = False
    assert accepted > 3000
    assert refused > 1000
