"""Have memory nodes send blocks to each other, on the node's loop of the front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random

from lamina.compute.shard_control import ShardControl
from lamina.errors import LaminaError, MoveError
from lamina.front.sequence import Transfer
from lamina.transport import Address

TRANSFER_S = 60.0
"""The seconds that a transfer may take. Nothing waits for it meanwhile, but it holds space on both nodes."""


class TransferAsker:
    """Carries out transfers between the memory nodes of ``shards``, by member id, which reach each other where
    ``address_of`` says.

    ``on_end`` gets every transfer that was not dropped, with the error if it failed; then both nodes have forgotten it.
    The numbers by which they know transfers come from ``random``.
    """

    def __init__(
        self,
        shards: Mapping[int, ShardControl],
        address_of: Callable[[int], Address],
        random: Random,
        on_end: Callable[[Transfer, LaminaError | None], None],
    ) -> None:
        self._shards = shards
        self._address_of = address_of
        self._random = random
        self._on_end = on_end
        self._numbers: dict[Transfer, int] = {}
        self._tasks: dict[Transfer, asyncio.Task[None]] = {}

    def number(self, transfer: Transfer) -> int:
        """Return the number by which the memory nodes know a transfer."""
        return self._numbers[transfer]

    def begin(self, transfer: Transfer) -> None:
        """Have blocks of a sequence copied from one memory node to another."""
        self._numbers[transfer] = self._random.getrandbits(40)
        task = asyncio.get_running_loop().create_task(self._carry_out(transfer))
        self._tasks[transfer] = task
        task.add_done_callback(lambda _: self._tasks.pop(transfer, None))

    def drop(self, transfer: Transfer) -> None:
        """Nobody needs what a transfer brings, or has brought."""
        if (task := self._tasks.pop(transfer, None)) is not None:
            task.cancel()
        if (number := self._numbers.pop(transfer, None)) is None:
            return
        for member in (transfer.source, transfer.target):
            if (shard := self._shards.get(member)) is not None:
                shard.forget(number)

    def taken(self, transfer: Transfer) -> None:
        """A sequence has what a transfer has brought."""
        self._numbers.pop(transfer, None)

    async def _carry_out(self, transfer: Transfer) -> None:
        error: LaminaError | None = None
        try:
            async with asyncio.timeout(TRANSFER_S):
                await self._copy(transfer)
        except TimeoutError:
            error = MoveError(f"a transfer of {transfer.blocks} blocks has taken more than {TRANSFER_S:g} s")
        except LaminaError as e:
            error = e
        if error is not None:
            self._tasks.pop(transfer, None)
            self.drop(transfer)
        self._on_end(transfer, error)

    async def _copy(self, transfer: Transfer) -> None:
        """Reserve before anything is sent: a memory node that has no space refuses, and nothing has happened."""
        number, shards = self._numbers[transfer], self._shards
        if not (transfer.source in shards and transfer.target in shards):
            raise MoveError("a memory node is lost from which blocks were to move, or to which they were to move")
        source, target = shards[transfer.source], shards[transfer.target]
        arrival = target.expect(number, transfer.blocks)
        await arrival.held
        to = self._address_of(transfer.target)
        sent = source.send(number, transfer.id, transfer.first, transfer.blocks, to=to, name=target.name)
        await asyncio.gather(sent, arrival.complete)
