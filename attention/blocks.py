"""A `BlockPool` keeps account of the blocks of one layer group, `BlockPools` of those of all groups of a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lamina.attention.pool import ExtentPool
from lamina.errors import UsageError


@dataclass(slots=True, eq=False)
class _Extent:
    """An extent is cut into blocks.

    ``free`` are the offsets of the blocks without content; ``used`` counts the blocks that sequences hold.
    """

    index: int
    free: list[int]
    used: int = 0


class BlockPool:
    """The pool allocates blocks of ``block_bytes`` from extents; a block is named by its byte offset in the memory.

    A block is *free*, or *held* by sequences, or *idle*: published under a key, and held by no sequence. Idle blocks
    can be found by their keys until they are reused; the block that became idle first is reused first. ``promised``
    counts the blocks that are set aside for reservations. The pool takes up to ``share`` extents before it reuses idle
    blocks. ``returning`` says that sequences free single blocks and may allocate others in their place later.
    """

    def __init__(self, pool: ExtentPool, block_bytes: int, *, share: int, returning: bool) -> None:
        self.promised = 0
        self._block_bytes = block_bytes
        self._pool = pool
        self._extent_bytes = pool.extent_bytes
        self._per_extent = self._extent_bytes // block_bytes
        self._share = share
        self._returning = returning
        self._free = 0
        self._doubled = 0
        """This counts the holders of blocks beyond the first. Where blocks are returned, each of these holders has a
        right to another block, because freeing a block that others still hold makes no space."""
        self._extents: dict[int, _Extent] = {}
        self._open: dict[int, _Extent] = {}
        """These extents have free blocks."""
        self._empty: dict[int, _Extent] = {}
        """These extents have only free blocks."""
        self._unused: OrderedDict[int, _Extent] = OrderedDict()
        """No sequence holds a block of these extents: they are empty, or have idle blocks. The longest unused comes
        first."""
        self._published: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._holders: dict[int, int] = {}
        """This counts the sequences that hold a block, if it is published or several hold it."""
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def spare(self) -> int:
        """The pool can still promise this many blocks without another extent."""
        return self._free + len(self._idle) - self.promised - self._doubled

    def extents_for(self, blocks: int) -> int:
        """Return how many more extents the pool needs to promise ``blocks`` blocks."""
        return -(-max(0, blocks - self.spare) // self._per_extent)

    def extents_beyond(self, blocks: int) -> int:
        """Return how many extents the pool could return if it promised ``blocks`` more blocks."""
        return min(len(self._unused), max(0, self.spare - blocks) // self._per_extent)

    # -- extents

    def grow(self) -> None:
        """Take one more extent; `CapacityError` if none is free."""
        index = self._pool.allocate()
        start = index * self._extent_bytes
        stop = start + self._per_extent * self._block_bytes
        extent = _Extent(index, list(range(start, stop, self._block_bytes)))
        for extents in (self._extents, self._open, self._empty, self._unused):
            extents[index] = extent
        self._free += self._per_extent

    def keep_idle(self, blocks: int) -> None:
        """Take extents, within the share, until ``blocks`` blocks can be promised without the reuse of idle ones."""
        while self.spare - len(self._idle) < blocks and len(self._extents) < self._share and self._pool.available > 0:
            self.grow()

    def shrink(self) -> None:
        """Return an extent of which no sequence holds a block, even if blocks are published in it.

        There has to be one: see `extents_beyond`.
        """
        extent = self._empty.popitem()[1] if self._empty else next(iter(self._unused.values()))
        self._drop(extent)

    def tidy(self) -> None:
        """Return the empty extents that no promise needs."""
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
        self._pool.free(extent.index)

    # -- blocks

    def allocate(self, count: int) -> list[int]:
        """Allocate ``count`` of the promised blocks to a sequence."""
        self.promised -= count
        taken: list[int] = []
        while (missing := count - len(taken)) > 0:
            if not self._open:
                block, _ = self._idle.popitem(last=False)
                self._unpublish(block)
                self._put_back(block)
            _, extent = self._open.popitem()  # popping the first would search past the many that were removed
            chosen = extent.free[-missing:]
            del extent.free[-missing:]
            self._free -= len(chosen)
            self._use(extent, len(chosen))
            self._empty.pop(extent.index, None)
            if extent.free:
                self._open[extent.index] = extent
            taken += chosen
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Let a sequence free its blocks; a published block that no other sequence holds becomes idle."""
        for block in blocks:
            extent = self._extents[block // self._extent_bytes]
            if block in self._holders:
                self._holders[block] -= 1
                if self._holders[block]:
                    self._doubled -= self._returning
                    continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._holders.pop(block, None)
                self._put_back(block)
            extent.used -= 1
            if not extent.used:
                self._unused[extent.index] = extent

    def find(self, key: bytes) -> int | None:
        """Return the block that is published under ``key``, or None."""
        return self._published.get(key)

    def hold(self, blocks: Iterable[int]) -> None:
        """Let one more sequence hold these blocks, which are published or held by another."""
        for block in blocks:
            holders = self._holders.get(block, 1)
            if holders:
                self._doubled += self._returning
            else:
                del self._idle[block]
                self._use(self._extents[block // self._extent_bytes], 1)
            self._holders[block] = holders + 1

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a block that a sequence holds.

        A key keeps the first block that was published under it, and a block keeps its first key.
        """
        if key not in self._published and block not in self._keys:
            self._published[key] = block
            self._keys[block] = key
            self._holders.setdefault(block, 1)

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


class BlockPools:
    """The block pools of all layer groups of a cache share the extents of one pool. Counts are by group, in order."""

    def __init__(self, pool: ExtentPool, sizes: Sequence[int], blocks: int, returning: Sequence[bool]) -> None:
        """Make pools for blocks of these ``sizes``, of which ``blocks`` of each fit together. See `BlockPool`."""
        self._pool = pool
        self.groups = [
            BlockPool(pool, size, share=-(-blocks // (pool.extent_bytes // size)), returning=returns)
            for size, returns in zip(sizes, returning, strict=True)
        ]

    def fit(self, needs: Sequence[int]) -> bool:
        """Return whether each group could promise this many more blocks."""
        wanted = sum(blocks.extents_for(need) for blocks, need in zip(self.groups, needs, strict=True))
        beyond = sum(blocks.extents_beyond(need) for blocks, need in zip(self.groups, needs, strict=True))
        return wanted <= self._pool.available + beyond

    def most(self, limit: int) -> int:
        """Return how many more blocks, at most ``limit``, every group could promise at once."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.fit([middle] * len(self.groups)):
                low = middle
            else:
                high = middle - 1
        return low

    def make_room(self, needs: Sequence[int]) -> None:
        """Take the extents that promises need, from other groups if the pool has none left; they have to `fit`."""
        for blocks, need in zip(self.groups, needs, strict=True):
            for _ in range(blocks.extents_for(need)):
                if self._pool.available < 1:
                    next(b for b, n in zip(self.groups, needs, strict=True) if b.extents_beyond(n)).shrink()
                blocks.grow()
        for blocks, need in zip(self.groups, needs, strict=True):
            blocks.keep_idle(need)


def check_key(key: bytes) -> None:
    """Raise `UsageError` for a key that does not have 16 bytes."""
    if len(key) != 16:
        raise UsageError(f"expected a key of 16 bytes for a block, got {len(key)}")
