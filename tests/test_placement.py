"""Every position has its place, and every row of a step meets everything that it should, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lamina.wire.placement import Placement, RemoteRun, route

NODES = 4


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    nodes = tuple(draw(st.permutations(range(NODES)))[: draw(st.integers(1, NODES))])
    return Placement(nodes, draw(st.none() | st.integers(1, 7)))


@given(placements(), st.integers(0, 100))
def test_every_position_lies_somewhere(placement: Placement, tokens: int) -> None:
    """In stripes on one node each, else on all; and what a node holds is numbered without gaps."""
    held = dict.fromkeys(range(NODES), 0)
    for position in range(tokens):
        owners = placement.owners(position)
        assert len(owners) == (1 if placement.stripe else len(placement.nodes))
        for node in owners:
            assert placement.held(node, position) == held[node]
            held[node] += 1
    assert {node: placement.held(node, tokens) for node in held} == held


@given(placements(), st.integers(0, 50), st.integers(1, 50))
def test_pieces_have_the_same_owners(placement: Placement, start: int, count: int) -> None:
    """They are the whole, in order, and as long as can be."""
    pieces = list(placement.divide(start, count))

    assert [p for first, n in pieces for p in range(first, first + n)] == list(range(start, start + count))
    assert all(len({placement.owners(p) for p in range(first, first + n)}) == 1 for first, n in pieces)
    if len(placement.nodes) > 1:
        bounds = [first for first, _ in pieces[1:]]
        assert all(placement.owners(b) != placement.owners(b - 1) for b in bounds)


@given(st.data())
def test_rows_meet_their_whole_past_once(data: st.DataObject) -> None:
    """Each row is stored by the owners of its position, and answered whole where nobody else holds any of its past."""
    runs, row = [], 0
    of_row: dict[int, RemoteRun] = {}
    for sequence in range(data.draw(st.integers(1, 6))):
        placement = data.draw(placements())
        start = data.draw(st.integers(0, 40))
        _, room = next(iter(placement.divide(start, data.draw(st.integers(1, 5)))))
        runs.append(RemoteRun(sequence, placement, start, room))
        for _ in range(room):
            of_row[row] = runs[-1]
            row += 1

    routes = route(runs, NODES)

    seen: dict[int, list[int]] = {row: [] for row in of_row}
    for node, told in enumerate(routes):
        in_order = [run for run in (*told.plan.storing, *told.plan.reading) for _ in range(run.count)]
        assert len(in_order) == len(told.rows)
        assert told.plan.stored_rows == sum(run.count for run in told.plan.storing)
        assert told.plan.whole <= told.plan.stored_rows
        for i, (row, run) in enumerate(zip(told.rows, in_order, strict=True)):
            asked = of_row[row]
            owners = asked.placement.owners(asked.start)
            assert run.sequence == asked.sequence
            assert run.start == asked.placement.held(node, asked.start)
            assert (node in owners) == (i < told.plan.stored_rows)
            alone = all(n in owners or not asked.placement.held(n, asked.start) for n in range(NODES))
            assert (i < told.plan.whole) == (node in owners and alone)
            seen[row].append(node)
    for row, nodes in seen.items():
        asked = of_row[row]
        holders = {n for n in range(NODES) if asked.placement.held(n, asked.start)}
        assert sorted(nodes) == sorted(holders | set(asked.placement.owners(asked.start)))
