"""Cut a graph at its attention nodes into slices, with as little to carry between them as possible.

This follows section 4.2 of "Efficient Heterogeneous Large Language Model Decoding with Model-Attention
Disaggregation" (arXiv 2405.01814): without an attention operator the graph stays connected through the residual,
and the minimum weighted cut of what remains says what the next slice must be given. Nodes that no attention input
needs before the cut may fall on either side of it; the cheapest side wins, and on a tie the earlier one, because
work before the cut runs while the memory nodes attend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)


@dataclass(frozen=True)
class SlicePlan(Generic[N]):
    """The nodes of one slice in order of execution.

    ``head`` is what q needs (in the last slice: all of it), ``tail`` the rest. ``carry`` are the nodes whose
    values the next slice is given; empty in the last slice.
    """

    head: tuple[N, ...]
    tail: tuple[N, ...]
    carry: tuple[N, ...]


@dataclass(frozen=True)
class Boundary(Generic[N]):
    """One attention: the nodes of its inputs and the node of its output."""

    q: N
    k: N
    v: N
    o: N


def cut(
    order: Sequence[N],
    inputs_of: Mapping[N, Sequence[N]],
    nbytes: Mapping[N, int | None],
    boundaries: Sequence[Boundary[N]],
    result: N,
) -> list[SlicePlan[N]]:
    """Divide a graph into ``len(boundaries) + 1`` slices.

    ``order`` lists the nodes to place in a topological order (attention outputs among them are skipped);
    ``inputs_of`` gives the nodes that a node reads, restricted to nodes of ``order``; ``nbytes`` what carrying
    a node's value costs per token, None for one that cannot be carried; ``result`` is the node of the logits.
    """
    attention_of = {boundary.o: level for level, boundary in enumerate(boundaries)}
    # The first slice in which a node can run: one after the last attention that it depends on.
    earliest: dict[N, int] = {}
    for node in order:
        level = max((earliest[i] for i in inputs_of[node]), default=0)
        earliest[node] = attention_of[node] + 1 if node in attention_of else level

    plans: list[SlicePlan[N]] = []
    placed: set[N] = set(attention_of)
    carry: tuple[N, ...] = ()
    for level, boundary in enumerate(boundaries):
        needed = _ancestors((boundary.q, boundary.k, boundary.v), inputs_of, stop=placed)
        late = {node for node in needed if earliest[node] > level}
        assert not late, f"attention {level} depends on a later attention through {late}"
        free = [n for n in order if n not in placed and n not in needed and earliest[n] <= level]
        # The output of the previous attention may feed this slice and, through a residual, later ones.
        given = {*carry, boundaries[level - 1].o} if level else set()
        # The attention being cut out is not an edge: q, k and v are sent, not carried.
        kept = [n for n in order if n != boundary.o]
        before, next_carry = _minimum_cut(needed | given, free, kept, inputs_of, nbytes, earliest, level)
        members = [n for n in order if n in before and n not in placed]
        first = _ancestors((boundary.q,), inputs_of, stop=placed)
        plans.append(
            SlicePlan(
                head=tuple(n for n in members if n in first),
                tail=tuple(n for n in members if n not in first),
                carry=tuple(n for n in order if n in next_carry),
            )
        )
        placed.update(members)
        carry = plans[-1].carry
    rest = _ancestors((result,), inputs_of, stop=placed)
    plans.append(SlicePlan(head=tuple(n for n in order if n in rest), tail=(), carry=()))
    return plans


def _ancestors(nodes: Iterable[N], inputs_of: Mapping[N, Sequence[N]], stop: set[N]) -> set[N]:
    """``nodes`` and everything that they depend on, not looking beyond ``stop``."""
    found: set[N] = set()
    pending = [n for n in nodes if n not in stop]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(i for i in inputs_of[node] if i not in stop)
    return found


def _minimum_cut(
    fixed: set[N],
    free: Sequence[N],
    order: Sequence[N],
    inputs_of: Mapping[N, Sequence[N]],
    nbytes: Mapping[N, int | None],
    earliest: Mapping[N, int],
    level: int,
) -> tuple[set[N], set[N]]:
    """Choose which ``free`` nodes run before the cut: (all nodes before it, those whose values cross it).

    Maximum flow from ``fixed`` to the nodes that can only run later. A value is paid for once, however many
    nodes read it, hence every node is two vertices with its bytes between them; edges without bound keep a node's
    inputs on its own side or earlier.
    """
    inside = fixed | set(free)
    flow = _Flow()
    for node in inside:
        flow.edge(("in", node), ("out", node), nbytes[node])
        if node in fixed:
            flow.edge("source", ("in", node), None)
    for node in order:
        later = earliest[node] > level and node not in fixed
        if node not in inside and not later:
            continue
        for source in inputs_of[node]:
            if source in inside:
                flow.edge(("out", source), "sink" if later else ("in", node), None)
                if not later:
                    flow.edge(("in", node), ("in", source), None)
    flow.run("source", "sink")
    after = flow.reaching("sink")
    before = {node for node in inside if ("in", node) not in after}
    crossing = {node for node in before if ("out", node) in after}
    return before, crossing


class _Flow:
    """Maximum flow by shortest augmenting paths (Edmonds and Karp); a capacity of None is without bound."""

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, float]] = {"source": {}, "sink": {}}

    def edge(self, a: Hashable, b: Hashable, capacity: int | None) -> None:
        out = self._left.setdefault(a, {})
        out[b] = out.get(b, 0.0) + (float("inf") if capacity is None else float(capacity))
        self._left.setdefault(b, {}).setdefault(a, 0.0)

    def run(self, source: Hashable, sink: Hashable) -> None:
        while True:
            parent: dict[Hashable, Hashable] = {source: source}
            queue = deque([source])
            while queue and sink not in parent:
                a = queue.popleft()
                for b, left in self._left[a].items():
                    if left > 0 and b not in parent:
                        parent[b] = a
                        queue.append(b)
            if sink not in parent:
                return
            path = [sink]
            while path[-1] != source:
                path.append(parent[path[-1]])
            steps = list(zip(path[1:], path, strict=False))
            amount = min(self._left[a][b] for a, b in steps)
            assert amount < float("inf"), "a value that cannot be carried would have to cross the cut"
            for a, b in steps:
                self._left[a][b] -= amount
                self._left[b][a] += amount

    def reaching(self, sink: Hashable) -> set[Hashable]:
        """All vertices from which more could still flow to ``sink``."""
        found: set[Hashable] = {sink}
        queue = deque([sink])
        while queue:
            b = queue.popleft()
            for a in self._left[b]:
                if a not in found and self._left[a][b] > 0:
                    found.add(a)
                    queue.append(a)
        return found
