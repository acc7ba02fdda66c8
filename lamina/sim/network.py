"""A network inside one process: who listens where, which links there are, and what befalls them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from random import Random

from lamina.errors import ConnectError, HandshakeError, UsageError
from lamina.sim.delivery import Deliveries
from lamina.sim.link import LinkModel, SimLink, Trace
from lamina.sim.loop import VirtualLoop
from lamina.transport.address import Address
from lamina.transport.base import Hello, Link, LinkInfo, log
from lamina.transport.choice import TRANSPORTS, Party, choose
from lamina.transport.handshake import check_introduction
from lamina.transport.messages import decode_message, encode_message
from lamina.transport.options import Options

FIRST_FREE_PORT = 49152
LAST_PORT = 65535

_CAN_DO: dict[str, dict[str, str]] = {name: {} for name in TRANSPORTS}


class SimNetwork:
    """Connects nodes of one loop. A process is known by the name in its hellos.

    Every link is ``model``, apart from those between two processes for which ``set_model`` says otherwise. Where a
    model has a jitter, chance comes from ``seed`` alone. TLS and reachability are not modelled; secrets are compared.
    ``trace`` is given a line for everything that arrives.
    """

    def __init__(
        self, loop: VirtualLoop, *, seed: int = 0, model: LinkModel | None = None, trace: Trace | None = None
    ) -> None:
        self._loop = loop
        self._random = Random(f"network {seed}")  # noqa: S311 - no secret depends on it
        self._model = model or LinkModel()
        self._models: dict[frozenset[str], LinkModel] = {}
        self._trace = trace
        self._deliveries = Deliveries(loop)
        self._listeners: dict[Address, SimListener] = {}
        self._next_port = FIRST_FREE_PORT
        self._links: dict[SimLink, None] = {}
        """The ends that live, in the order in which they were made."""
        self._made = 0
        self._frozen: set[str] = set()
        self._cut: set[tuple[str, str]] = set()
        """From whom nothing reaches whom."""
        self._slowed: dict[frozenset[str], float] = {}
        self._killed: dict[str, int] = {}
        """How often each process was killed."""
        self._changed = asyncio.Event()
        """Set, and replaced, when an attempt to connect may have become possible."""

    # -- Network

    async def connect(self, address: Address, hello: Hello, options: Options, *, deadline_s: float) -> Link:
        """Connect to what listens at ``address``, or will within ``deadline_s``: else ConnectError.

        HandshakeError at once where secrets or kinds of transport do not fit.
        """
        check_introduction(hello, options)
        killed = self._killed.get(hello.name, 0)
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    listener = self._listeners.get(address)
                    if listener is not None and self._reach_each_other(hello.name, listener.hello.name):
                        await asyncio.sleep(2 * self._model_of(hello.name, listener.hello.name).latency_s)
                        if self._killed.get(hello.name, 0) != killed:
                            raise ConnectError(f"{address}: the process {hello.name}, which connects, was killed")
                        if listener.is_open and self._reach_each_other(hello.name, listener.hello.name):
                            return self._make_link(listener, hello, options)
                    else:
                        await self._changed.wait()
        except TimeoutError:
            reason = "no answer" if address in self._listeners else "Connection refused"
            raise ConnectError(f"{address}: no link within {deadline_s:g} s, last attempt: {reason}") from None

    async def listen(
        self, address: Address, hello: Hello, on_link: Callable[[Link], None], options: Options
    ) -> SimListener:
        """Listen at ``address``; ConnectError if that is taken. Port 0 becomes one that is free."""
        check_introduction(hello, options)
        if address.port == 0:
            address = self._free_address(address)
        elif address in self._listeners:
            raise ConnectError(f"cannot listen at {address}: another process uses the port")
        listener = SimListener(address, hello, options, on_link, self._stop_listening)
        self._listeners[address] = listener
        self._changes()
        return listener

    @property
    def links(self) -> tuple[SimLink, ...]:
        """Return the ends of links that live, in the order in which they were made."""
        return tuple(self._links)

    # -- how fast it is, and what befalls it

    def set_model(self, name: str, other: str, model: LinkModel) -> None:
        """Links that are made between two processes from now on are ``model``."""
        self._models[frozenset((name, other))] = model

    def kill(self, name: str) -> None:
        """The process is gone, and its sockets closed: its peers get what had left it, then PeerLostError.

        Its own ends call nothing more, and raise. Cancel its tasks as well: here they are all that is left of it. A
        process of the same name may start again.
        """
        self._killed[name] = self._killed.get(name, 0) + 1
        self.thaw(name)  # the kernel closes the sockets of a stopped process too
        for listener in [listener for listener in self._listeners.values() if listener.hello.name == name]:
            self._stop_listening(listener)
        for link in [link for link in self._links if link.info.local.name == name]:
            link.vanish()

    def freeze(self, name: str) -> None:
        """The process stands still: what it sends and is sent waits, and its peers lose it after their peer_timeout.

        It takes no peer for dead itself until ``thaw``. Its timers and its device go on, as they share the loop.
        """
        self._frozen.add(name)
        self._listen_again()

    def thaw(self, name: str) -> None:
        """The process goes on, if it was frozen; what was on its way arrives."""
        self._frozen.discard(name)
        self._listen_again()

    def cut(self, name: str, other: str, *, one_way: bool = False) -> None:
        """Nothing passes between two processes: each loses the other after its peer_timeout.

        ``one_way``: only what ``name`` sends does not reach ``other``, which loses it then, and tells it so.
        """
        if name == other:
            raise UsageError(f"the process {name} cannot be cut off from itself; name two, or freeze it")
        self._cut |= {(name, other)} if one_way else {(name, other), (other, name)}
        self._listen_again()

    def mend(self, name: str, other: str) -> None:
        """Everything passes again between two processes, if it did not; what was on its way arrives."""
        self._cut -= {(name, other), (other, name)}
        self._listen_again()

    def slow(self, name: str, other: str, times: float) -> None:
        """Links between two processes take so many ``times`` as long as their model says, also those that there are;
        1 is as before."""
        self._slowed[frozenset((name, other))] = times
        for link in self._links:
            if {link.info.local.name, link.info.peer.name} == {name, other}:
                link.change(self._model_of(name, other))

    # -- inside

    def _make_link(self, listener: SimListener, hello: Hello, options: Options) -> SimLink:
        if options.secret != listener.options.secret:
            raise HandshakeError(
                f"{listener.address}: {hello.name} and {listener.hello.name} have different cluster secrets, or only "
                "one has any: both ends need the same secret file"
            )
        choice = choose(
            Party(hello.name, options.kind, _CAN_DO),
            Party(listener.hello.name, listener.options.kind, _CAN_DO),
        )
        transport = "sim" if choice.candidates else "control"
        told = choice.told(transport)
        self._made += 1
        here, there = _as_told(hello), _as_told(listener.hello)
        model = self._model_of(hello.name, listener.hello.name)
        place = f"sim://{hello.name}/{self._made}"
        near, far = (
            SimLink(
                self._made,
                info,
                model,
                self._deliveries,
                random=self._random,
                trace=self._trace,
                peer_timeout=peer_timeout,
                on_end=self._forget,
            )
            for info, peer_timeout in (
                (LinkInfo(hello, there, str(listener.address), transport, told), options.peer_timeout),
                (LinkInfo(listener.hello, here, place, transport, told), listener.options.peer_timeout),
            )
        )
        near.join(far)
        far.join(near)
        self._links[near] = self._links[far] = None
        if self._trace is not None:
            self._trace(f"{hello.name}>{listener.hello.name}#{self._made} connected")
        try:
            listener.context.copy().run(listener.on_link, far)
        except Exception as error:
            log.exception('event=callback_failed transport=%s peer="%s"', transport, far)
            far.abort(f"it could not be taken: {error!r}")
        return near

    def _model_of(self, name: str, other: str) -> LinkModel:
        pair = frozenset((name, other))
        return self._models.get(pair, self._model).slowed(self._slowed.get(pair, 1.0))

    def _free_address(self, address: Address) -> Address:
        for port in range(self._next_port, LAST_PORT + 1):
            free = Address(address.scheme, address.host, port)
            if free not in self._listeners:
                self._next_port = port + 1
                return free
        raise ConnectError(f"cannot listen at {address}: no port up to {LAST_PORT} is free")

    def _stop_listening(self, listener: SimListener) -> None:
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]
        listener.is_open = False

    def _reaches(self, name: str, other: str) -> bool:
        """Whether what one process sends reaches another."""
        return not (name in self._frozen or other in self._frozen or (name, other) in self._cut)

    def _reach_each_other(self, name: str, other: str) -> bool:
        return self._reaches(name, other) and self._reaches(other, name)

    def _listen_again(self) -> None:
        for link in list(self._links):
            name = link.info.local.name
            link.hear(silent=not self._reaches(link.info.peer.name, name), judges=name not in self._frozen)
        self._changes()

    def _changes(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _forget(self, link: SimLink) -> None:
        self._links.pop(link, None)


class SimListener:
    """An address at which links are accepted; made by ``SimNetwork.listen``."""

    def __init__(
        self,
        address: Address,
        hello: Hello,
        options: Options,
        on_link: Callable[[Link], None],
        stop: Callable[[SimListener], None],
    ) -> None:
        self.address = address
        self.hello = hello
        self.options = options
        self.on_link = on_link
        self.is_open = True
        self.context = copy_context()
        """That of the process which listens."""
        self._stop = stop

    async def close(self) -> None:
        """Accept no more; links that exist live on. May be called twice."""
        self._stop(self)


def _as_told(hello: Hello) -> Hello:
    """A hello as its peer reads it: what passes through an encoding may change its type."""
    return Hello(hello.role, hello.name, decode_message(encode_message(hello.details)))
