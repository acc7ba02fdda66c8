"""The first words on every connection: who is there, and which lane of which link this is.

The end that connects speaks first, the other answers; each sends one MESSAGE frame that holds an ``Introduction``,
or the reason why it refuses. Authentication will go between the two: both introductions are known on both sides
before anything is done about them, so a proof over both can follow as a second frame each.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from lamina.errors import ConfigError, ConnectError, HandshakeError, ProtocolError
from lamina.transport.base import Hello, Lane
from lamina.transport.frames import FrameReceiver, message_frame

MAX_HELLO = 16 << 10
LINK_ID_BYTES = 16

MIN_PEER_TIMEOUT = 0.05
MAX_PEER_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Introduction:
    """What each end says. ``link_id`` is empty until the listening end has chosen it in its first answer."""

    hello: Hello
    lane: Lane
    link_id: bytes
    peer_timeout: float
    """Seconds of silence this end tolerates; the other end paces its heartbeats by it."""

    def to_map(self) -> dict[str, Any]:
        return {
            "role": self.hello.role,
            "name": self.hello.name,
            "details": self.hello.details,
            "lane": int(self.lane),
            "link_id": self.link_id,
            "peer_timeout": self.peer_timeout,
        }

    @classmethod
    def from_map(cls, message: dict[str, Any]) -> Introduction:
        """Check what the peer said; raises HandshakeError."""
        match message:
            case {
                "role": str(role),
                "name": str(name),
                "details": dict(details),
                "lane": 0 | 1 as lane,
                "link_id": bytes(link_id),
                "peer_timeout": float() | int() as peer_timeout,
            } if MIN_PEER_TIMEOUT <= peer_timeout <= MAX_PEER_TIMEOUT and len(link_id) in (0, LINK_ID_BYTES):
                try:
                    return cls(Hello(role, name, details), Lane(lane), link_id, peer_timeout)
                except ConfigError as error:
                    raise HandshakeError(f"the peer introduced itself wrongly: {error}") from error
            case _:
                raise HandshakeError(f"the peer introduced itself with something else than a hello: {message!r:.200}")


def check_introduction(hello: Hello, peer_timeout: float) -> None:
    """Raise ConfigError, before any connection, for what the other end would not accept."""
    if not MIN_PEER_TIMEOUT <= peer_timeout <= MAX_PEER_TIMEOUT:
        raise ConfigError(f"peer_timeout must be {MIN_PEER_TIMEOUT:g} to {MAX_PEER_TIMEOUT:g} s, got {peer_timeout:g}")
    try:
        message_frame(Introduction(hello, Lane.DECODE, bytes(LINK_ID_BYTES), peer_timeout).to_map(), MAX_HELLO)
    except ProtocolError as error:
        raise ConfigError(f"the details of node {hello.name!r} cannot be sent: {error}") from error


async def send_introduction(sock: socket.socket, introduction: Introduction) -> None:
    frame = message_frame(introduction.to_map(), MAX_HELLO)
    await asyncio.get_running_loop().sock_sendall(sock, frame)


async def receive_introduction(sock: socket.socket) -> Introduction:
    """Read exactly one frame of the peer.

    Raises ConnectError if the peer closes instead, HandshakeError if it refuses or speaks another version,
    ProtocolError if it sends anything else.
    """
    loop = asyncio.get_running_loop()
    receiver = FrameReceiver({}, MAX_HELLO)
    event = None
    while event is None:
        nbytes = await loop.sock_recv_into(sock, receiver.next_buffer())
        if nbytes == 0:
            raise ConnectError("the peer closed the connection during the handshake")
        event = receiver.received(nbytes)
    match event:
        case {"refused": str(reason)}:
            raise HandshakeError(f"the peer refused: {reason!r:.500}")
        case dict():
            return Introduction.from_map(event)
        case _:
            raise ProtocolError(f"the peer opened with {event} instead of a hello")


async def refuse(sock: socket.socket, reason: str) -> None:
    """Tell the peer why; the frame also carries our protocol version. Returns when the peer has closed."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, message_frame({"refused": reason[:500]}, MAX_HELLO))
    sock.shutdown(socket.SHUT_WR)
    # Closing with unread bytes would reset the connection and could destroy the answer on its way.
    while await loop.sock_recv(sock, 4096):
        pass
