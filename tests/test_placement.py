"""Every position has its place, and every row of a step meets each part of its past exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lamina.wire.placement import Placement, RemoteRun, route

MEMBERS = (0, 2, 3, 7)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    members = tuple(draw(st.permutations(MEMBERS))[: draw(st.integers(1, len(MEMBERS)))])
    return Placement(members, draw(st.none() | st.integers(1, 7)))


@given(placements(), st.integers(0, 100))
def test_every_position_lies_somewhere(placement: Placement, tokens: int) -> None:
    """Each on one member if there are stripes, else on all; and the positions of a member are numbered without gaps."""
    held = dict.fromkeys(MEMBERS, 0)
    for position in range(tokens):
        owners = placement.owners(position)
        assert len(owners) == (1 if placement.stripe else len(placement.members))
        for member in owners:
            assert placement.held(member, position) == held[member]
            held[member] += 1
    assert {member: placement.held(member, tokens) for member in held} == held


@given(placements(), st.integers(0, 50), st.integers(1, 50))
def test_pieces_have_the_same_owners(placement: Placement, start: int, count: int) -> None:
    """Together they are all positions, in order, and no two neighbours could be joined."""
    pieces = list(placement.divide(start, count))

    assert [p for first, n in pieces for p in range(first, first + n)] == list(range(start, start + count))
    assert all(len({placement.owners(p) for p in range(first, first + n)}) == 1 for first, n in pieces)
    if len(placement.members) > 1:
        bounds = [first for first, _ in pieces[1:]]
        assert all(placement.owners(b) != placement.owners(b - 1) for b in bounds)


@given(st.data())
def test_rows_meet_their_whole_past_once(data: st.DataObject) -> None:
    """Each row is stored by the owners of its position, and is whole if no other member holds any of its past.

    Only members with rows take part, in ascending order.
    """
    runs, row = [], 0
    of_row: dict[int, RemoteRun] = {}
    for sequence in range(data.draw(st.integers(1, 6))):
        placement = data.draw(placements())
        start = data.draw(st.integers(0, 40))
        _, count = next(iter(placement.divide(start, data.draw(st.integers(1, 5)))))
        runs.append(RemoteRun(sequence, placement, start, count))
        for _ in range(count):
            of_row[row] = runs[-1]
            row += 1

    routes = route(runs)

    seen: dict[int, list[int]] = {row: [] for row in of_row}
    assert list(routes) == sorted(routes)
    for member, told in routes.items():
        assert told.rows
        in_order = [run for run in (*told.plan.storing, *told.plan.reading) for _ in range(run.count)]
        assert len(in_order) == len(told.rows)
        assert told.plan.stored_rows == sum(run.count for run in told.plan.storing)
        assert told.plan.whole <= told.plan.stored_rows
        for i, (row, run) in enumerate(zip(told.rows, in_order, strict=True)):
            asked = of_row[row]
            owners = asked.placement.owners(asked.start)
            assert run.sequence == asked.sequence
            assert run.start == asked.placement.held(member, asked.start)
            assert (member in owners) == (i < told.plan.stored_rows)
            alone = all(n in owners or not asked.placement.held(n, asked.start) for n in MEMBERS)
            assert (i < told.plan.whole) == (member in owners and alone)
            seen[row].append(member)
    for row, told_members in seen.items():
        asked = of_row[row]
        holders = {n for n in MEMBERS if asked.placement.held(n, asked.start)}
        assert sorted(told_members) == sorted(holders | set(asked.placement.owners(asked.start)))
