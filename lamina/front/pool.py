"""Decide which blocks move from one memory node to another, so that all of them are one pool. This is pure Python.

The rule is the greedy one of Infinite-LLM (Lin et al., 2024, https://arxiv.org/abs/2401.02669): memory nodes that are
full or slow are debtors, those with free blocks are creditors. The debtor's longest sequence moves its oldest blocks to
the creditor, as many as promise the most tokens per second by the cost model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lamina.front.cost import CostModel, StepLoad
from lamina.front.sequence import Sequence

MIN_GAIN = 0.03
"""Blocks move if that is expected to give this share of tokens per second more."""
MAX_LOSS = 0.01
"""To make room on a full node, so much of them may be given up."""
MAX_BLOCKS = 256
"""The most blocks of one transfer. While it is under way, they take space on both nodes."""


@dataclass(slots=True)
class NodeLoad:
    """What a memory node has, and what a step of all running sequences asks of it."""

    blocks: int
    free: int
    rows: int = 0
    """The sequences that have positions there."""
    context: int = 0
    """The positions of theirs that are there."""
    kept: int = 0
    """The blocks that its sequences will soon grow into."""

    @property
    def is_full(self) -> bool:
        """Return whether some sequence that grows there will find no space."""
        return self.free < self.kept


class Movable(NamedTuple):
    """A sequence that can move, and its whole blocks by member id."""

    sequence: Sequence
    blocks: Mapping[int, int]


class Proposal(NamedTuple):
    """Move so many of the first blocks that a sequence has on one memory node to another one."""

    sequence: Sequence
    source: int
    target: int
    blocks: int


def propose(
    nodes: Mapping[int, NodeLoad],
    movable: Iterable[Movable],
    cost: CostModel,
    *,
    rows: int,
    block_tokens: int,
    draining: Collection[int] = (),
    most: int = 1,
) -> list[Proposal]:
    """Return at most ``most`` moves, no two of which concern the same sequence, source or target, while ``rows``
    sequences run.

    What is on ``draining`` members moves first, whatever it costs. Nothing moves to and fro: moves make steps faster by
    `MIN_GAIN`, or relieve a node that is full, and no move makes one full.
    """
    nodes = {member: replace(load) for member, load in nodes.items()}
    left = sorted(movable, key=lambda m: (-sum(m.blocks.values()), m.sequence.arrival))
    found: list[Proposal] = []
    busy: set[int] = set()
    while len(found) < most:
        if draining:
            best = next(_of_draining(nodes, left, draining, busy), None)
        else:
            best = next(_of_debtors(nodes, left, _Speed(nodes, cost, rows), busy, block_tokens), None)
        if best is None:
            break
        found.append(best)
        busy |= {best.source, best.target}
        left = [m for m in left if m.sequence is not best.sequence]
    return found


def _of_draining(
    nodes: Mapping[int, NodeLoad], movable: list[Movable], draining: Collection[int], busy: Collection[int]
) -> Iterator[Proposal]:
    """Move away what does not grow there; what does is let grow elsewhere first."""
    for source in sorted(set(draining) - set(busy)):
        for own in movable:
            blocks = own.blocks.get(source, 0)
            if not blocks or source in own.sequence.placement.members:
                continue
            for target in _creditors(nodes, (*draining, *busy)):
                if nodes[target].free:
                    yield Proposal(own.sequence, source, target, min(blocks, nodes[target].free, MAX_BLOCKS))


def _of_debtors(
    nodes: Mapping[int, NodeLoad], movable: list[Movable], speed: _Speed, busy: Collection[int], block_tokens: int
) -> Iterator[Proposal]:
    debtors = [member for member in nodes if member not in busy]
    for source in sorted(debtors, key=lambda m: (not nodes[m].is_full, -speed.seconds(nodes[m]), m)):
        own = max((m for m in movable if m.blocks.get(source)), key=lambda m: m.blocks[source], default=None)
        if own is None:
            continue
        for target in _creditors(nodes, (source, *busy)):
            amounts = {
                worth: blocks
                for blocks in _amounts(own.blocks[source], nodes[target])
                if (worth := speed.worth(own, source, target, blocks, block_tokens)) is not None
            }
            if amounts:
                yield Proposal(own.sequence, source, target, amounts[max(amounts)])


def _creditors(nodes: Mapping[int, NodeLoad], without: Collection[int]) -> list[int]:
    """Return the memory nodes that can take blocks, the one with the most free first."""
    others = [member for member in nodes if member not in without]
    return sorted(others, key=lambda m: (nodes[m].kept - nodes[m].free, m))


def _amounts(blocks: int, target: NodeLoad) -> Iterator[int]:
    """Return the numbers of blocks to try: all, and powers of two."""
    most = min(blocks, target.free - target.kept, MAX_BLOCKS)
    amount = 1
    while amount < most:
        yield amount
        amount *= 2
    if most > 0:
        yield most


class _Speed:
    """Predicts how long a step of all running sequences takes, which waits for the slowest memory node."""

    def __init__(self, nodes: Mapping[int, NodeLoad], cost: CostModel, rows: int) -> None:
        self._nodes = nodes
        self._cost = cost
        other = cost.cost(StepLoad(rows))
        self._other_s = other.compute_s + other.wire_s

    def seconds(self, load: NodeLoad) -> float:
        """Return the time of a node. The cost model knows steps by what all nodes have to do together."""
        every = len(self._nodes)
        return self._cost.cost(StepLoad(every * load.rows, 0, every * load.context)).memory_s

    def worth(
        self, own: Movable, source: int, target: int, blocks: int, block_tokens: int
    ) -> tuple[bool, float] | None:
        """Return what a move is worth, to be compared with that of others: the share of tokens per second that it is
        expected to bring, or less than any, the blocks that it frees on a full node. None: it should not be made."""
        here, there = self._nodes[source], self._nodes[target]
        moved = blocks * block_tokens
        after = replace(
            here, free=here.free + blocks, context=here.context - moved, rows=here.rows - (blocks == own.blocks[source])
        )
        taken = replace(
            there, free=there.free - blocks, context=there.context + moved, rows=there.rows + (target not in own.blocks)
        )
        before_s = max(map(self.seconds, self._nodes.values()))
        unchanged = [load for member, load in self._nodes.items() if member not in (source, target)]
        after_s = max(map(self.seconds, (*unchanged, after, taken)))
        gain = (self._other_s + before_s) / max(self._other_s + after_s, 1e-12) - 1
        if gain >= MIN_GAIN and self.seconds(taken) <= self.seconds(after):
            return True, gain
        if gain >= -MAX_LOSS and here.is_full and taken.free / taken.blocks >= after.free / after.blocks:
            return False, blocks
        return None
