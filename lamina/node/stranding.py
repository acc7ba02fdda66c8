"""Have no request wait for ever where a cluster cannot run steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lamina.config import RecoveryConfig
from lamina.errors import NodeError
from lamina.front.members import Members, State
from lamina.front.team import Formation

log = logging.getLogger("lamina.compute")


class Stranding:
    """Watches whether steps can run, on the node's loop of the front. ``on_stranded`` is told when they could not for
    so long that nothing should wait any more: as long as clients wait for a front that is lost."""

    def __init__(self, recovery: RecoveryConfig, members: Members) -> None:
        self.on_stranded: Callable[[NodeError], None] = lambda error: None
        self._patience_s = max(recovery.grace, recovery.lease)
        self._members = members
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, formation: Formation) -> None:
        """Take in with which members steps run from now on."""
        if formation.is_whole and formation.blocks:
            self.close()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self._strand)

    def close(self) -> None:
        """Tell nothing, unless steps cannot run later on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _strand(self) -> None:
        away = [entry for entry in self._members.entries if self._members.state(entry.id) is not State.SERVING]
        states = ", ".join(f"{entry.name} {self._members.state(entry.id).value}" for entry in away)
        error = NodeError(
            f"nothing could be computed for {self._patience_s:g} s, without nodes that every other one reaches "
            f"({states}); start what is missing, or mend the network between them",
            node=away[0].name if away else "",
        )
        log.warning("event=stranded reason=%r", str(error))
        self.on_stranded(error)
