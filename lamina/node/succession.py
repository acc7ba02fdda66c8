"""A compute node that follows a front takes its part when it is lost and does not come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from lamina.config import ClusterConfig
from lamina.errors import LaminaError
from lamina.runtime.network import Network
from lamina.transport import Address, Hello
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import decode
from lamina.wire.questions import Questions
from lamina.wire.tenants import short_name

ASK_S = 2.0
"""The seconds in which a memory node has to be reached, and then to answer."""
OTHERS_S = 1.0
"""So much longer than the standby wait other nodes at least."""
PAUSE_S = 1.0
"""The seconds between two questions to the memory nodes."""


class Heir:
    """Says when the node ``name`` is to take the front's part, on the node's loop.

    The front's standby waits for ``recovery.grace`` seconds, any other node as long once more, and once more for each
    compute node before it in the file. Then all memory nodes that it needs have to say that they have no front: one
    that this node does not reach may serve all others.
    """

    def __init__(self, config: ClusterConfig, network: Network, *, name: str, tenant: str) -> None:
        """``tenant`` is the whole name of the tenant."""
        self._config = config
        self._network = network
        self._name = name
        self._tenant = short_name(tenant)
        self._place = [node.name for node in config.compute_nodes].index(name)

    async def due(self, needed: Sequence[Address], *, is_standby: bool) -> None:
        """Wait until the time has come, from the loss of the front on. ``needed`` are the addresses of memory nodes."""
        grace_s = self._config.recovery.grace
        await asyncio.sleep(grace_s if is_standby else (grace_s + OTHERS_S) * (2 + self._place))
        while not all(await asyncio.gather(*map(self._is_free, needed))):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(PAUSE_S)

    async def _is_free(self, address: Address) -> bool:
        """Return whether a memory node says that the tenant has no front there."""
        options = self._config.options()
        try:
            link = await self._network.connect(address, Hello("monitor", self._name), options, deadline_s=ASK_S)
        except LaminaError:
            return False
        questions = Questions(link)

        def on_message(plain: dict[str, Any]) -> None:
            questions.answer(decode(plain, Status))

        link.deliver(on_message=on_message, on_lost=questions.fail)
        try:
            async with asyncio.timeout(ASK_S):
                status: Status = await questions.ask(AskStatus())
        except (LaminaError, TimeoutError):
            return False
        finally:
            link.abort("it is known what it says")
        return all(tenant.lease_s is not None for tenant in status.tenants if tenant.name == self._tenant)
