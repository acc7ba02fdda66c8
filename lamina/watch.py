"""Watch a running cluster: what all nodes of a file say of themselves, and what they do per second."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Self

from lamina.admin import AdminClient
from lamina.config import ClusterConfig
from lamina.errors import ConnectError, LaminaError
from lamina.runtime.network import Network
from lamina.transport import Address
from lamina.wire.admin import MemberStatus, PeerStatus, Status

REACH_S = 1.5
"""How long a node may take to be reached, and to answer."""


@dataclass(frozen=True)
class LinkRates:
    """Describes the link of a node to ``peer`` since the look before."""

    peer: str
    transport: str
    sent: float
    """Bytes per second."""
    received: float
    waited: float
    """How long steps have waited for the peer, in parts of the time; more than 1 where several batches wait."""


@dataclass(frozen=True)
class Rates:
    """Describes what a node did since the look before, per second."""

    tokens: float
    prompt_tokens: float
    """Tokens that were prefilled or found."""
    shared_tokens: float
    steps: float
    layers: float
    """Attention layers that were run, each for a whole batch."""
    busy: float
    """The part of the time in which the device computed, from 0 to 1."""
    links: list[LinkRates]


class Watched(NamedTuple):
    """Names a node that is asked: one of the file, or one that has joined."""

    name: str
    role: str
    address: Address


@dataclass(frozen=True)
class NodeView:
    """Describes a node at one moment: ``status`` is what it says, or None where it does not answer, for ``reason``."""

    node: Watched
    status: Status | None
    reason: str = ""
    rates: Rates | None = None
    """None after the first answer of a process."""
    member: MemberStatus | None = None
    """What the front says of the node, or None where the front does not answer."""

    @property
    def is_ready(self) -> bool:
        """Whether the node serves, and the front agrees."""
        serving = self.member is None or self.member.state == "serving"
        return self.status is not None and self.status.state == "ready" and serving

    @property
    def word(self) -> str:
        """Return the state in a word: one of `Status`; or "lost", if the front has lost it as well, or
        "unreachable"."""
        if self.status is not None:
            return self.status.state
        return "lost" if self.member is not None and self.member.state == "lost" else "unreachable"

    @property
    def state(self) -> str:
        """Return the state in words."""
        if self.status is None:
            return self.reason
        state, waiting_for = self.status.state, self.status.waiting_for
        return f"{state} for {waiting_for}" if waiting_for else state


def front_of(views: Sequence[NodeView]) -> NodeView | None:
    """Return the view of the front: of the compute node that says so of itself, the one with the latest epoch if two
    do; None if none does."""
    says_so = [view for view in views if view.status is not None and view.status.front == view.node.name]
    return max(says_so, key=lambda view: view.status.epoch if view.status else 0, default=None)


@dataclass
class _Seen:
    client: AdminClient | None = None
    status: Status | None = None
    at_s: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class ClusterWatch:
    """Asks all nodes of ``config``, and those that have joined them, again and again, as a context manager that ends
    its links.

    ``name`` appears in the nodes' logs. A node that does not answer is asked anew at the next look.
    """

    def __init__(self, config: ClusterConfig, *, name: str, network: Network | None = None) -> None:
        self._config = config
        self._name = name
        self._network = network
        self._nodes = [Watched(node.name, node.role, node.address) for node in config.node]
        self._seen: dict[str, _Seen] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the links; the next look makes them again."""
        clients = [seen.client for seen in self._seen.values() if seen.client is not None]
        for seen in self._seen.values():
            seen.client = seen.status = None
        await asyncio.gather(*(client.close() for client in clients))

    async def look(self) -> list[NodeView]:
        """Ask all nodes at once, and return the answers in the order of the file, within some seconds. Then come the
        nodes that have joined."""
        views = await asyncio.gather(*map(self._look_at, self._nodes))
        front = front_of(views)
        members = {member.name: member for member in front.status.members} if front and front.status else {}
        joined = [
            Watched(name, member.role, Address.parse(member.address))
            for name, member in members.items()
            if all(name != node.name for node in self._nodes)
        ]
        views += await asyncio.gather(*map(self._look_at, joined))
        return [replace(view, member=members.get(view.node.name)) for view in views]

    async def _look_at(self, node: Watched) -> NodeView:
        seen = self._seen.setdefault(node.name, _Seen())
        async with seen.asking:
            status = await self._ask(node, seen)
            if isinstance(status, str):
                if seen.client is not None:
                    seen.client.abort("it did not answer")
                seen.client = seen.status = None
                return NodeView(node, None, status)
            now = asyncio.get_running_loop().time()
            before, since, seen.status, seen.at_s = seen.status, now - seen.at_s, status, now
        rates = rates_between(before, status, since) if before and before.pid == status.pid and since > 0 else None
        return NodeView(node, status, rates=rates)

    async def _ask(self, node: Watched, seen: _Seen) -> Status | str:
        """Return a node's status, or why it does not answer."""
        try:
            async with asyncio.timeout(2 * REACH_S):
                if seen.client is None:
                    seen.client = await AdminClient.connect(
                        node.address,
                        self._config.options(),
                        name=self._name,
                        deadline_s=REACH_S,
                        network=self._network,
                    )
                if seen.client.peer.role != node.role:
                    return f"a {seen.client.peer.role} node answers there, {seen.client.peer.name}"
                return await seen.client.status()
        except ConnectError as e:
            if isinstance(e.__cause__, ConnectionRefusedError):
                return "not running"
            return str(e).removeprefix(f"{node.address}: ")
        except LaminaError as e:
            return str(e).removeprefix(f"{node.address}: ")
        except TimeoutError:
            return "no answer"


def rates_between(before: Status, after: Status, seconds: float) -> Rates:
    """Return what a node did between two of its statuses, taken ``seconds`` apart."""
    peers: Mapping[str, PeerStatus] = {peer.name: peer for peer in before.peers}
    return Rates(
        tokens=(after.tokens_generated - before.tokens_generated) / seconds,
        prompt_tokens=(after.prompt_tokens - before.prompt_tokens) / seconds,
        shared_tokens=(after.shared_tokens - before.shared_tokens) / seconds,
        steps=(after.steps - before.steps) / seconds,
        layers=(after.layers - before.layers) / seconds,
        busy=min(1.0, (after.busy_s - before.busy_s) / seconds),
        links=[
            LinkRates(
                peer=peer.name,
                transport=peer.transport,
                sent=max(0, peer.bytes_sent - known.bytes_sent) / seconds,
                received=max(0, peer.bytes_received - known.bytes_received) / seconds,
                waited=max(0.0, peer.waited_s - known.waited_s) / seconds,
            )
            for peer in after.peers
            if (known := peers.get(peer.name)) is not None
        ],
    )
