"""The engine of a compute node that is not the front: does what the front orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from lamina.compute.peer import ComputePeer
from lamina.compute.shard import RemoteShard
from lamina.compute.step import StepRunner
from lamina.errors import LaminaError, NodeError, first_error
from lamina.wire.orders import Forget, Limits, Order

log = logging.getLogger("lamina.compute")


class Follower:
    """Runs this node's slices of the steps that the front orders, until the front leaves. ``steps`` counts them."""

    def __init__(
        self,
        name: str,
        runner: StepRunner,
        shards: Sequence[RemoteShard],
        peers: Sequence[ComputePeer],
        front: ComputePeer,
        limits: Limits,
    ) -> None:
        self._name = name
        self._runner = runner
        self._shards = shards
        self._peers = peers
        self._front = front
        self._limits = limits
        self._ordered: asyncio.Queue[Order] = asyncio.Queue()
        self.steps = 0
        self.draining = False
        front.on_message = self._obey

    async def run(self) -> None:
        """Serve until cancelled, or until this node or another one is lost: then NodeError is raised."""
        device = self._runner.device
        try:
            async with asyncio.TaskGroup() as tasks:
                for shard in self._shards:
                    tasks.create_task(_await(device.start(shard.run())))
                    tasks.create_task(shard.watch())
                for peer in self._peers:
                    tasks.create_task(peer.watch())
                while True:
                    tasks.create_task(self._do(await self._ordered.get()))
        except* LaminaError as group:
            raise first_error(group) from group
        except* Exception as group:
            log.exception("event=internal_error")
            error = first_error(group)
            raise NodeError(f"compute node {self._name} failed: {error!r}", node=self._name) from group

    async def drain(self) -> None:
        """Go on until the front has left: then nothing more will be ordered."""
        self.draining = True
        await asyncio.wait([self._front.lost])

    def _obey(self, message: Order | Forget) -> None:
        if isinstance(message, Order):
            self._limits.check(message)
            self._ordered.put_nowait(message)
        else:
            self._runner.forget(message.sequences)

    async def _do(self, order: Order) -> None:
        self._front.send(await self._runner.device.start(self._runner.run(order)))
        self.steps += 1


async def _await(future: asyncio.Future[None]) -> None:
    await future
