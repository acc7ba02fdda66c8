"""The account of space for keys and values on the memory nodes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class Room:
    """Blocks of ``block_tokens`` positions that memory nodes have, and how many of them each sequence takes where.

    Every memory node holds the same blocks of every sequence: its own heads of them. ``blocks`` is what each has.
    What sequences share counts for each of them, so that a memory node never has less than the account says.
    """

    def __init__(self, blocks: Sequence[int], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.blocks = min(blocks)
        """Blocks of a sequence that could have all space for itself."""
        self._free = list(blocks)
        self._held: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Blocks that a sequence can still take."""
        return min(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that hold so many positions."""
        return -(-tokens // self.block_tokens)

    def held(self, sequence: Hashable) -> int:
        """Blocks that a sequence has taken."""
        return self._held.get(sequence, 0)

    def take(self, sequence: Hashable, tokens: int) -> bool:
        """Hold the positions 0..tokens-1 for a sequence, beyond what it holds; False, and nothing, if that is more than
        there is."""
        more = self.needed(tokens) - self.held(sequence)
        if more > self.free:
            return False
        self._held[sequence] = self.held(sequence) + more
        self._free = [free - more for free in self._free]
        return True

    def give(self, sequence: Hashable) -> None:
        """Take back all that a sequence holds."""
        blocks = self._held.pop(sequence)
        self._free = [free + blocks for free in self._free]
