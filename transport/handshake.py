"""What two ends exchange before they are linked: who they are, that they know the secret, and how bytes will travel.

The handshake consists of MESSAGE frames on the connection that becomes the link's control connection. The connecting
end begins::

    hello      both   role, name, details, a nonce, what this end asks for and what it can do
    proof      both   HMAC-SHA256 with the cluster's secret over which end this is and both hellos, byte for byte
    setup ...  both   what the transport needs
    outcome    both   whether the set-up worked; if not, the next possible transport is tried

The proof covers both nonces, so nothing can be replayed. It covers which end made it, so nothing can be reflected. It
covers all that was said before, so an attacker on the path cannot make an end look less capable than it is. An attacker
on the path can still make a set-up fail, and ``auto`` then takes the next transport; TLS, whose certificates the proof
covers too, keeps attackers out. The connecting end proves itself first, so a stranger that connects learns nothing but
a hello. A stranger that listens in a node's place gets a proof, from which a weak secret could be guessed: a secret
must be random.

A further connection of the same link, such as a lane of tcp, begins with a ``join`` frame, which contains the link's id
and a proof with the link's own key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from lamina.errors import ConfigError, ConnectError, HandshakeError, ProtocolError
from lamina.transport.base import Hello, Lane
from lamina.transport.choice import Offers, Party
from lamina.transport.frames import HEADER_BYTES, FrameReceiver, message_frame
from lamina.transport.lanes import UpgradeError
from lamina.transport.options import KINDS, MAX_PEER_TIMEOUT, MIN_PEER_TIMEOUT, Options
from lamina.transport.stream import TcpStream, hang_up, recv_into, send_all

MAX_HELLO = 16 << 10
NONCE_BYTES = 32
LINK_ID_BYTES = 16


@dataclass(frozen=True)
class Introduction:
    """The contents of a hello."""

    hello: Hello
    kind: str
    offers: Offers
    peer_timeout: float
    """Seconds of silence that this end tolerates; the other end sends its heartbeats accordingly."""
    secret: bool
    """Whether this end has a cluster secret."""
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))

    @classmethod
    def of(cls, hello: Hello, options: Options, offers: Offers) -> Introduction:
        return cls(hello, options.kind, offers, options.peer_timeout, options.secret is not None)

    def to_map(self) -> dict[str, Any]:
        return {
            "role": self.hello.role,
            "name": self.hello.name,
            "details": self.hello.details,
            "kind": self.kind,
            "offers": self.offers,
            "peer_timeout": self.peer_timeout,
            "secret": self.secret,
            "nonce": self.nonce,
        }

    @classmethod
    def from_map(cls, message: dict[str, Any]) -> Introduction:
        """Check the peer's hello. Raises HandshakeError."""
        match message:
            case {
                "role": str(role),
                "name": str(name),
                "details": dict(details),
                "kind": str(kind),
                "offers": dict(offers),
                "peer_timeout": float() | int() as peer_timeout,
                "secret": bool(secret),
                "nonce": bytes(nonce),
            } if (
                MIN_PEER_TIMEOUT <= peer_timeout <= MAX_PEER_TIMEOUT
                and len(nonce) == NONCE_BYTES
                and kind in KINDS
                and all(isinstance(offer, dict) for offer in offers.values())
            ):
                said = {
                    transport: {"missing": _one_line(offer["missing"])} if "missing" in offer else offer
                    for transport, offer in offers.items()
                }
                try:
                    return cls(Hello(role, name, details), kind, said, peer_timeout, secret, nonce)
                except ConfigError as error:
                    raise HandshakeError(f"the peer introduced itself wrongly: {error}") from error
            case _:
                raise HandshakeError(f"the peer did not introduce itself with a hello: {message!r:.200}")

    @property
    def party(self) -> Party:
        return Party(self.hello.name, self.kind, self.offers)


def check_introduction(hello: Hello, options: Options) -> None:
    """Raise ConfigError, before any connection, for details that the other end would not accept."""
    try:
        message_frame(Introduction.of(hello, options, {}).to_map(), MAX_HELLO // 2)
    except ProtocolError as error:
        raise ConfigError(f"the details of node {hello.name!r} cannot be sent: {error}") from error


@dataclass
class Session:
    """A handshake on one connection, and what a transport needs for its set-up after the proofs."""

    stream: TcpStream
    options: Options
    connecting: bool
    peer_place: str
    """The peer's address, for messages."""
    local: Introduction
    peer: Introduction = field(init=False)
    key: bytes = field(init=False, repr=False)
    """The key of this link. With a cluster secret, only its two ends know it."""
    link_id: bytes = field(init=False)
    open_lane: Callable[[Lane], Awaitable[TcpStream]] = field(init=False)
    """Gets a further connection of the link."""
    local_offer: dict[str, Any] = field(default_factory=dict)
    peer_offer: dict[str, Any] = field(default_factory=dict)
    _outcome: str | None = field(default=None, init=False)

    async def introduce(self, first: tuple[bytes, dict[str, Any]] | None = None) -> None:
        """Exchange hellos and proofs. ``first`` is the frame that the peer has sent already."""
        mine = message_frame(self.local.to_map(), MAX_HELLO)
        if self.connecting:
            await send_all(self.stream, mine)
        theirs, message = first or await receive_frame(self.stream)
        self.peer = Introduction.from_map(_unrefused(message))
        if not self.connecting:
            await send_all(self.stream, mine)
        hellos = (mine, theirs) if self.connecting else (theirs, mine)
        if self.local.secret != self.peer.secret:
            have, lack = ("this end", "the peer") if self.local.secret else ("the peer", "this end")
            raise HandshakeError(
                f"{have} has a cluster secret and {lack} has none: all nodes and clients need the same secret file"
            )
        transcript = hashlib.sha256()
        for part in (*hellos, self.stream.binding):
            transcript.update(len(part).to_bytes(8, "little") + part)
        self.key = self._mac(b"link", transcript.digest())
        proofs = [self._mac(end, transcript.digest()) for end in (b"connecting", b"listening")]
        if self.connecting:
            await self.send({"proof": proofs[0]})
            answer = await self.receive()
            self._check_proof(answer, proofs[1])
            match answer:
                case {"link_id": bytes(link_id)} if len(link_id) == LINK_ID_BYTES:
                    self.link_id = link_id
                case _:
                    raise HandshakeError("the peer gave the link no id")
        else:
            self._check_proof(await self.receive(), proofs[0])
            self.link_id = secrets.token_bytes(LINK_ID_BYTES)
            await self.send({"proof": proofs[1], "link_id": self.link_id})

    def _mac(self, what: bytes, transcript: bytes) -> bytes:
        return hmac.digest(self.options.secret or b"", b"lamina " + what + b"\0" + transcript, "sha256")

    def _check_proof(self, message: dict[str, Any], expected: bytes) -> None:
        proof = message.get("proof")
        if not isinstance(proof, bytes) or not hmac.compare_digest(proof, expected):
            raise HandshakeError(
                "the peer does not know the cluster secret: both ends need the same secret file"
                if self.options.secret
                else "the peer's proof does not match what was said: something on the path changes the connection"
            )

    # -- for transports

    async def lane(self, lane: Lane) -> TcpStream:
        """Get a further connection of this link, whose two ends have proved that they belong to it."""
        return await self.open_lane(lane)

    async def send(self, setup: dict[str, Any]) -> None:
        """Send a message of up to 16 KiB to ``upgrade`` at the other end."""
        await send_all(self.stream, message_frame(setup, MAX_HELLO))

    async def receive(self) -> dict[str, Any]:
        """Receive the next message of the other end's ``upgrade``. Raises UpgradeError if that has failed."""
        message = _unrefused((await receive_frame(self.stream))[1])
        if "outcome" in message:
            self._outcome = _one_line(message["outcome"])
            raise UpgradeError(f"{self.peer.hello.name}: {self._outcome or 'ended early'}")
        return message

    async def agree(self, failure: str) -> str:
        """Tell the other end why the upgrade failed here, "" for success; returns the same of the other end."""
        told = self._outcome
        self._outcome = None
        await self.send({"outcome": failure})
        while told is None:
            match _unrefused((await receive_frame(self.stream))[1]):
                case {"outcome": outcome}:
                    told = _one_line(outcome)
                case _ if not failure:
                    raise ProtocolError("the peer went on with a set-up that is complete here")
        return told


def join_frame(session: Session, lane: Lane) -> bytes:
    """Make the first frame of a further connection of the link."""
    return message_frame({"join": session.link_id, "lane": int(lane), "proof": join_proof(session, lane)}, MAX_HELLO)


def join_proof(session: Session, lane: Lane) -> bytes:
    return hmac.digest(session.key, b"lane %d" % lane + session.link_id, "sha256")


async def receive_frame(stream: TcpStream) -> tuple[bytes, dict[str, Any]]:
    """Read exactly one MESSAGE frame of the peer; returns its bytes and its contents.

    Raises ConnectError if the peer closes the connection, HandshakeError if it speaks another version, and
    ProtocolError if it sends anything else.
    """
    receiver = FrameReceiver({}, MAX_HELLO)
    event = None
    frame = bytearray()
    while event is None:
        buffer = receiver.next_buffer()
        nbytes = await recv_into(stream, buffer)
        if nbytes == 0:
            raise ConnectError("the peer closed the connection during the handshake")
        frame += buffer[:nbytes]
        event = receiver.received(nbytes)
    if type(event) is not dict:
        raise ProtocolError(f"the peer opened with {event!r:.100} instead of a hello")
    assert len(frame) > HEADER_BYTES
    return bytes(frame), event


def _one_line(words: object) -> str:
    """A text of the peer, made fit for a log."""
    return "".join(letter if letter.isprintable() else " " for letter in str(words)[:500])


def _unrefused(message: dict[str, Any]) -> dict[str, Any]:
    """Return ``message``, or raise HandshakeError if it is a refusal."""
    match message:
        case {"refused": str(reason)}:
            raise HandshakeError(f"the peer refused: {reason!r:.500}")
    return message


async def refuse(stream: TcpStream, reason: str) -> None:
    """Tell the peer why it is refused, and wait until it has closed. The frame also carries the protocol version."""
    await send_all(stream, message_frame({"refused": reason[:500]}, MAX_HELLO))
    await hang_up(stream)


async def cancelled_after(seconds: float, work: Awaitable[Any], what: str) -> Any:
    """Return the result of ``work``, or raise UpgradeError when it takes longer than ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise UpgradeError(f"{what} took longer than {seconds:g} s") from None
