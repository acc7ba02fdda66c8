"""Where the keys and values of a sequence lie, and so which memory node does what in a step. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lamina.attention import Run
from lamina.wire.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one sequence lies: on the memory nodes number ``nodes``.

    Without ``stripe`` each of them holds all tokens: of its own KV heads if heads are divided, else there is but one
    node. With it, the tokens go round the nodes in stripes of so many. A memory node knows nothing of stripes: what it
    holds of a sequence is numbered from 0 there, as rotary positions have been applied to keys before they come.
    """

    nodes: tuple[int, ...]
    stripe: int | None = None

    def held(self, node: int, tokens: int) -> int:
        """How many of the first ``tokens`` positions lie on ``node``: also the number there of the next that does."""
        if node not in self.nodes:
            return 0
        if self.stripe is None:
            return tokens
        rounds, rest = divmod(tokens, self.stripe * len(self.nodes))
        mine = rest - self.nodes.index(node) * self.stripe
        return rounds * self.stripe + min(max(mine, 0), self.stripe)

    def position(self, node: int, index: int) -> int:
        """Which position is number ``index`` on ``node``: the inverse of `held`."""
        if self.stripe is None:
            return index
        rounds, rest = divmod(index, self.stripe)
        return (rounds * len(self.nodes) + self.nodes.index(node)) * self.stripe + rest

    def owners(self, position: int) -> tuple[int, ...]:
        """The nodes that hold a position."""
        if self.stripe is None:
            return self.nodes
        return (self.nodes[position // self.stripe % len(self.nodes)],)

    def usable(self, tokens: int, found: Mapping[int, int]) -> int:
        """How many of the first ``tokens`` positions are there, if each node has found so many of its own."""
        return min(
            (self.position(node, n) for node, n in found.items() if n < self.held(node, tokens)),
            default=tokens,
        )

    def keys_on(self, node: int, keys: Sequence[bytes], block_tokens: int) -> list[bytes]:
        """Of the keys of leading blocks, those of blocks that lie on ``node``."""
        return [key for block, key in enumerate(keys) if node in self.owners(block * block_tokens)]

    def until_next(self, position: int) -> int | None:
        """Positions from ``position`` on that have the same owners; None: all."""
        return None if self.stripe is None else self.stripe - position % self.stripe

    def divide(self, start: int, count: int) -> Iterable[tuple[int, int]]:
        """Cut positions into pieces (start, count) that have the same owners each."""
        stop = start + count
        while start < stop:
            room = self.until_next(start)
            piece = stop - start if room is None else min(room, stop - start)
            yield start, piece
            start += piece


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """Rows of a step whose past lies on memory nodes: ``count`` positions from ``start`` with the same owners."""

    sequence: int
    placement: Placement
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class NodeRows:
    """What one memory node does in a step: its plan, and the numbers that its rows have in the step, in its order.

    The rows that it stores and that see nothing anywhere else are whole; all others come back as partials.
    """

    plan: StepPlan
    rows: list[int]


def route(runs: Sequence[RemoteRun], nodes: int) -> list[NodeRows]:
    """Divide the rows of a step over ``nodes`` memory nodes. Nodes that take no part have no rows."""
    parts: list[tuple[list[_Part], list[_Part], list[_Part]]] = [([], [], []) for _ in range(nodes)]
    row = 0
    for run in runs:
        place, numbers = run.placement, range(row, row + run.count)
        row += run.count
        owners = place.owners(run.start)
        others = [n for n in place.nodes if n not in owners and place.held(n, run.start)]
        for node in owners:
            part = Run(run.sequence, place.held(node, run.start), run.count), numbers
            parts[node][1 if others else 0].append(part)
        for node in others:
            parts[node][2].append((Run(run.sequence, place.held(node, run.start), run.count), numbers))
    return [_node_rows(*of_node) for of_node in parts]


_Part = tuple[Run, range]


def _node_rows(whole: list[_Part], partial: list[_Part], reading: list[_Part]) -> NodeRows:
    stored = whole + partial
    plan = StepPlan(
        storing=tuple(run for run, _ in stored),
        reading=tuple(run for run, _ in reading),
        whole=sum(run.count for run, _ in whole),
    )
    return NodeRows(plan, [row for _, rows in stored + reading for row in rows])
