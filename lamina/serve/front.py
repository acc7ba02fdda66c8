"""The link to the front, which is made again whenever it is lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from contextlib import suppress

from lamina.client.finder import FrontFinder
from lamina.client.front_link import FrontLink
from lamina.config import ClusterConfig
from lamina.errors import LaminaError, TransportError
from lamina.serve.problems import unavailable
from lamina.transport import Hello
from lamina.wire.admin import Status

log = logging.getLogger("lamina.serve")

ASK_EVERY_S = 0.5
"""How often the front is asked for its state."""
CONNECT_S = 10.0
"""How long one attempt to connect may take."""
RETRY_S = 0.25
"""The pause between two attempts."""


class FrontKeeper:
    """Holds the link to the front of ``config``, while there is one; `keep` runs beside all that use it.

    When it is lost, answers that are under way wait for the next one for ``patience_s`` seconds, and then go on.
    """

    def __init__(self, config: ClusterConfig, *, patience_s: float) -> None:
        hello = Hello("client", f"http-{os.getpid()}")
        addresses = [node.address for node in config.compute_nodes]
        self._finder = FrontFinder(addresses, hello, config.options())
        self._link = FrontLink(patience_s=patience_s)
        self.ids = itertools.count(1)
        """The numbers of requests, which differ."""
        self.status: Status | None = None
        """What the front last said of itself; None while it cannot be reached."""
        self.reason = "it has not answered yet"
        """Why it cannot be reached."""

    @property
    def is_reachable(self) -> bool:
        """Whether the front answers."""
        return self.status is not None

    @property
    def state(self) -> str:
        """The state of the front in a word: one of `Status`, or "away"."""
        return "away" if self.status is None else self.status.state

    def link(self) -> FrontLink:
        """Return the link. HttpError if the front takes no requests now."""
        if self._link.failure or self.status is None:
            raise unavailable(f"the front cannot be reached: {self.reason}; retry in a moment")
        if self.status.state != "ready":
            waiting = f" for {self.status.waiting_for}" if self.status.waiting_for else ""
            raise unavailable(f"the cluster is {self.status.state}{waiting} and takes no requests; retry in a moment")
        return self._link

    async def keep(self) -> None:
        """Connect, watch the state of the front, and begin anew when it is lost, until this is cancelled."""
        try:
            while True:
                try:
                    await self._connect_and_watch()
                except LaminaError as e:
                    if self.status is not None or str(e) != self.reason:  # each once, not every quarter of a second
                        self.reason = str(e)
                        log.warning("event=front_away address=%r reason=%r", str(self._finder), self.reason)
                    self._link.attempt = self.reason
                self.status = None
                await asyncio.sleep(RETRY_S)
        finally:
            self.status = None
            with suppress(LaminaError):
                await self._link.close(TransportError("the server ends its connection to the front"))

    async def _connect_and_watch(self) -> None:
        link = self._link
        link.use(await self._finder.find(CONNECT_S))
        while True:
            status = await link.status()
            if self.state != status.state:
                log.info("event=front state=%s name=%s", status.state, status.name)
            self.status = status
            await asyncio.sleep(ASK_EVERY_S)
