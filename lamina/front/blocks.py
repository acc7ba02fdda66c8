"""The account of space for keys and values on the memory nodes, and the choice of where each sequence lies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

from lamina.attention import window_blocks
from lamina.wire.placement import Placement

Partition = Literal["heads", "requests", "tokens"]

STRIPE_BLOCKS = 16
"""Blocks of a stripe: long enough that a short sequence lies on one node and answers need no merging, short enough that
a long one lies evenly on all."""

MAX_BEGUN = 2**16
"""Beginnings of sequences of which it is remembered where they lie."""


class Room:
    """Blocks of ``block_tokens`` positions that memory nodes have, and how many of them each sequence takes where.

    ``blocks`` is what each node has. With the partition "heads" every node holds the same blocks of every sequence: its
    own heads of them. With "requests" a sequence lies on one node, the one with the most free blocks when it comes;
    with "tokens" it goes round the nodes in stripes, beginning with that one. A sequence that can come to need more
    than any one node has goes round them too, if ``stripes`` allows that.

    Those that begin alike go to the same node, where they can share what they have in common, unless another one has
    twice as many blocks free.

    Where all layers have the same ``window``, no sequence holds more blocks at once than that reaches, and what its
    layers can be apart. Such sequences are not striped.

    What sequences share counts for each of them, so that a memory node never has less than the account says.
    """

    def __init__(
        self,
        blocks: Sequence[int],
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
        self._blocks = list(blocks)
        self._free = list(blocks)
        self._held: dict[Hashable, tuple[Placement, list[int], int]] = {}
        """Where a sequence lies, its blocks by node, and the most that it ever has on one."""
        self._begun: OrderedDict[bytes, int] = OrderedDict()
        """By the key of a first block, where the last sequence with it began."""

    @property
    def blocks(self) -> int:
        """Blocks of context that there is space for in all, of one sequence or of many."""
        return min(self._blocks) if self._partition == "heads" else sum(self._blocks)

    @property
    def free(self) -> int:
        """Of these, how many are free."""
        return min(self._free) if self._partition == "heads" else sum(self._free)

    @property
    def most_tokens(self) -> int:
        """Positions of a sequence that could have all space for itself, wherever it began."""
        least, most = (of(self._blocks) * self.block_tokens for of in (min, max))
        if self._partition == "heads":
            return least
        if self._stripe is None:
            return most
        rounds, rest = divmod(least, self._stripe)
        striped = rounds * self._stripe * len(self._blocks) + rest
        return striped if self._partition == "tokens" else max(most, striped)

    def needed(self, tokens: int) -> int:
        """Blocks that hold so many positions."""
        return -(-tokens // self.block_tokens)

    def place(
        self,
        sequence: Hashable,
        tokens: int,
        most: int,
        *,
        ahead: int | None = None,
        spare: int = 0,
        key: bytes | None = None,
    ) -> Placement | None:
        """Hold the positions 0..tokens-1 for a new sequence, which can come to need ``most``, and say where.

        ``ahead`` is what its layers can be apart, in positions (None: anything), ``key`` that of its first block. None,
        and nothing, if fewer than ``spare`` blocks would be left.
        """
        most_held = self.needed(most)
        if self._window is not None and ahead is not None:
            most_held = min(most_held, window_blocks(self._window, ahead, self.block_tokens))
        if self.free - min(self.needed(tokens), most_held) < spare:
            return None
        for placement in dict.fromkeys((self._choose(most, key), self._choose(most, None))):
            self._held[sequence] = placement, [0] * len(self._blocks), most_held
            if self.extend(sequence, tokens):
                if key is not None:
                    self._begun[key] = placement.nodes[0]
                    self._begun.move_to_end(key)
                    if len(self._begun) > MAX_BEGUN:
                        self._begun.popitem(last=False)
                return placement
        del self._held[sequence]
        return None

    def extend(self, sequence: Hashable, tokens: int) -> bool:
        """Hold the positions 0..tokens-1 for a sequence; False, and no more than before, if there is no room."""
        if any(self.missing(sequence, tokens)):
            return False
        placement, held, most_held = self._held[sequence]
        for node in placement.nodes:
            wanted = max(held[node], min(self.needed(placement.held(node, tokens)), most_held))
            self._free[node] -= wanted - held[node]
            held[node] = wanted
        return True

    def missing(self, sequence: Hashable, tokens: int) -> list[int]:
        """By node, how many blocks would have to come free so that a sequence could hold the positions 0..tokens-1."""
        placement, held, most_held = self._held[sequence]
        wanted = [min(self.needed(placement.held(node, tokens)), most_held) for node in range(len(held))]
        return [max(0, w - h - free) for w, h, free in zip(wanted, held, self._free, strict=True)]

    def held(self, sequences: Iterable[Hashable]) -> list[int]:
        """By node, the blocks that sequences have taken together."""
        total = [0] * len(self._blocks)
        for sequence in sequences:
            total = [a + b for a, b in zip(total, self._held[sequence][1], strict=True)]
        return total

    def give(self, sequence: Hashable) -> None:
        """Take back all that a sequence holds."""
        _, held, _ = self._held.pop(sequence)
        self._free = [free + blocks for free, blocks in zip(self._free, held, strict=True)]

    def _choose(self, most: int, key: bytes | None) -> Placement:
        nodes = range(len(self._blocks))
        if self._partition == "heads":
            return Placement(tuple(nodes))
        large = [node for node in nodes if self._blocks[node] * self.block_tokens >= most]
        if self._partition == "requests" and large:
            return Placement((self._first(large, key),))
        first = self._first(nodes, key)
        return Placement((*nodes[first:], *nodes[:first]), self._stripe)

    def _first(self, nodes: Sequence[int], key: bytes | None) -> int:
        emptiest = max(nodes, key=self._free.__getitem__)
        known = emptiest if key is None else self._begun.get(key, emptiest)
        return known if known in nodes and 2 * self._free[known] >= self._free[emptiest] else emptiest
