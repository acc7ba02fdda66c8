"""The connection to the front, which is made again whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from lamina.client.asynchronous import AsyncClient, open_client
from lamina.errors import LaminaError
from lamina.serve.problems import unavailable
from lamina.transport import Address, Options
from lamina.wire.admin import Status

log = logging.getLogger("lamina.serve")

ASK_EVERY_S = 0.5
"""How often the front is asked for its state."""
CONNECT_S = 10.0
"""How long one attempt to connect may take."""
RETRY_S = 0.25
"""The pause between two attempts."""


class FrontLink:
    """Holds the client of the front at ``address``, while there is one. `keep` runs beside everything that uses it."""

    def __init__(self, address: Address, options: Options) -> None:
        self._address = address
        self._options = options
        self._client: AsyncClient | None = None
        self.status: Status | None = None
        """What the front last said of itself; None while it cannot be reached."""

    @property
    def is_reachable(self) -> bool:
        """Whether the front answers."""
        return self.status is not None

    @property
    def state(self) -> str:
        """The state of the front in a word: one of `Status`, or "away"."""
        return "away" if self.status is None else self.status.state

    def client(self) -> AsyncClient:
        """Return the client. HttpError if the front takes no requests now."""
        if self._client is None or self.status is None:
            raise unavailable(f"the front at {self._address} cannot be reached; retry in a moment")
        if self.status.state != "ready":
            waiting = f" for {self.status.waiting_for}" if self.status.waiting_for else ""
            raise unavailable(f"the cluster is {self.status.state}{waiting} and takes no requests; retry in a moment")
        return self._client

    async def keep(self) -> None:
        """Connect, watch the state of the front, and begin anew when it is lost, until this is cancelled."""
        said = ""
        while True:
            try:
                await self._connect_and_watch()
            except LaminaError as e:
                if self.status is not None or str(e) != said:  # each reason once, not every quarter of a second
                    said = str(e)
                    log.warning("event=front_away address=%s reason=%r", self._address, said)
            finally:
                client, self._client, self.status = self._client, None, None
                if client is not None:
                    with suppress(LaminaError):
                        await client.close()
            await asyncio.sleep(RETRY_S)

    async def _connect_and_watch(self) -> None:
        options = self._options
        self._client = await open_client(
            self._address,
            secret=options.secret,
            tls=options.tls,
            deadline_s=CONNECT_S,
            peer_timeout=options.peer_timeout,
        )
        while True:
            status = await self._client.status()
            if self.state != status.state:
                log.info("event=front state=%s address=%s", status.state, self._address)
            self.status = status
            await asyncio.sleep(ASK_EVERY_S)
