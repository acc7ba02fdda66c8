"""The blocks of one layer group: free, held by sequences, or published and waiting to be found again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from lamina.attention.pool import Pool
from lamina.errors import UsageError


@dataclass(slots=True, eq=False)
class _Extent:
    """An extent cut into blocks. ``free``: offsets of blocks without content; ``used``: blocks that somebody holds."""

    index: int
    free: list[int]
    used: int = 0


class Blocks:
    """Blocks of ``block_bytes`` in extents of a pool, named by their offset in bytes within the memory.

    A block is free, or *held* by sequences, or *idle*: published under a key and held by nobody. Idle blocks are found
    by their keys until they are reused, those first that were let go first. ``promised`` blocks are set aside for
    reservations. ``share`` is the number of extents up to which more memory is taken rather than idle blocks reused.
    ``returning``: sequences let go of single blocks, for which they may later take others.
    """

    def __init__(self, pool: Pool, block_bytes: int, *, share: int, returning: bool) -> None:
        self.promised = 0
        self._block_bytes = block_bytes
        self._pool = pool
        self._extent_bytes = pool.extent_bytes
        self._per_extent = self._extent_bytes // block_bytes
        self._share = share
        self._returning = returning
        self._free = 0
        self._doubled = 0
        """Holders beyond the first of blocks. Where blocks return, each has a right to another block, since letting go
        of a block that others still hold makes no space."""
        self._extents: dict[int, _Extent] = {}
        self._open: dict[int, _Extent] = {}
        """Extents with free blocks."""
        self._empty: dict[int, _Extent] = {}
        """Extents with nothing but free blocks."""
        self._unused: OrderedDict[int, _Extent] = OrderedDict()
        """Extents of which nobody holds a block, longest first: the empty ones, and those with idle blocks."""
        self._published: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._holders: dict[int, int] = {}
        """How many sequences hold each published block."""
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def spare(self) -> int:
        """Blocks that can still be promised without another extent."""
        return self._free + len(self._idle) - self.promised - self._doubled

    def extents_for(self, blocks: int) -> int:
        """How many more extents it takes to promise ``blocks`` blocks."""
        return -(-max(0, blocks - self.spare) // self._per_extent)

    def extents_beyond(self, blocks: int) -> int:
        """How many extents could be handed back if ``blocks`` more blocks were promised."""
        return min(len(self._unused), max(0, self.spare - blocks) // self._per_extent)

    # -- extents

    def grow(self) -> None:
        """Take one more extent."""
        index = self._pool.take()
        start = index * self._extent_bytes
        stop = start + self._per_extent * self._block_bytes
        extent = _Extent(index, list(range(start, stop, self._block_bytes)))
        for extents in (self._extents, self._open, self._empty, self._unused):
            extents[index] = extent
        self._free += self._per_extent

    def keep_idle(self, blocks: int) -> None:
        """Take extents so that ``blocks`` can be promised and no idle block reused, within the share."""
        while self.spare - len(self._idle) < blocks and len(self._extents) < self._share and self._pool.available > 0:
            self.grow()

    def shrink(self) -> None:
        """Hand back an extent of which nobody holds a block, whatever is published in it: see `extents_beyond`."""
        extent = self._empty.popitem()[1] if self._empty else next(iter(self._unused.values()))
        self._drop(extent)

    def tidy(self) -> None:
        """Hand back the empty extents that no promise needs."""
        while self._empty and self.spare - len(self._idle) >= self._per_extent:
            self._drop(self._empty.popitem()[1])

    def _drop(self, extent: _Extent) -> None:
        if len(extent.free) < self._per_extent:
            start = extent.index * self._extent_bytes
            for block in range(start, start + self._per_extent * self._block_bytes, self._block_bytes):
                if block in self._idle:
                    del self._idle[block]
                    self._unpublish(block)
        self._free -= len(extent.free)
        for extents in (self._extents, self._open, self._empty, self._unused):
            extents.pop(extent.index, None)
        self._pool.give(extent.index)

    # -- blocks

    def take(self, count: int) -> list[int]:
        """``count`` of the promised blocks, for a sequence to hold."""
        self.promised -= count
        taken: list[int] = []
        while (missing := count - len(taken)) > 0:
            if not self._open:
                block, _ = self._idle.popitem(last=False)
                self._unpublish(block)
                self._put_back(block)
            _, extent = self._open.popitem()  # the first would be slow to find behind many that were removed
            chosen = extent.free[-missing:]
            del extent.free[-missing:]
            self._free -= len(chosen)
            self._use(extent, len(chosen))
            self._empty.pop(extent.index, None)
            if extent.free:
                self._open[extent.index] = extent
            taken += chosen
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """A sequence lets go of blocks; published ones that nobody else holds stay to be found."""
        for block in blocks:
            extent = self._extents[block // self._extent_bytes]
            if block in self._keys:
                self._holders[block] -= 1
                if self._holders[block]:
                    self._doubled -= self._returning
                    continue
                self._idle[block] = None
            else:
                self._put_back(block)
            extent.used -= 1
            if not extent.used:
                self._unused[extent.index] = extent

    def find(self, key: bytes) -> int | None:
        """The block published under ``key``."""
        return self._published.get(key)

    def hold(self, blocks: Iterable[int]) -> None:
        """Another sequence holds these published blocks."""
        for block in blocks:
            if self._holders[block]:
                self._doubled += self._returning
            else:
                del self._idle[block]
                self._use(self._extents[block // self._extent_bytes], 1)
            self._holders[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a block that one sequence holds; the first block under a key, and the first key, stay."""
        if key not in self._published and block not in self._keys:
            self._published[key] = block
            self._keys[block] = key
            self._holders[block] = 1

    def _unpublish(self, block: int) -> None:
        del self._published[self._keys.pop(block)], self._holders[block]

    def _put_back(self, block: int) -> None:
        extent = self._extents[block // self._extent_bytes]
        extent.free.append(block)
        self._open[extent.index] = extent
        if len(extent.free) == self._per_extent:
            self._empty[extent.index] = extent
        self._free += 1

    def _use(self, extent: _Extent, blocks: int) -> None:
        if not extent.used:
            del self._unused[extent.index]
        extent.used += blocks


def check_key(key: bytes) -> None:
    """`UsageError` for a key that is not 16 bytes."""
    if len(key) != 16:
        raise UsageError(f"expected a key of 16 bytes for a block, got {len(key)}")
