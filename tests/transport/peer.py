"""A node in a process of its own: connects to the address in argv[1], answers every message, never ends.

argv[2] is the kind of transport; further arguments are a secret and three TLS files.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lamina.transport import Address, Hello, Options, Region, TlsFiles, connect

INBOX_BYTES = 64 << 20


async def main(address: str, kind: str, secret: str = "", *files: str) -> None:
    options = Options(
        kind=kind,
        peer_timeout=30.0,
        secret=secret.encode() or None,
        tls=TlsFiles(*map(Path, files)) if files else None,
    )
    link = await connect(Address.parse(address), Hello("memory", "m1"), options, deadline_s=30)
    link.deliver(on_message=link.send, on_lost=lambda error: sys.exit(0))
    if kind != "control":
        link.send({"region": link.expose(Region("inbox", INBOX_BYTES))})
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
