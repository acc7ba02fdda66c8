"""The links that clients and operators make to a compute node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lamina.errors import LaminaError, NotFrontError, TransportError
from lamina.front.session import ClientSession
from lamina.node.monitor import CALLER_TIMEOUT_S, Monitor
from lamina.transport import Link
from lamina.wire.codec import encode
from lamina.wire.questions import send_unless_gone
from lamina.wire.requests import Failed


class Reception:
    """Serves clients while this node is the front, and sends them away otherwise, on the node's loop.

    ``open_session`` begins to serve a client, and ``refusal`` says where the front is. Operators talk to ``monitor``.
    """

    def __init__(
        self, monitor: Monitor, open_session: Callable[[Link], ClientSession], refusal: Callable[[], NotFrontError]
    ) -> None:
        self._monitor = monitor
        self._open_session = open_session
        self._refusal = refusal
        self._sessions: dict[Link, ClientSession | None] = {}
        """What serves whom; None for operators, and clients that were sent away."""

    def take(self, link: Link, *, serves: bool) -> None:
        """Take a link; ``serves`` says whether this node serves clients."""
        self._sessions = {known: session for known, session in self._sessions.items() if not known.state.closed}
        self._sessions[link] = None
        if link.info.peer.role != "client":
            self._monitor.take(link)
        elif not serves:
            self._refuse(link)
        else:
            self._sessions[link] = session = self._open_session(link)

            def on_lost(error: TransportError) -> None:
                self._sessions.pop(link, None)
                session.on_lost(error)

            link.deliver(on_message=session.on_message, on_lost=on_lost, peer_timeout=CALLER_TIMEOUT_S)

    def send_away(self) -> None:
        """Tell all clients that are served where the front is."""
        for link, session in self._sessions.items():
            if session is not None:
                self._refuse(link)
                session.on_lost(self._refusal())
                self._sessions[link] = None

    def fail(self, error: LaminaError, name: str) -> None:
        """Tell all clients why nothing more will come of the node ``name``."""
        blamed = getattr(error, "node", name)
        reason = str(error) if blamed != name else f"compute node {name} failed: {error}"
        for link in self._sessions:
            if link.info.peer.role == "client" and not link.state.closed:
                link.send(encode(Failed(kind="NodeError", message=reason, node=blamed)))

    async def close(self) -> None:
        """End all links."""
        await asyncio.gather(*(link.close() for link in self._sessions))

    def _refuse(self, link: Link) -> None:
        """Tell a client where the front is, and tell it again whatever it says."""

        def refuse(_: object = None) -> None:
            send_unless_gone(link, Failed.of(self._refusal()))

        refuse()
        link.deliver(on_message=refuse)
