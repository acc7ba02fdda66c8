"""Nodes reach each other over the network of this machine."""

from __future__ import annotations

from collections.abc import Callable

from lamina.runtime.network import Listening
from lamina.transport import Address, Hello, Link, Listener, Options, connect


class Sockets:
    """Connects nodes over shared memory, RDMA or TCP, whichever the options allow (`lamina.transport`)."""

    async def connect(self, address: Address, hello: Hello, options: Options, *, deadline_s: float) -> Link:
        """See `Network.connect`."""
        return await connect(address, hello, options, deadline_s=deadline_s)

    async def listen(
        self, address: Address, hello: Hello, on_link: Callable[[Link], None], options: Options
    ) -> Listening:
        """See `Network.listen`."""
        return await Listener.open(address, hello, on_link, options)
