"""The block manager counts the KV cache blocks that each sequence holds on each memory node, and places sequences."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamina.attention import window_blocks
from lamina.errors import CapacityError
from lamina.limits import MAX_MOVED
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
    coming: Counter[int] = field(default_factory=Counter)
    """The blocks held for what is on its way to another memory node, by member id."""
    successor: _Successor | None = None


class _Successor(NamedTuple):
    """What a sequence will hold instead, once the memory nodes agree, and what that takes in addition until then."""

    placement: Placement
    held: dict[int, int]
    more: dict[int, int]


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

    Memory nodes come and go. What lay on one that is gone is not counted any more, nor freed. On one that is
    ``draining`` no new sequence is placed, and its blocks do not count as free.

    With ``moves``, sequences may lie in parts: a new one for which no node has the space alone takes some on several,
    a running one can go on elsewhere, and its blocks can move. Heads and windows exclude that.
    """

    def __init__(
        self,
        blocks: Mapping[int, int],
        block_tokens: int,
        partition: Partition = "heads",
        *,
        stripes: bool = True,
        window: int | None = None,
        moves: bool = False,
    ) -> None:
        self.block_tokens = block_tokens
        self.can_move = moves and partition != "heads" and window is None
        self.draining: set[int] = set()
        """The members that are to be empty soon."""
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
        self.draining.discard(member)
        for allocation in self._allocations.values():
            allocation.held.pop(member, None)
            allocation.coming.pop(member, None)
            if allocation.successor is not None:
                allocation.successor.held.pop(member, None)
                allocation.successor.more.pop(member, None)

    def has(self, member: int) -> bool:
        """Return whether blocks of a member are counted."""
        return member in self._blocks

    def drain(self, member: int, context: int) -> None:
        """Place nothing new on a memory node, as it is to be empty.

        Raises CapacityError, and changes nothing, if the others cannot hold one request of ``context`` tokens.
        """
        self.draining.add(member)
        if (most := self.max_context) < context:
            self.draining.discard(member)
            raise CapacityError(
                f"the other memory nodes can hold {most} tokens of one request, fewer than the context of {context}; "
                "add memory to the cluster first, or set model.context lower"
            )
        self.draining &= self._blocks.keys()

    @property
    def members(self) -> tuple[int, ...]:
        """Return the memory nodes on which sequences are placed, in ascending order."""
        return tuple(member for member in self._blocks if member not in self.draining)

    def blocks_on(self, member: int) -> int:
        """Return how many blocks a memory node has."""
        return self._blocks[member]

    def free_on(self, member: int) -> int:
        """Return how many of its blocks are free."""
        return self._free[member]

    def used_on(self, member: int) -> int:
        """Return how many of its blocks are held for something. It is 0 for a member that is gone."""
        return self._blocks.get(member, 0) - self._free.get(member, 0)

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
        return self._longest([self._blocks[member] for member in self.members])

    def max_context_with(self, blocks: int) -> int:
        """Return what `max_context` would be with a memory node more, of so many blocks."""
        return self._longest([*(self._blocks[member] for member in self.members), blocks])

    def _longest(self, blocks: Sequence[int]) -> int:
        """Return the longest possible context on empty memory nodes of so many blocks."""
        if not blocks:
            return 0
        least, most = (of(blocks) * self.block_tokens for of in (min, max))
        if self._partition == "heads":
            return least
        if self._stripe is None:
            return most
        rounds, rest = divmod(least, self._stripe)
        striped = rounds * self._stripe * len(blocks) + rest
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
        if not self.members:
            return None
        if self.free_blocks - min(self.blocks_for(tokens), max_held) < spare:
            return None
        for placement in self._candidates(tokens, max_context, key, spare):
            self._allocations[sequence] = _Allocation(placement, dict.fromkeys(placement.all_members, 0), max_held)
            if self.extend(sequence, tokens):
                if key is not None:
                    self._remember(key, placement.owners(0)[0])
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
        self.expect_none(sequence)
        self.stay(sequence)
        self._give_back(self._allocations.pop(sequence).held)

    # -- sequences that move

    def expect(self, sequence: Hashable, member: int, blocks: int) -> bool:
        """Hold blocks on a member for what is to move there. Returns False, and changes nothing, if there is no
        space."""
        if self._free.get(member, 0) < blocks:
            return False
        self._free[member] -= blocks
        self._allocations[sequence].coming[member] += blocks
        return True

    def expect_none(self, sequence: Hashable) -> None:
        """Nothing is on its way any more that would not be held otherwise."""
        coming = self._allocations[sequence].coming
        self._give_back(coming)
        coming.clear()

    def elsewhere(self, sequence: Hashable, stored: int, tokens: int) -> Placement | None:
        """Return where a sequence that stays where it is with the first ``stored`` positions could have the space for
        ``tokens`` of them, without draining members; None if nowhere."""
        place = self._allocations[sequence].placement
        free = sorted(self.members, key=self._free.__getitem__, reverse=True)
        if place.stripe is None:
            rules = [Placement((member,)) for member in free if (member,) != place.members]
        else:
            rules = [Placement(tuple(free[:n]), place.stripe if n > 1 else None) for n in range(len(free), 0, -1)]
        for rule in rules:
            found = place.redirected(rule.members, rule.stripe, stored)
            fits = len(found.moved) <= MAX_MOVED and self._has(self._more(found, stored, tokens))
            if fits and found != place:
                return found
        return None

    def succeed(self, sequence: Hashable, placement: Placement, stored: int, tokens: int) -> bool:
        """Allocate what it takes for the positions 0..tokens-1 to lie by another placement, besides what the sequence
        holds until `go` or `stay`. Returns False, and changes nothing, if there is no space.

        The memory nodes share the blocks of the first ``stored`` positions, which are there; those ahead of them are
        set aside twice.
        """
        more = self._more(placement, stored, tokens)
        if not self._has(more):
            return False
        for member, n in more.items():
            self._free[member] -= n
        self._allocations[sequence].successor = _Successor(placement, self._held(placement, tokens), more)
        return True

    def go(self, sequence: Hashable) -> None:
        """The sequence lies by the placement of `succeed` now; what it held is free but for that."""
        allocation = self._allocations[sequence]
        successor = allocation.successor
        assert successor is not None, "the sequence has a successor"
        self.expect_none(sequence)
        self.stay(sequence)
        self._give_back(allocation.held)
        allocation.placement, allocation.held = successor.placement, successor.held
        for member, n in successor.held.items():
            self._free[member] -= n

    def stay(self, sequence: Hashable) -> None:
        """The sequence goes on lying where it does, if it was to go."""
        allocation = self._allocations[sequence]
        if allocation.successor is not None:
            self._give_back(allocation.successor.more)
            allocation.successor = None

    def _held(self, placement: Placement, tokens: int) -> dict[int, int]:
        shares = placement.shares(tokens)
        return {member: self.blocks_for(shares.get(member, 0)) for member in placement.all_members}

    def _more(self, placement: Placement, stored: int, tokens: int) -> dict[int, int]:
        there = self._held(placement, stored)
        return {member: n - there[member] for member, n in self._held(placement, tokens).items()}

    def _has(self, blocks: Mapping[int, int]) -> bool:
        return all(n <= self._free.get(member, 0) for member, n in blocks.items() if n)

    def _give_back(self, blocks: Mapping[int, int]) -> None:
        for member, n in blocks.items():
            if member in self._free:
                self._free[member] += n

    # -- inside

    def _in_all(self, blocks: Mapping[int, int]) -> int:
        if self._partition == "heads":
            return min(blocks.values(), default=0)
        return sum(n for member, n in blocks.items() if member not in self.draining)

    def _wanted(self, allocation: _Allocation, member: int, tokens: int) -> int:
        """Return the blocks on one member that hold its share of the positions 0..tokens-1."""
        return min(self.blocks_for(allocation.placement.held(member, tokens)), allocation.max_held)

    def _remember(self, key: bytes, member: int) -> None:
        self._first_members[key] = member
        self._first_members.move_to_end(key)
        if len(self._first_members) > MAX_KNOWN_PREFIXES:
            self._first_members.popitem(last=False)

    def _candidates(self, tokens: int, max_context: int, key: bytes | None, spare: int) -> Iterator[Placement]:
        """Return where a new sequence could lie, the best place first."""
        yield from dict.fromkeys((self._choose(max_context, key), self._choose(max_context, None)))
        if self.can_move:
            yield self._in_parts(tokens, spare)

    def _in_parts(self, tokens: int, spare: int) -> Placement:
        """Return a placement on as few members as possible that have the space for ``tokens`` positions together.

        The one with the most space has the end, and grows. The others keep their part of the ``spare`` blocks.
        """
        growing = Counter(member for a in self._allocations.values() for member in a.placement.members)
        each = spare / max(1, growing.total())
        last, *others = sorted(self.members, key=self._free.__getitem__, reverse=True)
        left, start, parts = self.blocks_for(tokens), 0, []
        for member in others:
            if left <= self._free[last]:
                break
            taken = min(self._free[member] - math.ceil(each * growing[member]), left - 1)
            if taken > 0:
                stop = start + taken * self.block_tokens
                parts.append((start, stop, member))
                left, start = left - taken, stop
        return Placement((last,), moved=tuple(parts))

    def _choose(self, max_context: int, key: bytes | None) -> Placement:
        members = self.members
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
