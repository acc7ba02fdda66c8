"""A network connects nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lamina.transport import Address, Hello, Link, Options


class Listening(Protocol):
    """Accepts links at an address until it is closed."""

    @property
    def address(self) -> Address:
        """Return the address, with the port that was taken where 0 was asked for."""

    async def close(self) -> None:
        """Accept no more links. Those that were accepted live on."""


class Network(Protocol):
    """Connects nodes, and accepts connections."""

    async def connect(self, address: Address, hello: Hello, options: Options, *, deadline_s: float) -> Link:
        """Connect to the node at ``address``, which may begin to listen within ``deadline_s`` seconds.

        Raises ConnectError if there is no link by then, and HandshakeError if the two ends do not agree.
        """

    async def listen(
        self, address: Address, hello: Hello, on_link: Callable[[Link], None], options: Options
    ) -> Listening:
        """Accept links at ``address``, and pass each to ``on_link``. Raises ConfigError if the address is not
        available."""
