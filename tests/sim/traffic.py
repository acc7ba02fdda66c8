"""What several tests let happen in a simulated network."""

from __future__ import annotations

import asyncio
import hashlib

from lamina.runtime.spans import Place
from lamina.sim.link import LinkModel
from lamina.sim.network import SimNetwork
from lamina.sim.world import World
from lamina.transport import Address, Hello, Lane, Link, Options
from lamina.transport.testing import MakePair, two_ends

OPTIONS = Options(peer_timeout=10.0)
JITTER = LinkModel(latency_s=1e-4, bytes_per_s=1e8, jitter_s=1e-3)


def pairs(network: SimNetwork) -> MakePair:
    """How links between a compute node c0 and a memory node m0 are made in ``network``."""

    async def make_pair() -> tuple[Link, Link]:
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        hello = Hello("memory", "m0", {"heads": (0, 4)})
        listener = await network.listen(Address.parse("m0:0"), hello, accepted.set_result, OPTIONS)
        link = await network.connect(listener.address, Hello("compute", "c0"), OPTIONS, deadline_s=10.0)
        await listener.close()
        return link, await accepted

    return make_pair


async def converse(world: World) -> None:
    """Both ends write, compute and send at the same time, in ten tasks that depend on each other's timing."""
    devices = [world.device(name, lambda name, at: 1e-4 * world.random.random()) for name in ("c0", "m0")]
    async with two_ends(pairs(world.network)) as (left, right), asyncio.TaskGroup() as group:

        async def work(number: int) -> None:
            end = (left, right)[number % 2]
            for step in range(10):
                await devices[number % 2].run(bytes, number, at=Place(number, step))
                end.write(0, bytes(100 * number), step, Lane(step % 2))
                end.link.send({"type": "Done", "number": number})
                await end.until_arrived(10 * step + number + 1)

        for number in range(10):
            group.create_task(work(number))


def trace_of(seed: int) -> list[str]:
    """The trace of a conversation."""
    with World(seed, model=JITTER) as world:
        world.run(converse(world))
        return world.trace


if __name__ == "__main__":
    print(hashlib.sha256("\n".join(trace_of(5)).encode()).hexdigest())  # noqa: T201
