"""`Transfers` keeps account of blocks that come from another cache, before they belong to a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lamina.attention.blocks import BlockPools
from lamina.attention.placement import Integers
from lamina.errors import CapacityError, UsageError


class Transfers:
    """Each transfer holds the same number of blocks in every layer group of a cache. It is named by a number.

    An operation that is refused changes nothing.
    """

    def __init__(self, pools: BlockPools) -> None:
        self._pools = pools
        self._blocks: dict[int, list[Integers]] = {}

    def __contains__(self, transfer: object) -> bool:
        return transfer in self._blocks

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def expect(self, transfer: int, blocks: int) -> None:
        """Hold this many blocks, whose content is undefined, in each group; `CapacityError` if there are too few."""
        if transfer in self._blocks:
            raise UsageError(f"transfer {transfer} is expected already")
        if blocks < 1:
            raise UsageError(f"transfer {transfer}: expected at least 1 block, got {blocks}")
        groups = self._pools.groups
        if not self._pools.fit([blocks] * len(groups)):
            free = self._pools.most(blocks)
            raise CapacityError(f"transfer {transfer} needs {blocks} blocks of KV cache, {free} are free")
        self._pools.make_room([blocks] * len(groups))
        held = []
        for group in groups:
            group.promised += blocks
            held.append(np.array(group.allocate(blocks), dtype=np.int64))
        self._blocks[transfer] = held

    def blocks(self, transfer: int) -> list[Integers]:
        """Return the blocks of each group, as byte offsets; `UsageError` if there is no such transfer."""
        if transfer not in self._blocks:
            raise UsageError(f"transfer {transfer} is not expected in this KV cache")
        return self._blocks[transfer]

    def forget(self, transfer: int) -> None:
        """Free the blocks of a transfer; `UsageError` if there is no such transfer."""
        for group, blocks in zip(self._pools.groups, self.blocks(transfer), strict=True):
            group.free(blocks.tolist())
            group.tidy()
        del self._blocks[transfer]

    def take(self, transfer: int) -> None:
        """The blocks belong to a sequence from now on, which frees them; `UsageError` if there is no such transfer."""
        self.blocks(transfer)
        del self._blocks[transfer]
