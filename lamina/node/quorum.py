"""Which nodes a front waits for when it starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from lamina.config import ClusterConfig
from lamina.errors import ConnectError, LaminaError
from lamina.front.members import Members
from lamina.node.model import ServedModel
from lamina.node.neighbours import Neighbours

log = logging.getLogger("lamina.compute")

LEAST_S = 5.0
"""So long a front that starts again waits for the others at least, as links take their time."""
LOOK_S = 0.1
"""The seconds between two looks who is there."""


class Quorum:
    """Waits for the other nodes at the start of a front, the member ``own``, on the node's loop.

    A cluster that starts for the first time needs all nodes of its file. One that has served before waits for
    ``recovery.grace`` seconds, as it would for a node that is lost. Then it does without those that are missing, if the
    others can serve, and if no other compute node can be the front of those that are missing.
    """

    def __init__(self, config: ClusterConfig, members: Members, neighbours: Neighbours, *, own: int) -> None:
        self._deadline_s = config.transport.start_timeout
        self._patience_s = min(max(config.recovery.grace, LEAST_S), self._deadline_s)
        self._members = members
        self._neighbours = neighbours
        self._own = own
        self._loop = asyncio.get_running_loop()
        self._begun_s = self._loop.time()

    async def enough(self, served: ServedModel, all_met: Awaitable[None]) -> None:
        """Wait until enough nodes are there for a front that starts again; `Neighbours.waiting_for` are the others.

        Raises ConnectError if they are not within ``transport.start_timeout`` seconds. The error of ``all_met``, which
        seeks all nodes, says why a single one was not reached.
        """
        told = ""
        while missing := self._neighbours.waiting_for:
            waited_s = self._loop.time() - self._begun_s
            if waited_s >= self._patience_s:
                if not (obstacle := self._obstacle(served)):
                    log.warning("event=starting_without missing=%s", ",".join(missing))
                    return
                if obstacle != told:
                    told = obstacle
                    log.warning("event=not_starting_without missing=%s reason=%r", ",".join(missing), obstacle)
                if waited_s > self._deadline_s + LOOK_S:
                    try:
                        await all_met
                    except LaminaError as e:
                        raise ConnectError(f"{e}; and {obstacle}") from e
                    raise ConnectError(f"{', '.join(missing)} could not be reached, and {obstacle}")
            await asyncio.sleep(LOOK_S)

    def _obstacle(self, served: ServedModel) -> str:
        """Return why the nodes that are there are not enough; nothing if they are."""
        there = {self._own, *self._neighbours.shards, *self._neighbours.peers}
        away = [entry for entry in self._members.entries if entry.id not in there]
        compute = [entry.name for entry in away if entry.role == "compute"]
        memory = [entry.name for entry in away if entry.role == "memory"]
        if not self._neighbours.shards:
            return "no memory node is there"
        if not served.schedule_of([m for m in self._members.of_role("compute") if m in there]):
            return f"nobody else has the layers of {', '.join(compute)}"
        if compute and memory:
            return (
                f"{' or '.join(compute)} may be the front by now, with {', '.join(memory)}; take out of the cluster "
                "file what is gone for good"
            )
        return ""
