"""A node on rxe1 in a process of its own: connects to the port in argv[1], answers what it is sent, never ends.

A tag is answered by a write of the first ``answer`` bytes of its region to the same place at the peer, with the same
tag; the message ``{"digest": [start, end]}`` by what its region holds there.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from typing import Any

import uvloop

from lamina.transport import Address, Hello, Lane, Region, RemoteRegion, connect
from tests.rdma.inside import links

REGION_BYTES = 64 << 20


async def main(port: int, queue: int) -> None:
    address = Address("tcp", "10.77.0.1", port)
    link = await connect(address, Hello("memory", "m1"), links.options(links.FAR, queue=queue), deadline_s=30)
    region = Region("inbox", REGION_BYTES)
    answer, remote = 0, RemoteRegion(0, "not described yet", 1)

    def on_message(message: dict[str, Any]) -> None:
        nonlocal answer, remote
        match message:
            case {"region": described}:
                remote = RemoteRegion.from_wire(described)
                link.send({"known": True})
            case {"answer": int(nbytes)}:
                answer = nbytes
                link.send(message)
            case {"digest": [int(start), int(end)]}:
                link.send({"digest": hashlib.sha256(region.buffer[start:end]).digest()})

    def on_tag(lane: Lane, tag: int) -> None:
        link.write(lane, remote, 0, [region.buffer[:answer]], tag)

    link.deliver(on_message=on_message, on_tag=on_tag, on_lost=lambda error: sys.exit(0))
    link.send({"region": link.expose(region)})
    await asyncio.Event().wait()


uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
