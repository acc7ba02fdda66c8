"""A compute node that is not the front has this engine, which runs what the front orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lamina.compute.peer_control import PeerControl
from lamina.compute.step import Steps
from lamina.errors import LaminaError, NodeError, ProtocolError, StaleOrderError, first_error
from lamina.runtime.crossing import Crossing
from lamina.wire.orders import Forget, GivenUp, Limits, Order

log = logging.getLogger("lamina.compute")


class Follower:
    """Runs this node's slices of the steps that one front orders. It belongs to the node's loop.

    An order that cannot be carried out, as the members have changed or one is lost, is given up; the front orders the
    step again. An order ends the one before it in its slot.
    """

    def __init__(
        self,
        name: str,
        runner: Steps,
        device: Crossing,
        front: PeerControl,
        limits: Limits,
        epoch: Callable[[], int],
        on_failed: Callable[[LaminaError], None],
    ) -> None:
        """``epoch`` returns the latest epoch of the members that the front has announced. ``on_failed`` is told of an
        error of this node itself, with which it cannot go on."""
        self._name = name
        self.steps = 0
        self.limits = limits
        """Those of the orders that come from now on."""
        self._runner = runner
        self._there = device
        self._front = front
        self._epoch = epoch
        self._on_failed = on_failed
        self._running: dict[int, asyncio.Task[None]] = {}
        """The order of each slot that is being carried out."""
        self._sending = asyncio.get_running_loop().create_task(self._watch(lambda: device.start(runner.send_prompts())))
        front.on_order = self._obey

    async def close(self) -> None:
        """Run nothing more for this front, and forget what was kept of its prompts."""
        tasks = [self._sending, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._front.on_order = lambda message: None  # it may not know yet
        self._there.post(self._runner.forget, None)

    def _obey(self, message: Order | Forget) -> None:
        if isinstance(message, Forget):
            self._there.post(self._runner.forget, message.sequences)
            return
        if message.epoch > self._epoch():
            raise ProtocolError(
                f"an order for the members at epoch {message.epoch}; this node was told of epoch {self._epoch()}"
            )
        self.limits.check(message)
        if (before := self._running.get(message.slot)) is not None:
            before.cancel()
        self._running[message.slot] = asyncio.get_running_loop().create_task(self._watch(lambda: self._do(message)))

    async def _do(self, order: Order) -> None:
        try:
            if order.epoch != self._epoch():
                raise StaleOrderError(f"the order is of epoch {order.epoch}, it is {self._epoch()} now", node="")
            done = await self._there.start(self._runner.run(order))
        except NodeError as error:
            log.warning("event=step_failed slot=%d reason=%r", order.slot, str(error))
            self._front.send(GivenUp.because(order, error))
        else:
            self._front.send(done)
            self.steps += 1

    async def _watch(self, work: Callable[[], Awaitable[None]]) -> None:
        """Tell of an error that is not one of a step."""
        try:
            await work()
        except LaminaError as error:
            self._on_failed(error)
        except Exception as error:
            cause = first_error(error)
            log.exception("event=internal_error")
            failed = cause if isinstance(cause, LaminaError) else NodeError.failed("compute", self._name, cause)
            self._on_failed(failed)
