"""How two nodes get a link: one listens, the other connects, and then both hold a ``Link``."""

from __future__ import annotations

import asyncio
import errno
import hmac
import importlib
import os
import random
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Self

from lamina.errors import CapacityError, ConnectError, HandshakeError, ProtocolError, TransportError
from lamina.transport.address import Address, check_reach
from lamina.transport.base import Hello, Lane, Link, LinkInfo, log
from lamina.transport.choice import choose, offers
from lamina.transport.frames import message_frame
from lamina.transport.handshake import (
    MAX_HELLO,
    Introduction,
    Session,
    cancelled_after,
    check_introduction,
    join_frame,
    join_proof,
    receive_frame,
    refuse,
)
from lamina.transport.lanes import Lanes
from lamina.transport.link import NodeLink
from lamina.transport.options import Options
from lamina.transport.stream import TcpStream, secure, send_all, starts_tls

HANDSHAKE_TIMEOUT = 5.0
UPGRADE_TIMEOUT = 4.0
"""Seconds that setting up one transport may take; where ``peer_timeout`` is longer, as long as that."""
LANE_IDLE_S = 60
"""Seconds after which the kernel probes a lane that carries nothing."""
MAX_HANDSHAKES = 64
"""This many connections may be in their handshake at once, and as many links may be being set up."""

_BACKLOG = 128
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5
_ACCEPT_PAUSE = 0.5


class _SetUpError(HandshakeError):
    """Both ends have a transport that could not be set up now. It may be another time: a slow machine, a busy port."""


async def connect(address: Address, hello: Hello, options: Options | None = None, *, deadline_s: float) -> Link:
    """Connect to the node that listens at ``address``, trying again until ``deadline_s`` seconds have passed.

    Nodes may therefore start in any order. HandshakeError ends the attempts at once: the peer speaks another protocol
    version, does not know the secret, refuses, has no transport in common, or is not a Lamina node. ConnectError after
    the deadline says how the last attempt failed, also where a transport that both ends have could not be set up.
    """
    options = options or Options()
    check_introduction(hello, options)
    endpoint = _Endpoint(address, options, connecting=True)
    failure: Exception | None = None
    pause = _FIRST_PAUSE
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await _connect_once(endpoint, hello)
                except _SetUpError as error:
                    if not isinstance(failure, _SetUpError):
                        log.warning('event=set_up_failed address=%s reason="%s"', address, error)
                    failure = error
                except (HandshakeError, ProtocolError) as error:
                    raise HandshakeError(f"{address}: {error}") from error
                except ssl.SSLError as error:
                    # The listening end checks the certificate of this one when TLS is complete here.
                    raise HandshakeError(f"{address}: {_tls_failed(error)}") from error
                except (OSError, ConnectError) as error:
                    failure = error
                # Many nodes may wait for the same one, and should not all come back at the same moment.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret depends on it
                pause = min(2 * pause, _LONGEST_PAUSE)
    except TimeoutError:
        reason = "no answer" if failure is None else _reason(failure)
        raise ConnectError(f"{address}: no link within {deadline_s:g} s, last attempt: {reason}") from failure


async def _connect_once(endpoint: _Endpoint, hello: Hello) -> Link:
    with ExitStack() as stack:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT):
            stream = await endpoint.open()
            stack.callback(stream.close)
            session = Session(stream, endpoint.options, True, str(endpoint.address), endpoint.introduce(hello))
            await session.introduce()

        async def open_lane(lane: Lane) -> TcpStream:
            own = await endpoint.open()
            try:
                await send_all(own, join_frame(session, lane))
                _, answer = await receive_frame(own)
                if answer != {"joined": int(lane)}:
                    raise HandshakeError(f"the peer did not take a connection for a lane: {answer!r:.200}")
            except BaseException:
                own.close()
                raise
            return own

        session.open_lane = open_lane
        link = await _make_link(session)
        stack.pop_all()
        return link


class Listener:
    """Accepts links at an address. ``on_link`` receives each one after its handshake and calls ``deliver``.

    If ``on_link`` raises, only that link is lost.
    """

    def __init__(
        self,
        endpoint: _Endpoint,
        sock: socket.socket,
        hello: Hello,
        on_link: Callable[[Link], None],
        handshake_timeout: float,
    ) -> None:
        """Called by ``open`` alone."""
        self.address = endpoint.address
        self._endpoint = endpoint
        self._socket = sock
        self._hello = hello
        self._on_link = on_link
        self._handshake_timeout = handshake_timeout
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        """The tasks of connections whose peer has not proved itself."""
        self._pending: dict[asyncio.Task[None], _PendingLink] = {}
        """The tasks of links that are being set up."""
        self._closed = False
        self._resume()

    @classmethod
    async def open(
        cls,
        address: Address,
        hello: Hello,
        on_link: Callable[[Link], None],
        options: Options | None = None,
        *,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
    ) -> Listener:
        """Listen at ``address``. With port 0, a free port is taken, and the attribute ``address`` has it.

        A peer has ``handshake_timeout`` seconds to prove itself. Raises ConnectError if the address cannot be used.
        """
        options = options or Options()
        check_introduction(hello, options)
        endpoint = _Endpoint(address, options, connecting=False)
        try:
            family, place = (await _resolve(address))[0]
            sock = socket.create_server(place, family=family, backlog=_BACKLOG)  # with SO_REUSEADDR
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConnectError(f"cannot listen at {address}: another process uses the port") from error
            raise ConnectError(f"cannot listen at {address}: {_reason(error)}") from error
        sock.setblocking(False)
        endpoint.address = Address(address.scheme, address.host, sock.getsockname()[1])
        log.info('event=listening address=%s node="%s"', endpoint.address, hello.name)
        if not address.is_loopback and ip_address(place[0].partition("%")[0]).is_loopback:
            log.warning(
                'event=loopback_name address=%s reason="%s"', endpoint.address, loopback_name(address, place[0])
            )
        missing = endpoint.introduce(hello).offers.get(options.kind, {}).get("missing")
        if missing:  # not an error yet: a port that is down now may come up
            log.error('event=transport_missing address=%s kind=%s reason="%s"', endpoint.address, options.kind, missing)
        return cls(endpoint, sock, hello, on_link, handshake_timeout)

    async def close(self) -> None:
        """Stop listening, and drop connections that are in their handshake. Links live on. May be called twice."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        tasks = {*self._handshakes, *self._pending}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _resume(self) -> None:
        if not self._closed and len(self._handshakes) < MAX_HANDSHAKES:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Mostly, no file descriptor is left. The connection stays in the backlog, so trying at once would spin.
            log.error('event=accept_failed address=%s reason="%s"', self.address, _reason(error))
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(_ACCEPT_PAUSE, self._resume)
            return
        task = self._loop.create_task(self._shake_hands(sock))
        self._handshakes.add(task)
        task.add_done_callback(self._handshake_over)
        if len(self._handshakes) == MAX_HANDSHAKES:
            log.warning("event=listener_full address=%s handshakes=%d", self.address, MAX_HANDSHAKES)
            self._loop.remove_reader(self._socket.fileno())

    def _handshake_over(self, task: asyncio.Task[None]) -> None:
        """End the handshake of ``task``, whose peer has failed or proved itself; another connection may come."""
        if task in self._handshakes:
            self._handshakes.discard(task)
            self._resume()

    async def _shake_hands(self, sock: socket.socket) -> None:
        """Shake hands on one connection. It never raises, because nothing awaits its task."""
        peer = "unknown"
        with ExitStack() as stack:
            stack.callback(sock.close)
            try:
                sock.setblocking(False)
                peer = _place_text(sock.getpeername())
                async with asyncio.timeout(self._handshake_timeout):
                    stream = await self._endpoint.prepare(sock)
                    stack.callback(stream.close)
                    try:
                        first = await receive_frame(stream)
                        if "join" in first[1]:
                            await self._join(stream, first[1])
                            stack.pop_all()
                            return
                        introduction = self._endpoint.introduce(self._hello)
                        session = Session(stream, self._endpoint.options, False, peer, introduction)
                        await session.introduce(first)
                        if len(self._pending) >= MAX_HANDSHAKES:
                            raise ConnectError(f"{MAX_HANDSHAKES} links are being set up already")
                    except (HandshakeError, ProtocolError) as error:
                        await refuse(stream, str(error))
                        raise
                link = await self._set_up(session)
                stack.pop_all()
            except (TransportError, OSError) as error:
                log.warning('event=handshake_failed address=%s peer=%s reason="%s"', self.address, peer, _reason(error))
                return
        if self._closed:
            link.abort("its listener was closed meanwhile")
            return
        try:
            self._on_link(link)
        except Exception as error:
            log.exception('event=callback_failed transport=%s peer="%s"', link.info.transport, link)
            link.abort(f"it could not be taken: {error!r}")

    async def _set_up(self, session: Session) -> Link:
        task = asyncio.current_task()
        assert task is not None
        pending = self._pending[task] = _PendingLink(session)
        self._handshake_over(task)
        session.open_lane = pending.lane
        try:
            return await _make_link(session)
        except HandshakeError as error:
            with suppress(TransportError, OSError):
                await cancelled_after(self._handshake_timeout, refuse(session.stream, str(error)), "refusing")
            raise
        finally:
            del self._pending[task]
            pending.close()

    async def _join(self, stream: TcpStream, message: dict[str, Any]) -> None:
        """Hand a further connection of a link to the set-up that waits for it."""
        match message:
            case {"join": bytes(link_id), "lane": int(lane), "proof": bytes(proof)} if lane in (0, 1):
                pass
            case _:
                raise HandshakeError(f"the peer joined without naming a link and a lane: {message!r:.200}")
        for pending in self._pending.values():
            # A comparison that ended early would tell a stranger something about ids or proofs.
            known = hmac.compare_digest(pending.session.link_id, link_id)
            if known and hmac.compare_digest(join_proof(pending.session, Lane(lane)), proof):
                waiting = pending.lanes[lane]
                if waiting.done():
                    raise HandshakeError(f"lane {lane} of this link has its connection already")
                await send_all(stream, message_frame({"joined": lane}, MAX_HELLO))
                if not waiting.done():
                    waiting.set_result(stream)
                    return
        raise HandshakeError("no link waits for a connection with this id and proof")


@dataclass
class _PendingLink:
    """A link that is being set up, and the further connections that came for it."""

    session: Session
    lanes: list[asyncio.Future[TcpStream]] = field(init=False)
    taken: set[Lane] = field(default_factory=set)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.lanes = [loop.create_future() for _ in Lane]

    async def lane(self, lane: Lane) -> TcpStream:
        stream = await asyncio.shield(self.lanes[lane])
        self.taken.add(lane)
        return stream

    def close(self) -> None:
        for lane, waiting in zip(Lane, self.lanes, strict=True):
            if not waiting.done():
                waiting.cancel()
            elif lane not in self.taken and not waiting.cancelled():
                waiting.result().close()


class _Endpoint:
    """Makes sockets to or from an address, and introduces this end."""

    def __init__(self, address: Address, options: Options, *, connecting: bool) -> None:
        """Raises ConfigError for an address that needs a secret, and for TLS files that do not fit."""
        check_reach(address, secret=options.secret is not None)
        self.address = address
        self.options = options
        self._connecting = connecting
        self._tls: tuple[ssl.SSLContext, bytes] | None = None
        if options.tls is not None:
            self._tls = options.tls.context(connecting=connecting), options.tls.certificate_bytes()
        elif not address.is_loopback:
            log.warning('event=unprotected address=%s reason="no TLS: others on the network can read"', address)

    def introduce(self, hello: Hello) -> Introduction:
        """This end's introduction, made anew each time: what it offers may have changed."""
        return Introduction.of(hello, self.options, offers(self.options))

    async def open(self) -> TcpStream:
        """Open a new connection. Raises OSError, or HandshakeError where TLS fails."""
        failure = OSError(f"{self.address.host} has no address")
        for family, place in await _resolve(self.address):
            with ExitStack() as stack:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                stack.callback(sock.close)
                try:
                    await asyncio.get_running_loop().sock_connect(sock, place)
                    if sock.getsockname() == sock.getpeername():
                        # Where no process listens on a port of the ephemeral range, the kernel may pick it as our own.
                        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
                    stream = await self.prepare(sock)
                except OSError as error:
                    failure = error
                    continue
                stack.pop_all()
                return stream
        raise failure

    async def prepare(self, sock: socket.socket) -> TcpStream:
        """Set the options of ``sock``, and put it inside TLS if that is wanted."""
        # Small writes leave at once. Heartbeats detect a dead peer, not the kernel, which would also end a lane whose
        # peer does not read because it is busy with a long operation (TCP_USER_TIMEOUT in tcp(7)).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An idle lane carries no heartbeats, and a firewall on the path must not forget its connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LANE_IDLE_S)
        if self._tls is None:
            return TcpStream(sock)
        if not (self._connecting or await starts_tls(plain := TcpStream(sock))):
            reason = "this end uses TLS and the peer does not: configure it at both"
            await refuse(plain, reason)
            raise HandshakeError(reason)
        context, certificate = self._tls
        try:
            return await secure(sock, context, certificate, connecting=self._connecting)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise ConnectError("the peer closed the connection during the handshake") from error
        except ssl.SSLError as error:
            raise HandshakeError(_tls_failed(error)) from error


async def _make_link(session: Session) -> Link:
    """Set up the first transport that works for both ends."""
    sides = (session.local.party, session.peer.party)
    choice = choose(*(sides if session.connecting else sides[::-1]))
    limit = max(UPGRADE_TIMEOUT, session.options.peer_timeout)  # never what the peer says
    taken, lanes = "control", None
    for name in choice.candidates:
        session.local_offer = dict(session.local.offers[name])
        session.peer_offer = dict(session.peer.offers[name])
        failure, own = "", None
        try:
            module = importlib.import_module(f"lamina.transport.{name}")
            own = await cancelled_after(limit, module.upgrade(session), f"setting up {name}")
        except (TransportError, CapacityError, OSError) as error:
            failure = str(error) or type(error).__name__
        told = await _agree(session, failure[:500], own, 2 * limit)
        if own is not None and not told:
            taken, lanes = name, own
            break
        there = f"{session.peer.hello.name}: {told}" if told and told not in failure else ""
        choice.reasons.append(f"{name}: {'; '.join(filter(None, (failure, there)))}")
    else:
        if choice.candidates:
            raise _SetUpError(f"no transport could be set up: {choice.told('none')}")
    peer = session.peer
    if taken == "rdma" and session.options.tls is not None:
        log.warning('event=unprotected peer=%s reason="TLS does not encrypt RDMA"', session.peer_place)
    link = NodeLink(
        LinkInfo(session.local.hello, peer.hello, session.peer_place, taken, choice.told(taken)),
        session.stream,
        lanes,
        peer_timeout=session.options.peer_timeout,
        heartbeat_timeout=peer.peer_timeout,
    )
    log.info(
        'event=link_opened transport=%s peer="%s" node="%s" choice="%s"',
        taken,
        link,
        session.local.hello.name,
        link.info.choice,
    )
    return link


async def _agree(session: Session, failure: str, lanes: Lanes | None, limit: float) -> str:
    """Tell each other how the set-up went. Close lanes that the other end does not have."""
    told = "the handshake was broken off"
    try:
        told = str(await cancelled_after(limit, session.agree(failure), "agreeing"))
    finally:
        if told and lanes is not None:
            lanes.close(TransportError(f"the peer cannot: {told}"))
    return told


async def _resolve(address: Address) -> list[tuple[int, Any]]:
    """The address families and socket addresses of ``address``. Only a name is given to the resolver, in a thread."""
    try:
        family = socket.AF_INET6 if ip_address(address.host).version == 6 else socket.AF_INET
        return [(family, (address.host, address.port))]
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return [(family, place[:2]) for family, _, _, _, place in found]


def loopback_name(address: Address, place: str) -> str:
    """Say that the host of ``address`` is ``place``, an address of the loopback, on this machine, and what to do."""
    return (
        f"{address.host} is {place} on this machine, where no other machine reaches it: remove that line from "
        f"/etc/hosts, or listen elsewhere (listen = 'tcp://0.0.0.0:{address.port}' beside the node's address)"
    )


def _tls_failed(error: ssl.SSLError) -> str:
    return f"TLS failed: {error.reason or error}; both ends need it, and one authority"


def _reason(error: Exception) -> str:
    """The operating system's text for an error, where it has one; loops add text of their own."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return "the handshake took too long"
    return str(error)


def _place_text(place: tuple[Any, ...]) -> str:
    host, port = place[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
