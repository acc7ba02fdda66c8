"""Links inside one process keep the promises of every other transport."""

from __future__ import annotations

import asyncio

import pytest

from lamina.sim.link import LinkModel
from lamina.sim.loop import VirtualLoop
from lamina.sim.network import SimNetwork
from lamina.transport import Address, Hello, Link, Options
from lamina.transport.testing import CHECKS, MakePair

ADDRESS = Address.parse("m0:0")
FAST = LinkModel(latency_s=20e-6, bytes_per_s=10e9)
MODELS = {
    "fast": FAST,
    "windows": LinkModel(latency_s=2e-6, bytes_per_s=10e9, windows=True),
    "jitter": LinkModel(latency_s=20e-6, bytes_per_s=10e9, jitter_s=30e-6),
}


def pairs(network: SimNetwork) -> MakePair:
    async def make_pair() -> tuple[Link, Link]:
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        options = Options(peer_timeout=10.0)
        listener = await network.listen(ADDRESS, Hello("memory", "m0", {"heads": [0, 4]}), accepted.set_result, options)
        link = await network.connect(listener.address, Hello("compute", "c0"), options, deadline_s=10.0)
        await listener.close()
        return link, await accepted

    return make_pair


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(loop: VirtualLoop, model: str, check: object) -> None:
    """Every check of the transports holds here too, whatever the model of the link."""
    loop.run_until_complete(check(pairs(SimNetwork(loop, model=MODELS[model]))))
