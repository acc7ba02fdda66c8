"""A compute node that is not the front has this engine, which runs what the front orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lamina.compute.peer_control import PeerControl
from lamina.compute.step import Steps
from lamina.errors import LaminaError, NodeError, ProtocolError, first_error
from lamina.runtime.crossing import Crossing
from lamina.wire.orders import Forget, Limits, Order

log = logging.getLogger("lamina.compute")


class Follower:
    """Runs this node's slices of the steps that the front orders, until the front leaves. It belongs to the node's
    loop."""

    def __init__(
        self,
        name: str,
        runner: Steps,
        device: Crossing,
        front: PeerControl,
        limits: Limits,
        epoch: Callable[[], int],
    ) -> None:
        """``epoch`` returns the latest epoch of the members that the front has announced."""
        self._name = name
        self.steps = 0
        self.draining = False
        self._runner = runner
        self._there = device
        self._front = front
        self._limits = limits
        self._epoch = epoch
        self._ordered: asyncio.Queue[Order] = asyncio.Queue()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        front.on_order = self._obey

    async def run(self) -> None:
        """Serve until cancelled, or until `fail`, or until a step fails: then that error is raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_finished(self._there.start(self._runner.send_prompts())))
                tasks.create_task(_finished(self._gone))
                while True:
                    tasks.create_task(self._do(await self._ordered.get()))
        except* LaminaError as group:
            raise first_error(group) from group
        except* Exception as group:
            log.exception("event=internal_error")
            raise NodeError.failed("compute", self._name, first_error(group)) from group

    def fail(self, error: NodeError) -> None:
        """A member is lost: end with ``error``."""
        if not self._gone.done():
            self._gone.set_exception(error)
            self._gone.exception()  # `run` may not have begun

    async def drain(self) -> None:
        """Go on until the front has left: then nothing more will be ordered."""
        self.draining = True
        await asyncio.wait([self._gone])

    def _obey(self, message: Order | Forget) -> None:
        if isinstance(message, Forget):
            self._there.post(self._runner.forget, message.sequences)
            return
        if message.epoch > self._epoch():
            raise ProtocolError(
                f"an order for the members at epoch {message.epoch}; this node was told of epoch {self._epoch()}"
            )
        self._limits.check(message)
        self._ordered.put_nowait(message)

    async def _do(self, order: Order) -> None:
        self._front.send(await self._there.start(self._runner.run(order)))
        self.steps += 1


async def _finished(future: asyncio.Future[None]) -> None:
    await future
