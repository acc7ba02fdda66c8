"""Pure functions say in which order memory nodes have the blocks of a sequence of which something has moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lamina.wire.placement import Placement, Range


@dataclass(frozen=True, slots=True)
class TableOrder:
    """Says in which order the blocks of one sequence come in the block tables of its memory nodes.

    What has been brought from another node comes first, the latest before what came earlier. All else follows in the
    order of its positions. Attention does not depend on the order; keys of blocks and transfers do.
    """

    brought: Mapping[int, tuple[Range, ...]] = field(default_factory=dict)
    """What was brought, by member id, in the order of its table."""

    def ranges(self, placement: Placement, member: int, tokens: int) -> list[Range]:
        """Return which of the first ``tokens`` positions lie on ``member``, in the order of its table."""
        own = [
            (start, start + count) for start, count in placement.divide(0, tokens) if member in placement.owners(start)
        ]
        brought = self.brought.get(member, ())
        return [*brought, *_joined(_without(own, brought))]

    def runs_on(
        self, placement: Placement, member: int, keys: Sequence[bytes], block_tokens: int, first: int = 0
    ) -> list[tuple[int, list[bytes]]]:
        """Return the keys of blocks on ``member``, out of the keys of blocks from number ``first`` of the sequence on:
        runs in its table, each with the number there of its first block."""
        size = block_tokens
        if not self.brought.get(member):
            own = placement.keys_on(member, keys, size, first)
            return [(placement.held(member, first * size) // size, own)] if own else []
        runs: list[tuple[int, list[bytes]]] = []
        ranges = self.ranges(placement, member, (first + len(keys)) * size)
        table = (block for start, stop in ranges for block in range(start // size, stop // size))
        for number, block in enumerate(table):
            if block < first:
                continue
            if not (runs and number == runs[-1][0] + len(runs[-1][1])):
                runs.append((number, []))
            runs[-1][1].append(keys[block - first])
        return runs

    def moved(self, ranges: Sequence[Range], source: int, target: int) -> TableOrder:
        """Return the order when these positions have been brought from one member to another."""
        left = tuple(_without(self.brought.get(source, ()), ranges))
        brought = {**self.brought, source: left, target: (*ranges, *self.brought.get(target, ()))}
        return TableOrder({member: parts for member, parts in brought.items() if parts})


IN_ORDER = TableOrder()
"""Nothing was brought."""


def part_of(ranges: Iterable[Range], first: int, count: int) -> list[Range]:
    """Return ``count`` positions of ``ranges``, from number ``first`` of them on."""
    found, stop = [], first + count
    number = 0
    for start, end in ranges:
        inside = max(start, start + first - number), min(end, start + stop - number)
        if inside[0] < inside[1]:
            found.append(inside)
        number += end - start
    return found


def _without(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """Return ranges, in their order, without the positions of others."""
    left = list(ranges)
    for start, stop in others:
        parts = (part for a, b in left for part in ((a, min(b, start)), (max(a, stop), b)))
        left = [(a, b) for a, b in parts if a < b]
    return left


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges with neighbours made one."""
    found: list[Range] = []
    for start, stop in ranges:
        joined = found.pop()[0] if found and found[-1][1] == start else start
        found.append((joined, stop))
    return found
