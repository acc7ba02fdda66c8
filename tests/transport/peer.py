"""A node in a process of its own: connects to the port in argv[1], answers every tag and message, never ends."""

from __future__ import annotations

import asyncio
import sys

from lamina.transport import Address, Hello, Region, connect


async def main(port: int) -> None:
    link = await connect(Address("tcp", "127.0.0.1", port), Hello("memory", "m1"), deadline_s=30, peer_timeout=30)
    link.on_message = link.send
    link.on_lost = lambda error: sys.exit(0)
    link.send({"region": link.expose(Region("inbox", 64 << 20))})
    await asyncio.Event().wait()


asyncio.run(main(int(sys.argv[1])))
