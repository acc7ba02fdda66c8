"""The block manager counts the KV cache blocks that each sequence holds on each memory node, and places sequences."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lamina.attention import window_blocks
from lamina.wire.placement import Placement

Partition = Literal["heads", "requests", "tokens"]

STRIPE_BLOCKS = 16
"""Blocks of a stripe: long enough that a short sequence lies on one node and its answers need no merging, short enough
that a long one lies evenly on all."""

MAX_KNOWN_PREFIXES = 2**16
"""The number of first blocks whose place the block manager remembers."""


@dataclass(slots=True)
class _Allocation:
    """Records the blocks that one sequence holds."""

    placement: Placement
    held: dict[int, int]
    """The number of blocks by member id."""
    max_held: int
    """The most blocks that it ever holds on one memory node."""


class BlockManager:
    """Counts the blocks of ``block_tokens`` positions on each memory node, free and held, and places sequences.

    ``blocks`` gives the blocks of each memory node by its member id. With the partition "heads" every node holds the
    same blocks of every sequence, each for its own heads. With "requests" a sequence lies on one node, the one with the
    most free blocks at its admission; with "tokens" it lies in stripes on all nodes in turn, starting with that one. A
    sequence that can need more than any one node has is striped in either case, if ``stripes`` allows that.

    Sequences with the same first block go to the same node, where they can share it, unless another node has more than
    twice as many free blocks.

    If all layers have the same ``window``, a sequence holds no more blocks at once than the window reaches over, plus
    the distance that its layers can be apart. Such sequences are not striped.

    Shared blocks count for every sequence that shares them, so that a memory node always has at least the free blocks
    counted here.

    Memory nodes come and go. What lay on one that is gone is not counted any more, nor freed.
    """

    def __init__(
        self,
        blocks: Mapping[int, int],
        block_tokens: int,
        partition: Partition = "heads",
        *,
        stripes: bool = True,
        window: int | None = None,
    ) -> None:
        self.block_tokens = block_tokens
        self._partition = partition
        self._stripe = STRIPE_BLOCKS * block_tokens if stripes and window is None else None
        self._window = window
        self._blocks: dict[int, int] = {}
        self._free: dict[int, int] = {}
        self._allocations: dict[Hashable, _Allocation] = {}
        self._first_members: OrderedDict[bytes, int] = OrderedDict()
        """The member on which the last sequence with a first block starts, by the key of that block."""
        for member, number in blocks.items():
            self.add(member, number)

    # -- memory nodes

    def add(self, member: int, blocks: int) -> None:
        """A memory node has come, with so many blocks, all free."""
        self._blocks = dict(sorted({**self._blocks, member: blocks}.items()))
        self._free[member] = blocks

    def remove(self, member: int) -> None:
        """A memory node is gone. The sequences that hold blocks there still have to be freed."""
        self._blocks.pop(member, None)
        self._free.pop(member, None)
        for allocation in self._allocations.values():
            allocation.held.pop(member, None)

    def has(self, member: int) -> bool:
        """Return whether blocks of a member are counted."""
        return member in self._blocks

    # -- sequences

    @property
    def total_blocks(self) -> int:
        """Return how many blocks of context fit in all, whether of one sequence or of many."""
        return self._in_all(self._blocks)

    @property
    def free_blocks(self) -> int:
        """Return how many of ``total_blocks`` are free."""
        return self._in_all(self._free)

    @property
    def max_context(self) -> int:
        """Return the longest possible context of a sequence that has all space to itself, on whichever node it
        starts. It is 0 without memory nodes."""
        if not self._blocks:
            return 0
        least, most = (of(self._blocks.values()) * self.block_tokens for of in (min, max))
        if self._partition == "heads":
            return least
        if self._stripe is None:
            return most
        rounds, rest = divmod(least, self._stripe)
        striped = rounds * self._stripe * len(self._blocks) + rest
        return striped if self._partition == "tokens" else max(most, striped)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold ``tokens`` positions."""
        return -(-tokens // self.block_tokens)

    def allocate(
        self,
        sequence: Hashable,
        tokens: int,
        max_context: int,
        *,
        ahead: int | None = None,
        spare: int = 0,
        key: bytes | None = None,
    ) -> Placement | None:
        """Place a new sequence and allocate blocks for its positions 0..tokens-1. Returns None if there is no space.

        The sequence can come to need ``max_context`` positions. Its layers can be ``ahead`` positions apart (None: any
        number). ``key`` is the key of its first block. At least ``spare`` blocks stay free.
        """
        max_held = self.blocks_for(max_context)
        if self._window is not None and ahead is not None:
            max_held = min(max_held, window_blocks(self._window, ahead, self.block_tokens))
        if not self._blocks:
            return None
        if self.free_blocks - min(self.blocks_for(tokens), max_held) < spare:
            return None
        for placement in dict.fromkeys((self._choose(max_context, key), self._choose(max_context, None))):
            self._allocations[sequence] = _Allocation(placement, dict.fromkeys(placement.members, 0), max_held)
            if self.extend(sequence, tokens):
                if key is not None:
                    self._remember(key, placement.members[0])
                return placement
        del self._allocations[sequence]
        return None

    def extend(self, sequence: Hashable, tokens: int) -> bool:
        """Allocate blocks for the positions 0..tokens-1 of a sequence. Returns False, and changes nothing, if there is
        no space."""
        if self.shortage(sequence, tokens):
            return False
        allocation = self._allocations[sequence]
        for member, held in allocation.held.items():
            more = max(0, self._wanted(allocation, member, tokens) - held)
            self._free[member] -= more
            allocation.held[member] = held + more
        return True

    def shortage(self, sequence: Hashable, tokens: int) -> dict[int, int]:
        """Return, by member id, the blocks that have to come free before a sequence can hold the positions 0..tokens-1.

        Members that have enough are left out.
        """
        allocation = self._allocations[sequence]
        return {
            member: missing
            for member, held in allocation.held.items()
            if (missing := self._wanted(allocation, member, tokens) - held - self._free[member]) > 0
        }

    def held_by(self, sequences: Iterable[Hashable]) -> Counter[int]:
        """Return, by member id, the blocks that sequences hold together."""
        total: Counter[int] = Counter()
        for sequence in sequences:
            total.update(self._allocations[sequence].held)
        return total

    def free(self, sequence: Hashable) -> None:
        """Free all blocks of a sequence."""
        for member, held in self._allocations.pop(sequence).held.items():
            if member in self._free:
                self._free[member] += held

    def _in_all(self, blocks: Mapping[int, int]) -> int:
        return min(blocks.values(), default=0) if self._partition == "heads" else sum(blocks.values())

    def _wanted(self, allocation: _Allocation, member: int, tokens: int) -> int:
        """Return the blocks on one member that hold its share of the positions 0..tokens-1."""
        return min(self.blocks_for(allocation.placement.held(member, tokens)), allocation.max_held)

    def _remember(self, key: bytes, member: int) -> None:
        self._first_members[key] = member
        self._first_members.move_to_end(key)
        if len(self._first_members) > MAX_KNOWN_PREFIXES:
            self._first_members.popitem(last=False)

    def _choose(self, max_context: int, key: bytes | None) -> Placement:
        members = tuple(self._blocks)
        if self._partition == "heads":
            return Placement(members)
        large = [member for member in members if self._blocks[member] * self.block_tokens >= max_context]
        if self._partition == "requests" and large:
            return Placement((self._first(large, key),))
        start = members.index(self._first(members, key))
        return Placement(members[start:] + members[:start], self._stripe)

    def _first(self, members: Sequence[int], key: bytes | None) -> int:
        """Return the member on which a sequence starts: where its first block is known, or the one with the most
        space."""
        emptiest = max(members, key=self._free.__getitem__)
        known = emptiest if key is None else self._first_members.get(key, emptiest)
        return known if known in members and 2 * self._free[known] >= self._free[emptiest] else emptiest
