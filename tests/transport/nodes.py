"""Real nodes for tests of the handshake."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from lamina.transport import Address, Hello, Listener, Options, connect

LOCAL = Address.parse("127.0.0.1:0")
COMPUTE = Hello("compute", "c0", {"layers": [0, 32]})
MEMORY = Hello("memory", "m0", {"heads": 8})
TCP = Options("tcp", peer_timeout=10.0)


class LinkKeeper:
    """An ``on_link`` that keeps the links, and listens to them only as far as to notice their end."""

    def __init__(self):
        self.links = []
        self._changed = asyncio.Event()

    def __call__(self, link):
        link.deliver()
        self.links.append(link)
        self._changed.set()

    async def until(self, count):
        while len(self.links) < count:
            self._changed.clear()
            await self._changed.wait()

    async def first(self):
        await self.until(1)
        return self.links[0]


@asynccontextmanager
async def listening(options=TCP, *, deadline_s=30, **more):
    """A listener, and the links that came to it."""
    keeper = LinkKeeper()
    try:
        async with asyncio.timeout(deadline_s), await Listener.open(LOCAL, MEMORY, keeper, options, **more) as listener:
            yield listener, keeper
    finally:
        for link in keeper.links:
            link.abort("the test is over")


async def still_welcomes(listener, keeper, options=TCP) -> bool:
    """Whether a real node can connect."""
    before = len(keeper.links)
    async with await connect(listener.address, COMPUTE, options, deadline_s=20):
        await keeper.until(before + 1)
    return True


async def round_trip(link, other) -> bool:
    """Whether both ends of a link hear each other's messages."""
    for sender, receiver in ((link, other), (other, link)):
        heard = asyncio.get_running_loop().create_future()
        receiver.deliver(on_message=heard.set_result)
        sender.send({"are you": "there"})
        assert await asyncio.wait_for(heard, 10) == {"are you": "there"}
    return True
