"""Cut a graph at its attention nodes into slices that hand each other as few bytes as possible.

This follows section 4.2 of "Efficient Heterogeneous Large Language Model Decoding with Model-Attention
Disaggregation" (arXiv 2405.01814): without an attention operator the graph stays connected through the residual,
and the minimum weighted cut of the rest determines what the next slice must receive. Nodes that no attention input
needs before the cut may run on either side of it. The cheaper side wins, and on a tie the earlier one, because work
before the cut runs while the memory nodes attend.
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

    ``head`` holds the nodes that q needs (all nodes in the last slice), and ``tail`` the others. ``carry`` holds the
    nodes whose values the next slice receives; it is empty in the last slice.
    """

    head: tuple[N, ...]
    tail: tuple[N, ...]
    carry: tuple[N, ...]


@dataclass(frozen=True)
class Boundary(Generic[N]):
    """One attention operator: the nodes of its inputs and the node of its output."""

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

    ``order`` lists all nodes in a topological order, including attention outputs. ``inputs_of`` holds the nodes that a
    node reads, and ``nbytes`` the size of a node's value per token, or None if the value cannot be carried.
    ``boundaries`` are in the order of ``order``, and ``result`` is the node of the logits.
    """
    attention_of = {boundary.o: level for level, boundary in enumerate(boundaries)}
    # The first slice in which a node can run: one after the last attention that it depends on.
    earliest: dict[N, int] = {}
    ready: list[list[N]] = [[] for _ in range(len(boundaries) + 1)]
    readers_of: dict[N, list[N]] = {node: [] for node in order}
    for node in order:
        if node in attention_of:
            earliest[node] = attention_of[node] + 1
        else:
            earliest[node] = max((earliest[i] for i in inputs_of[node]), default=0)
            ready[earliest[node]].append(node)
        for source in inputs_of[node]:
            readers_of[source].append(node)

    plans: list[SlicePlan[N]] = []
    given: tuple[N, ...] = ()
    waiting = ready[0]
    for level, boundary in enumerate(boundaries):
        unplaced = set(waiting)
        needed = _ancestors((boundary.q, boundary.k, boundary.v), inputs_of, within=unplaced)
        nodes = (*given, *waiting)
        # Attention itself is not an edge: q, k and v are sent, not carried.
        exposed = {n for n in nodes if any(earliest[r] > level and r != boundary.o for r in readers_of[n])}
        before, crossing = _minimum_cut(nodes, needed.union(given), exposed, inputs_of, nbytes)
        members = [n for n in waiting if n in before]
        first = _ancestors((boundary.q,), inputs_of, within=unplaced)
        carry = tuple(n for n in nodes if n in crossing)
        plans.append(
            SlicePlan(
                head=tuple(n for n in members if n in first),
                tail=tuple(n for n in members if n not in first),
                carry=carry,
            )
        )
        given = (*carry, boundary.o)
        waiting = [n for n in waiting if n not in before] + ready[level + 1]
    rest = _ancestors((result,), inputs_of, within=set(waiting))
    plans.append(SlicePlan(head=tuple(n for n in waiting if n in rest), tail=(), carry=()))
    return plans


def _ancestors(nodes: Iterable[N], inputs_of: Mapping[N, Sequence[N]], within: set[N]) -> set[N]:
    """Those of ``nodes``, and of all that they depend on, which are reached without leaving ``within``."""
    found: set[N] = set()
    pending = [n for n in nodes if n in within]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(i for i in inputs_of[node] if i in within)
    return found


def _minimum_cut(
    nodes: Sequence[N],
    fixed: set[N],
    exposed: set[N],
    inputs_of: Mapping[N, Sequence[N]],
    nbytes: Mapping[N, int | None],
) -> tuple[set[N], set[N]]:
    """Choose which of ``nodes`` run before the cut. Return all nodes before it, and those whose values cross it.

    The cut comes from the maximum flow from the ``fixed`` nodes, which must run before it, to the readers of the
    ``exposed`` nodes, which can only run after it. A value counts once, even if many nodes read it; hence every node is
    two vertices with its bytes between them. Unbounded edges keep a node's inputs on its own side or earlier.
    """
    inside = set(nodes)
    flow = _Flow()
    for node in nodes:
        flow.edge(("in", node), ("out", node), nbytes[node])
        if node in fixed:
            flow.edge("source", ("in", node), None)
        if node in exposed:
            flow.edge(("out", node), "sink", None)
        for source in inputs_of[node]:
            if source in inside:
                flow.edge(("out", source), ("in", node), None)
                flow.edge(("in", node), ("in", source), None)
    flow.run("source", "sink")
    after = flow.reaching("sink")
    before = {node for node in nodes if ("in", node) not in after}
    crossing = {node for node in before if ("out", node) in after}
    return before, crossing


class _Flow:
    """Maximum flow by shortest augmenting paths (Edmonds and Karp); a capacity of None is unbounded."""

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
        """Return all vertices from which more could still flow to ``sink``."""
        found: set[Hashable] = {sink}
        queue = deque([sink])
        while queue:
            b = queue.popleft()
            for a in self._left[b]:
                if a not in found and self._left[a][b] > 0:
                    found.add(a)
                    queue.append(a)
        return found
