"""The cut algorithm on graphs made by hand and at random; nodes are strings or numbers, no torch."""

from __future__ import annotations

from itertools import chain, combinations

from hypothesis import given
from hypothesis import strategies as st

from lamina.model.cut import Boundary, cut


def run(edges, attentions, costs=None, result="logits"):
    """Cut the graph of ``edges`` {node: inputs} in the order written, every value costing 1 unless ``costs`` says."""
    nbytes = {node: (costs or {}).get(node, 1) for node in edges}
    boundaries = [Boundary(*(f"{name}{level}" for name in "qkvo")) for level in range(attentions)]
    return cut(list(edges), edges, nbytes, boundaries, result)


def block(level, source):
    """Attention ``level`` of ``source``: q, k, v and o."""
    q, k, v, o = (f"{name}{level}" for name in "qkvo")
    return {q: [source], k: [source], v: [source], o: [q, k, v]}


def test_residual_is_the_carry():
    """Of the norm and the residual the next slice needs only the residual."""
    first, last = run({"x": [], "norm": ["x"], **block(0, "norm"), "add": ["x", "o0"], "logits": ["add"]}, 1)

    assert first.carry == ("x",)
    assert first.head == ("x", "norm", "q0")
    assert set(first.tail) == {"k0", "v0"}
    assert last.head == ("add", "logits")


def test_cheaper_side_wins_for_a_parallel_branch():
    """A branch beside attention runs before the cut where that makes the carry smaller, after it where not."""
    edges = {"x": [], **block(0, "x"), "mlp": ["x"], "add": ["mlp", "o0"], "logits": ["add"]}

    small, _ = run(edges, 1, {"x": 4, "mlp": 2})
    large, last = run(edges, 1, {"x": 2, "mlp": 4})

    assert small.carry == ("mlp",)
    assert "mlp" in small.tail
    assert large.carry == ("x",)
    assert "mlp" in last.head


def test_tie_goes_to_the_earlier_side():
    """Work before the cut runs while the memory nodes attend, so it is preferred at the same cost."""
    first, _ = run({"x": [], **block(0, "x"), "mlp": ["x"], "add": ["mlp", "o0"], "logits": ["add"]}, 1)

    assert first.carry == ("mlp",)


def test_value_with_several_readers_is_paid_once():
    """Three readers after the cut cost one value, although each of their own values would be cheaper than it."""
    branches = {name: ["x"] for name in ("a", "b", "c")}
    edges = {"x": [], **block(0, "x"), **branches, "add": ["a", "b", "c", "o0"], "logits": ["add"]}

    first, _ = run(edges, 1, {"x": 5, "a": 2, "b": 2, "c": 2})

    assert first.carry == ("x",)


def test_value_read_much_later_passes_through():
    """A value of the first slice that only the last one reads is in every carry between them."""
    edges = {"x": [], **block(0, "x"), **block(1, "o0"), **block(2, "o1"), "logits": ["x", "o2"]}

    plans = run(edges, 3)

    assert [plan.carry for plan in plans] == [("x",), ("x",), ("x",), ()]


def test_attention_output_can_be_carried():
    """The residual of a model without embedding residual: o itself crosses the next cut."""
    edges = {"x": [], **block(0, "x"), **block(1, "o0"), "logits": ["o0", "o1"]}

    plans = run(edges, 2)

    assert [plan.carry for plan in plans] == [(), ("o0",), ()]


def test_what_cannot_be_carried_stays_with_its_readers():
    """The parts of a split cross the cut, never the tuple that the split returns."""
    edges = {"x": [], "split": ["x"], "a": ["split"], **block(0, "a"), "b": ["split"], "logits": ["b", "o0"]}

    first, _ = run(edges, 1, {"x": 9, "split": None, "b": 3})

    assert first.carry == ("b",)


@st.composite
def graphs(draw):
    """A random DAG {node: inputs} with one to three attentions, and the bytes of its values."""
    edges = {"x": []}
    attentions = draw(st.integers(1, 3))
    for level in range(attentions + 1):
        for i in range(draw(st.integers(0, 3))):
            edges[f"n{level}.{i}"] = draw(st.lists(st.sampled_from(list(edges)), min_size=1, max_size=3, unique=True))
        if level < attentions:
            known = list(edges)
            inputs = [f"{name}{level}" for name in "qkv"]
            edges.update({name: [draw(st.sampled_from(known))] for name in inputs})
            edges[f"o{level}"] = inputs
    read = {i for inputs in edges.values() for i in inputs}
    edges["logits"] = [node for node in edges if node not in read]
    return edges, attentions, {node: draw(st.integers(1, 5)) for node in edges}


@given(graphs())
def test_any_graph_is_cut_into_slices_that_can_run(graph):
    """Every node runs once, with every value that it reads at hand; heads hold nothing that q does not need."""
    edges, attentions, costs = graph

    plans = run(edges, attentions, costs)

    ran = list(chain.from_iterable((*plan.head, *plan.tail) for plan in plans))
    assert sorted([*ran, *(f"o{level}" for level in range(attentions))]) == sorted(edges)
    given_values: set[str] = set()
    for level, plan in enumerate(plans):
        present = set(given_values)
        for node in (*plan.head, *plan.tail):
            assert present.issuperset(edges[node])
            present.add(node)
        if level < attentions:
            needed = ancestors(edges, f"q{level}")
            assert needed.issuperset(plan.head)
            assert needed.isdisjoint(plan.tail)
            assert present.issuperset((f"q{level}", f"k{level}", f"v{level}", *plan.carry))
            given_values = {*plan.carry, f"o{level}"}


@given(graphs())
def test_carry_of_the_first_cut_is_the_cheapest(graph):
    """No other division of the nodes between the first slice and the rest carries fewer bytes."""
    edges, attentions, costs = graph

    first = run(edges, attentions, costs)[0]

    assert sum(costs[node] for node in first.carry) == min(
        sum(costs[node] for node in crossing(edges, before)) for before in divisions(edges)
    )


def divisions(edges):
    """All sets of nodes that may run before the first attention: closed under inputs, with all that it needs."""
    late = {node for node in edges if any(i.startswith("o") for i in ancestors(edges, node))}
    fixed = ancestors(edges, "q0") | ancestors(edges, "k0") | ancestors(edges, "v0")
    free = [node for node in edges if node not in late and node not in fixed]
    for size in range(len(free) + 1):
        for chosen in combinations(free, size):
            before = fixed.union(chosen)
            if all(before.issuperset(edges[node]) for node in before):
                yield before


def crossing(edges, before):
    return {i for node, inputs in edges.items() if node not in before and node != "o0" for i in inputs if i in before}


def ancestors(edges, node):
    """``node`` and everything that it depends on."""
    found, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(edges[node])
    return found
