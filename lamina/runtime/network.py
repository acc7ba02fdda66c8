"""How a node reaches others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lamina.transport import Address, Hello, Link, Options


class Listening(Protocol):
    """An address at which links are accepted until it is closed."""

    @property
    def address(self) -> Address:
        """The address, with the port that was taken where 0 was asked for."""

    async def close(self) -> None:
        """Accept no more links. Those that were accepted live on."""


class Network(Protocol):
    """What a node needs of a network."""

    async def connect(self, address: Address, hello: Hello, options: Options, *, deadline_s: float) -> Link:
        """A link to the node that listens at ``address``; it may begin to listen within ``deadline_s`` seconds.

        ConnectError without one by then, HandshakeError if the two ends do not agree.
        """

    async def listen(
        self, address: Address, hello: Hello, on_link: Callable[[Link], None], options: Options
    ) -> Listening:
        """Accept links at ``address``; each is given to ``on_link``. ConfigError if the address cannot be had."""
