"""A node made of bytes: it speaks the handshake and the frames by hand, so that tests can break any part of them.

Written from the descriptions in ``handshake`` and ``frames``, not with their functions.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import struct
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import msgpack

VERSION = 10
HEADER_BYTES = 32
WRITE, MESSAGE, NOTE, HEARTBEAT = 1, 2, 3, 4


def header(kind, length=0, *, magic=b"LMNA", version=VERSION, key=0, tag=0, offset=0) -> bytes:
    return struct.pack("<4sHHIIQQ", magic, version, kind, key, tag, offset, length)


def message(content, kind=MESSAGE) -> bytes:
    body = msgpack.packb(content)
    return header(kind, len(body)) + body


def note(content) -> bytes:
    return message(content, NOTE)


def write(key, offset, data, tag) -> bytes:
    return header(WRITE, len(data), key=key, offset=offset, tag=tag) + data


def hello(**changes) -> dict:
    """What this node says first; None takes a key away."""
    plain = {
        "role": "compute",
        "name": "stranger",
        "details": {},
        "kind": "tcp",
        "offers": {"tcp": {}},
        "peer_timeout": 10.0,
        "secret": False,
        "nonce": os.urandom(32),
    }
    return {key: value for key, value in {**plain, **changes}.items() if value is not None}


def proof(secret, what, hellos, binding=b"") -> bytes:
    transcript = hashlib.sha256()
    for part in (*hellos, binding):
        transcript.update(struct.pack("<Q", len(part)) + part)
    return hmac.digest(secret, b"lamina " + what + b"\0" + transcript.digest(), "sha256")


class Wire:
    """A bare connection."""

    def __init__(self, sock):
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data):
        await self._loop.sock_sendall(self.sock, data)

    async def trickle(self, data, pause):
        """One byte at a time, until the other end has enough of it."""
        with suppress(ConnectionError):
            for byte in data:
                await self.send(bytes([byte]))
                await asyncio.sleep(pause)

    async def frame(self) -> bytes:
        """The next frame; EOFError at the end."""
        head = await self._exactly(HEADER_BYTES)
        return head + await self._exactly(struct.unpack("<Q", head[24:])[0])

    async def hear(self) -> dict:
        """The content of the next message or note."""
        while True:
            frame = await self.frame()
            if frame[6] != HEARTBEAT:
                return msgpack.unpackb(frame[HEADER_BYTES:])

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        data = b""
        with suppress(ConnectionError):  # whoever closes with unread bytes says so
            while chunk := await self._loop.sock_recv(self.sock, 65536):
                data += chunk
        return data

    async def _exactly(self, nbytes) -> bytes:
        data = b""
        while len(data) < nbytes:
            chunk = await self._loop.sock_recv(self.sock, nbytes - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data


@asynccontextmanager
async def stranger(address, data=b""):
    """A connection to ``address`` that has sent ``data``."""
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
        wire = Wire(sock)
        await wire.send(data)
        yield wire


@asynccontextmanager
async def server(serve):
    """A listener made of bytes: ``serve(wire)`` has each connection. Gives its address and the connections so far."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        loop = asyncio.get_running_loop()
        accepted = []

        async def handle(sock):
            with sock, suppress(EOFError, ConnectionError):
                sock.setblocking(False)
                await serve(Wire(sock))
                sock.shutdown(socket.SHUT_WR)
                await Wire(sock).rest()

        async def accept():
            while True:
                sock, _ = await loop.sock_accept(listening)
                accepted.append(loop.create_task(handle(sock)))

        accepting = loop.create_task(accept())
        try:
            yield listening.getsockname()[1], accepted
        finally:
            tasks = [accepting, *accepted]
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended


@dataclass
class HandMade:
    """A link by hand over tcp: the control connection and those of both lanes."""

    control: Wire
    lanes: list[Wire]

    @property
    def wires(self):
        return [self.control, *self.lanes]


async def offers_of(address) -> dict:
    """What the node at ``address`` can do."""
    async with stranger(address, message(hello(kind="auto"))) as asking:
        return (await asking.hear())["offers"]


async def introduce(wire, secret=None, **changes) -> tuple[bytes, bytes]:
    """Say hello and prove the secret, as the connecting end; returns id and key of the link."""
    mine = message(hello(secret=secret is not None, **changes))
    await wire.send(mine)
    hellos = (mine, await wire.frame())
    await wire.send(message({"proof": proof(secret or b"", b"connecting", hellos)}))
    answer = await wire.hear()
    assert answer["proof"] == proof(secret or b"", b"listening", hellos), answer
    return answer["link_id"], proof(secret or b"", b"link", hellos)


def join(link_id, key, lane) -> bytes:
    """The first frame of the connection of a lane."""
    lane_proof = hmac.digest(key, b"lane %d" % lane + link_id, "sha256")
    return message({"join": link_id, "lane": lane, "proof": lane_proof})


@asynccontextmanager
async def hand_made_link(address, secret=None, **changes):
    """Connect by hand, over tcp."""
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(stranger(address))
        link_id, key = await introduce(control, secret, **changes)
        lanes = [await stack.enter_async_context(stranger(address, join(link_id, key, lane))) for lane in (0, 1)]
        for lane, wire in enumerate(lanes):
            assert await wire.hear() == {"joined": lane}
        assert await control.hear() == {"outcome": ""}
        await control.send(message({"outcome": ""}))
        yield HandMade(control, lanes)
