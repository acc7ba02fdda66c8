"""Which compute node runs which slice: never two at once, every batch in order, everybody busy."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.compute.schedule import Schedule, replica

SHAPES = [(batches, replicas) for batches in range(1, 9) for replicas in range(1, 5)]
TURNS = 64


@pytest.mark.parametrize(("batches", "replicas"), SHAPES)
def test_no_replica_has_two_slices_at_once(batches: int, replicas: int) -> None:
    """A slice takes as many intervals as there are replicas; a batch's next one begins ``batches`` intervals later, or
    right after the attention where each batch has a replica to itself."""
    apart = max(batches, replicas + 1)
    busy: Counter[tuple[int, int]] = Counter()
    for batch in range(batches):
        for turn in range(TURNS):
            node = replica(batch, turn, batches=batches, replicas=replicas)
            begin = batch + apart * turn
            busy.update((node, interval) for interval in range(begin, begin + replicas))

    assert max(busy.values()) == 1


@pytest.mark.parametrize(("batches", "replicas"), SHAPES)
def test_replicas_have_equal_work(batches: int, replicas: int) -> None:
    """All of them where there are enough batches, else as many as there are batches."""
    turns = Counter(
        replica(batch, turn, batches=batches, replicas=replicas) for batch in range(batches) for turn in range(60)
    )

    assert len(turns) == min(batches, replicas)
    assert len(set(turns.values())) == 1


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 40), st.integers(0, 7), st.integers(0, 10**6))
def test_a_step_begins_where_the_last_one_ended(
    batches: int, replicas: int, layers: int, batch: int, step: int
) -> None:
    """The last slice, the sampling and the next first slice are one turn, whatever the step."""
    schedule = Schedule(layers, tuple(range(replicas)), batches)
    batch %= batches
    route = schedule.route(batch, step)

    assert len(route) == layers + 1
    assert route[-1] == schedule.route(batch, step + 1)[0]
    assert route == tuple(
        replica(batch, step * layers + i, batches=batches, replicas=replicas) for i in range(layers + 1)
    )


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 40))
def test_it_is_known_whether_layers_stay_where_they_are(batches: int, replicas: int, layers: int) -> None:
    """So that a compute node may keep what it needs again in the next step."""
    schedule = Schedule(layers, tuple(range(replicas)), batches)
    steps = [{schedule.route(batch, step)[:-1] for step in range(12)} for batch in range(batches)]

    assert schedule.is_settled == all(len(routes) == 1 for routes in steps)


@pytest.mark.parametrize("replicas", range(1, 5))
def test_twice_as_many_batches_as_replicas_move_no_carry(replicas: int) -> None:
    """And neither do as many, or fewer."""
    for batches in (*range(1, replicas + 1), 2 * replicas):
        schedule = Schedule(10, tuple(range(replicas)), batches)
        assert all(len(set(schedule.route(batch, 5))) == 1 for batch in range(batches))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 100))
def test_layers_are_run_where_they_lie(counts: list[int], batches: int, step: int) -> None:
    """Of every batch in every step; the last node has the last slice too."""
    firsts = tuple(sum(counts[:node]) for node in range(len(counts)))
    schedule = Schedule(sum(counts), tuple(range(len(counts))), batches, firsts)
    expected = [node for node, count in enumerate(counts) for _ in range(count)]

    for batch in range(batches):
        assert schedule.route(batch, step) == (*expected, len(counts) - 1)
    assert schedule.is_settled
    assert [slice_ for node in range(len(counts)) for slice_ in schedule.slices(node)] == list(range(sum(counts) + 1))
    for node in range(len(counts)):
        assert all(expected[i] == node for i in schedule.slices(node) if i < sum(counts))


def test_one_batch_more_than_replicas_leaves_none_idle() -> None:
    """With as little attention as one slice divided by the replicas: that is the papers' (j + k) mod R."""
    for replicas in range(1, 5):
        batches = replicas + 1
        for batch in range(batches):
            for turn in range(20):
                assert replica(batch, turn, batches=batches, replicas=replicas) == (batch + turn) % replicas


def test_members_are_named_by_their_ids() -> None:
    """Ids need not be consecutive: after a node is gone, the others keep theirs."""
    replicas = Schedule(4, (3, 7, 9), batches=2)
    assert {member for batch in range(2) for member in replicas.route(batch, 0)} <= {3, 7, 9}

    ranges = Schedule(4, (3, 9), first_layers=(0, 1))
    assert ranges.route(0, 5) == (3, 9, 9, 9, 9)
    assert list(ranges.slices(9)) == [1, 2, 3, 4]
