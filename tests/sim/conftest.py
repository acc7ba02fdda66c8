"""A virtual clock, and links on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from lamina.sim.loop import VirtualLoop
from lamina.sim.network import SimNetwork
from lamina.transport import Address, Hello, Link, Options
from lamina.transport.testing import MakePair

OPTIONS = Options(peer_timeout=10.0)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop(limit_s=3600.0)
    yield loop
    loop.close()


@pytest.fixture
def pairs() -> Callable[[SimNetwork], MakePair]:
    """How links between a compute node c0 and a memory node m0 are made in a network."""

    def pairs(network: SimNetwork) -> MakePair:
        async def make_pair() -> tuple[Link, Link]:
            accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
            hello = Hello("memory", "m0", {"heads": (0, 4)})
            listener = await network.listen(Address.parse("m0:0"), hello, accepted.set_result, OPTIONS)
            link = await network.connect(listener.address, Hello("compute", "c0"), OPTIONS, deadline_s=10.0)
            await listener.close()
            return link, await accepted

        return make_pair

    return pairs
