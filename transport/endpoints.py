"""How two nodes find each other: one listens, the other connects, and both hold a ``Link``.

A link takes two connections. The first one brings the introductions and, in the listening end's answer, a random link
id; the second one names this id and so joins the first.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import random
import secrets
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Self

from lamina.errors import ConnectError, HandshakeError, ProtocolError, TransportError
from lamina.transport.address import Address, require_loopback
from lamina.transport.base import Hello, Lane, Link, log
from lamina.transport.handshake import (
    LINK_ID_BYTES,
    Introduction,
    check_introduction,
    receive_introduction,
    refuse,
    send_introduction,
)
from lamina.transport.tcp import TcpLink

DEFAULT_PEER_TIMEOUT = 2.0
HANDSHAKE_TIMEOUT = 5.0
MAX_HANDSHAKES = 64
"""Connections that may be in their handshake at once, and as many links that wait for their second connection."""

_BACKLOG = 128
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5
_ACCEPT_PAUSE = 0.5


async def connect(
    address: Address, hello: Hello, *, deadline_s: float, peer_timeout: float = DEFAULT_PEER_TIMEOUT
) -> Link:
    """Connect to the node that listens at ``address``, trying again until ``deadline_s`` seconds have passed.

    So nodes may start in any order. A peer that speaks another protocol version, refuses, or is no Lamina node at all
    is not tried again: HandshakeError. Otherwise ConnectError says what the last attempt met. ``peer_timeout`` is the
    silence of the peer, in seconds, that ends the link.
    """
    require_loopback(address)
    check_introduction(hello, peer_timeout)
    failure: Exception | None = None
    pause = _FIRST_PAUSE
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await _connect_once(address, hello, peer_timeout)
                except (HandshakeError, ProtocolError) as error:
                    raise HandshakeError(f"{address}: {error}") from error
                except (OSError, ConnectError) as error:
                    failure = error
                # Many nodes may wait for the same one: they should not all come back at the same moment.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret depends on it
                pause = min(2 * pause, _LONGEST_PAUSE)
    except TimeoutError:
        reason = "no answer" if failure is None else _reason(failure)
        raise ConnectError(f"{address}: no link within {deadline_s:g} s, last attempt: {reason}") from failure


async def _connect_once(address: Address, hello: Hello, peer_timeout: float) -> Link:
    with ExitStack() as stack:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT):
            decode = await _open_socket(address, peer_timeout)
            stack.callback(decode.close)
            await send_introduction(decode, Introduction(hello, Lane.DECODE, b"", peer_timeout))
            peer = await receive_introduction(decode)
            if not peer.link_id:
                raise HandshakeError("the peer gave the link no id")
            bulk = await _open_socket(address, peer_timeout)
            stack.callback(bulk.close)
            await send_introduction(bulk, Introduction(hello, Lane.BULK, peer.link_id, peer_timeout))
            await receive_introduction(bulk)
        stack.pop_all()
    return _make_link(hello, peer, str(address), (decode, bulk), peer_timeout)


class Listener:
    """Accepts links at an address: ``on_link`` gets each one after its handshake and sets its callbacks.

    An ``on_link`` that raises costs that link only.
    """

    def __init__(
        self,
        address: Address,
        sock: socket.socket,
        hello: Hello,
        on_link: Callable[[Link], None],
        peer_timeout: float,
        handshake_timeout: float,
    ) -> None:
        """Use ``open``."""
        self.address = address
        self._socket = sock
        self._hello = hello
        self._on_link = on_link
        self._peer_timeout = peer_timeout
        self._handshake_timeout = handshake_timeout
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._half_links: dict[bytes, _HalfLink] = {}
        self._closed = False
        self._resume()

    @classmethod
    async def open(
        cls,
        address: Address,
        hello: Hello,
        on_link: Callable[[Link], None],
        *,
        peer_timeout: float = DEFAULT_PEER_TIMEOUT,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
    ) -> Listener:
        """Listen at ``address``; with port 0 the attribute ``address`` has the port that was found free.

        ``peer_timeout`` and ``handshake_timeout`` are in seconds. Raises ConnectError if the address cannot be had.
        """
        require_loopback(address)
        check_introduction(hello, peer_timeout)
        try:
            family, place = (await _resolve(address))[0]
            sock = socket.create_server(place, family=family, backlog=_BACKLOG)  # with SO_REUSEADDR
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConnectError(f"cannot listen at {address}: another process uses the port") from error
            raise ConnectError(f"cannot listen at {address}: {_reason(error)}") from error
        sock.setblocking(False)
        bound = Address(address.scheme, address.host, sock.getsockname()[1])
        log.info('event=listening address=%s node="%s"', bound, hello.name)
        return cls(bound, sock, hello, on_link, peer_timeout, handshake_timeout)

    async def close(self) -> None:
        """Stop listening and drop what is still in its handshake; links that exist live on. May be called twice."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        for half_link in self._half_links.values():
            half_link.close()
        self._half_links.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of file descriptors, mostly: the connection stays in the backlog, so trying at once would spin.
            log.error('event=accept_failed address=%s reason="%s"', self.address, _reason(error))
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(_ACCEPT_PAUSE, self._resume)
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._welcome(sock))
        self._handshakes.add(task)
        task.add_done_callback(self._handshake_done)
        if len(self._handshakes) == MAX_HANDSHAKES:
            log.warning("event=listener_full address=%s handshakes=%d", self.address, MAX_HANDSHAKES)
            self._loop.remove_reader(self._socket.fileno())

    def _handshake_done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._resume()

    async def _welcome(self, sock: socket.socket) -> None:
        """Shake hands on one connection; never raises, as nobody waits for it."""
        peer = "unknown"
        with ExitStack() as stack:
            stack.callback(sock.close)
            try:
                peer = _place_text(sock.getpeername())
                async with asyncio.timeout(self._handshake_timeout):
                    try:
                        await self._shake_hands(sock, peer, stack)
                    except HandshakeError as error:
                        await refuse(sock, str(error))
                        raise
            except (TransportError, OSError) as error:
                log.warning('event=handshake_failed address=%s peer=%s reason="%s"', self.address, peer, _reason(error))

    async def _shake_hands(self, sock: socket.socket, peer_address: str, stack: ExitStack) -> None:
        _tune(sock, self._peer_timeout)
        peer = await receive_introduction(sock)
        if peer.lane is Lane.DECODE:
            if len(self._half_links) >= MAX_HANDSHAKES:
                raise ConnectError(f"{MAX_HANDSHAKES} links already wait for their second connection")
            link_id = secrets.token_bytes(LINK_ID_BYTES)
            await send_introduction(sock, Introduction(self._hello, Lane.DECODE, link_id, self._peer_timeout))
            stack.pop_all()
            timer = self._loop.call_later(self._handshake_timeout, self._expire, link_id)
            self._half_links[link_id] = _HalfLink(sock, peer, peer_address, timer)
            return

        first = self._take_half_link(peer.link_id)
        stack.callback(first.close)
        await send_introduction(sock, Introduction(self._hello, Lane.BULK, peer.link_id, self._peer_timeout))
        stack.pop_all()
        first.timer.cancel()
        link = _make_link(self._hello, first.introduction, first.peer_address, (first.sock, sock), self._peer_timeout)
        try:
            self._on_link(link)
        except Exception as error:
            log.exception('event=callback_failed transport=%s peer="%s"', link.transport, link)
            link.abort(f"it could not be taken: {error!r}")

    def _take_half_link(self, link_id: bytes) -> _HalfLink:
        # The id is what proves that both connections come from one node: no early end of a comparison may leak it.
        for known in self._half_links:
            if hmac.compare_digest(known, link_id):
                return self._half_links.pop(known)
        raise HandshakeError("no link waits for a second connection with this id")

    def _expire(self, link_id: bytes) -> None:
        half_link = self._half_links.pop(link_id)
        half_link.close()
        log.warning(
            'event=handshake_failed address=%s peer=%s reason="the second connection did not come"',
            self.address,
            half_link.peer_address,
        )


@dataclass(frozen=True)
class _HalfLink:
    """A link whose second connection has not come yet."""

    sock: socket.socket
    introduction: Introduction
    peer_address: str
    timer: asyncio.TimerHandle

    def close(self) -> None:
        self.timer.cancel()
        self.sock.close()


def _make_link(
    local: Hello, peer: Introduction, address: str, sockets: tuple[socket.socket, socket.socket], peer_timeout: float
) -> Link:
    link = TcpLink(local, peer.hello, address, sockets, peer_timeout=peer_timeout, heartbeat_timeout=peer.peer_timeout)
    log.info('event=link_opened transport=%s peer="%s" node="%s"', link.transport, link, local.name)
    return link


async def _resolve(address: Address) -> list[tuple[int, Any]]:
    """Address families and socket addresses of ``address``; asks the resolver, on a thread, only for names."""
    try:
        family = socket.AF_INET6 if ip_address(address.host).version == 6 else socket.AF_INET
        return [(family, (address.host, address.port))]
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return [(family, place[:2]) for family, _, _, _, place in found]


async def _open_socket(address: Address, peer_timeout: float) -> socket.socket:
    """A connected, non-blocking socket; raises OSError."""
    failure = OSError(f"{address.host} has no address")
    for family, place in await _resolve(address):
        with ExitStack() as stack:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            stack.callback(sock.close)
            try:
                await asyncio.get_running_loop().sock_connect(sock, place)
                if sock.getsockname() == sock.getpeername():
                    # A port of the ephemeral range on which nobody listens may be picked as our own.
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
                _tune(sock, peer_timeout)
            except OSError as error:
                failure = error
                continue
            stack.pop_all()
            return sock
    raise failure


def _tune(sock: socket.socket, peer_timeout: float) -> None:
    """Small writes leave at once, and the kernel gives up on a dead peer about when the heartbeats do."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(peer_timeout * 1000))
    # An idle bulk lane carries no heartbeats of its own.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(peer_timeout)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


def _reason(error: Exception) -> str:
    """What went wrong, in the words of the operating system where it has any; loops add words of their own."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return "the handshake took too long"
    return str(error)


def _place_text(place: tuple[Any, ...]) -> str:
    host, port = place[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
