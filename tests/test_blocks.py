"""The block manager places sequences by member id, and its counts always add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.front.blocks import STRIPE_BLOCKS, BlockManager, Partition
from lamina.wire.placement import Placement

BLOCK = 4
STRIPE = STRIPE_BLOCKS * BLOCK


def test_heads_lie_on_all_members() -> None:
    """With divided heads every sequence lies on all members, and the smallest of them limits it."""
    manager = BlockManager({5: 30, 2: 20}, BLOCK)

    assert manager.allocate("a", 10, 40) == Placement((2, 5))
    assert manager.held_by(["a"]) == {2: 3, 5: 3}
    assert (manager.total_blocks, manager.free_blocks, manager.max_context) == (20, 17, 80)


def test_requests_go_to_the_member_with_the_most_space() -> None:
    """With divided requests a sequence lies on the emptiest member; one too long for each is striped over all."""
    manager = BlockManager({1: 20, 4: 30, 9: 30}, BLOCK, "requests")

    assert manager.allocate("a", 40, 40) == Placement((4,))
    assert manager.allocate("b", 4, 40) == Placement((9,))
    assert manager.allocate("c", 4, 40) == Placement((9,))
    assert manager.allocate("long", 4, 200) == Placement((9, 1, 4), STRIPE)
    assert manager.held_by("bc") == {9: 2}


def test_sequences_with_the_same_first_block_lie_together() -> None:
    """Sequences go where their first block is known, until another member has more than twice as much space free."""
    manager = BlockManager({1: 20, 4: 20}, BLOCK, "requests")
    places = [manager.allocate(n, 16, 16, key=b"same") for n in range(4)]

    assert places == [Placement((1,)), Placement((1,)), Placement((1,)), Placement((4,))]


def test_stripes_start_on_the_emptiest_member() -> None:
    """With divided tokens a short sequence takes blocks on one member only, and a long one on all in turn."""
    manager = BlockManager({1: 40, 4: 50, 9: 40}, BLOCK, "tokens")

    assert manager.allocate("a", STRIPE, 3 * STRIPE) == Placement((4, 9, 1), STRIPE)
    assert manager.held_by(["a"]) == {4: STRIPE_BLOCKS, 9: 0, 1: 0}
    assert manager.extend("a", STRIPE + 1)
    assert manager.held_by(["a"]) == {4: STRIPE_BLOCKS, 9: 1, 1: 0}


def test_a_shortage_names_the_members_that_lack_blocks() -> None:
    """Members that have enough are not named, and nothing is allocated while any member lacks blocks."""
    manager = BlockManager({1: 4, 4: 10}, BLOCK)
    assert manager.allocate("a", 8, 100)
    assert manager.allocate("b", 4, 100)

    assert manager.shortage("a", 20) == {1: 2}
    assert not manager.extend("a", 20)
    assert manager.free_blocks == 1
    manager.free("b")
    assert manager.shortage("a", 20) == {1: 1}


@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
@given(
    blocks=st.dictionaries(st.integers(0, 40), st.integers(1, 60), min_size=1, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=12),
    window=st.none() | st.integers(1, 40),
)
def test_blocks_are_never_given_twice(
    partition: Partition, blocks: dict[int, int], sizes: list[tuple[int, int]], window: int | None
) -> None:
    """No member ever holds more blocks than it has, and all are free when all sequences are."""
    manager = BlockManager(blocks, BLOCK, partition, window=window)
    placed = []
    for sequence, (tokens, more) in enumerate(sizes):
        if manager.allocate(sequence, tokens, tokens + more, ahead=8):
            placed.append(sequence)
            manager.extend(sequence, tokens + more)
        held = manager.held_by(placed)
        assert all(0 <= held[member] <= blocks[member] for member in held)
        assert held.keys() <= blocks.keys()
    for sequence in placed:
        manager.free(sequence)
    assert manager.free_blocks == manager.total_blocks
