"""Links over RDMA between the two devices."""

from __future__ import annotations

import asyncio

from lamina.transport import Address, Hello, Link, Listener, Options, RdmaOptions, connect

SECRET = b"0123456789abcdef"
NEAR, FAR = "rxe0", "rxe1"
FAR_ADDRESS = Address.parse("10.77.0.2:0")


def options(device: str, *, peer_timeout: float = 10.0, queue: int = 1024, kind: str = "rdma") -> Options:
    return Options(kind=kind, peer_timeout=peer_timeout, secret=SECRET, rdma=RdmaOptions(device=device, queue=queue))


async def make_pair(near: Options | None = None, far: Options | None = None) -> tuple[Link, Link]:
    """The two ends of one link, in one process."""
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    far = far or options(FAR)
    async with await Listener.open(FAR_ADDRESS, Hello("memory", "m0"), accepted.set_result, far) as listener:
        link = await connect(listener.address, Hello("compute", "c0"), near or options(NEAR), deadline_s=10.0)
        return link, await accepted
