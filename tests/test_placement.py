"""Every position has its place, and every row of a step meets each part of its past exactly once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lamina.wire.placement import Placement, RemoteRun, route

MEMBERS = (0, 2, 3, 7)
LENGTH = 120


@st.composite
def rules(draw: st.DrawFn) -> Placement:
    """Placements of sequences of which nothing has moved."""
    members = tuple(draw(st.permutations(MEMBERS))[: draw(st.integers(1, len(MEMBERS)))])
    return Placement(members, draw(st.none() | st.integers(1, 7)))


@st.composite
def relocations(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    starts = draw(st.lists(st.integers(0, 90), max_size=3))
    return [(start, start + draw(st.integers(1, 25))) for start in starts], draw(st.sampled_from(MEMBERS))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    placement = draw(rules())
    for ranges, member in draw(st.lists(relocations(), max_size=3)):
        placement = placement.relocated(ranges, member)
    return placement


def owners_of(placement: Placement) -> list[tuple[int, ...]]:
    return [placement.owners(position) for position in range(LENGTH)]


@given(placements(), st.integers(0, 100))
def test_every_position_lies_somewhere(placement: Placement, tokens: int) -> None:
    """Each on one member if there are stripes, else on all, or where it was moved; and the positions of a member are
    numbered without gaps."""
    held = dict.fromkeys(MEMBERS, 0)
    for position in range(tokens):
        owners = placement.owners(position)
        if not any(start <= position < stop for start, stop, _ in placement.moved):
            assert len(owners) == (1 if placement.stripe else len(placement.members))
        for member in owners:
            assert member in placement.all_members
            assert placement.position(member, held[member]) == position
            assert placement.held(member, position) == held[member]
            held[member] += 1
    assert {member: placement.held(member, tokens) for member in held} == held


@given(placements(), st.integers(0, 50), st.integers(1, 50))
def test_pieces_have_the_same_owners(placement: Placement, start: int, count: int) -> None:
    """Together they are all positions, in order, and no two neighbours could be joined if nothing has moved."""
    pieces = list(placement.divide(start, count))

    assert [p for first, n in pieces for p in range(first, first + n)] == list(range(start, start + count))
    assert all(len({placement.owners(p) for p in range(first, first + n)}) == 1 for first, n in pieces)
    if len(placement.members) > 1 and not placement.moved:
        bounds = [first for first, _ in pieces[1:]]
        assert all(placement.owners(b) != placement.owners(b - 1) for b in bounds)


@given(rules(), st.lists(relocations(), max_size=4))
def test_what_moves_lies_where_it_moved(placement: Placement, moves: list[tuple[list[tuple[int, int]], int]]) -> None:
    """All else stays, in a form that has each position once, and only what does not lie where the rule has it."""
    rule, expected = placement, owners_of(placement)
    for ranges, member in moves:
        placement = placement.relocated(ranges, member)
        for start, stop in ranges:
            expected[start:stop] = [(member,)] * (stop - start)

    assert owners_of(placement) == expected
    assert placement.moved == tuple(sorted(placement.moved))
    for start, stop, member in placement.moved:
        assert start < stop
        assert (member,) not in owners_of(rule)[start:stop]
    for (_, stop, before), (start, _, after) in pairwise(placement.moved):
        assert stop < start or (stop == start and before != after)


@given(placements(), rules(), st.integers(0, LENGTH))
def test_a_sequence_goes_on_elsewhere(placement: Placement, rule: Placement, start: int) -> None:
    """From a position on it lies by another rule, and before it stays where it is."""
    if placement.stripe is None and len(placement.members) > 1:
        placement = Placement(placement.members[:1])  # what lies on several nodes at once never moves
    after = placement.redirected(rule.members, rule.stripe, start)

    assert (after.members, after.stripe) == (rule.members, rule.stripe)
    assert owners_of(after) == owners_of(placement)[:start] + owners_of(rule)[start:]


@given(placements(), st.integers(1, 8), st.integers(0, 30), st.data())
def test_what_was_found_is_used_as_far_as_all_have_it(
    placement: Placement, size: int, blocks: int, data: st.DataObject
) -> None:
    """If each member has found some of its leading positions, those before the first missing one can be used; and the
    keys of blocks go to the owners."""
    tokens = size * blocks
    found = {m: data.draw(st.integers(0, placement.held(m, tokens))) for m in placement.all_members}
    numbers = dict.fromkeys(MEMBERS, 0)
    missing = [tokens]
    for position in range(tokens):
        for member in placement.owners(position):
            missing += [position] * (numbers[member] >= found[member])
            numbers[member] += 1
    keys = [bytes([block]) for block in range(blocks)]

    assert placement.usable(tokens, found) == min(missing)
    for member in MEMBERS:
        expected = [key for block, key in enumerate(keys) if member in placement.owners(block * size)]
        assert placement.keys_on(member, keys, size) == expected


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
