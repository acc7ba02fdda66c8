"""Keep links to all other nodes of the cluster, for as long as this node lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.config import ClusterConfig, ComputeNodeConfig
from lamina.errors import ConnectError, HandshakeError, LaminaError, NodeError
from lamina.front.members import Members
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.network import Network
from lamina.transport import Address, Hello, Link
from lamina.wire.members import MemberEntry

log = logging.getLogger("lamina.compute")

SEEK_S = 5.0
"""The seconds of one attempt to reach a node that was lost."""
PAUSES_S = (0.1, 2.0)
"""The seconds between two attempts: at first, and at most."""

Control = ShardControl | PeerControl
"""A link to another node."""


@dataclass(eq=False)
class _Neighbour:
    """Another node. ``control`` is the present link to it, ``met`` is done when there has been one, and ``seeking``
    makes one again and again."""

    entry: MemberEntry
    met: asyncio.Future[None]
    seeking: asyncio.Task[None] | None = None
    control: Control | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Neighbours:
    """Holds the links to all other members, and seeks those that are missing.

    Every compute node connects to every memory node; of two compute nodes, the one with the larger id connects to the
    other one, which gets the link in `greet`. ``on_found`` is called with each new link, and ``on_lost`` with the
    member and the reason when one has ended, unless `renew` ended it. It belongs to the node's loop.
    """

    def __init__(
        self,
        config: ClusterConfig,
        node: ComputeNodeConfig,
        members: Members,
        device: Device,
        network: Network,
        on_found: Callable[[Control], None],
        on_lost: Callable[[int, NodeError], None],
    ) -> None:
        self._config = config
        self._device = device
        self._there = Crossing(device.loop)
        self._network = network
        self._options = config.options(node)
        self._hello = Hello("compute", node.name)
        self._on_found, self._on_lost = on_found, on_lost
        self._own = members.id_of(node.name)
        self.parted: dict[int, object] = {}
        """What the processes call themselves of memory nodes that have left, by member id."""
        self._others: dict[int, _Neighbour] = {}
        self._is_seeking = False
        self._links: set[Link] = set()
        self.know(members.entries)

    @property
    def shards(self) -> dict[int, ShardControl]:
        """Return the memory nodes to which there is a link, by member id."""
        return {id_: n.control for id_, n in self._others.items() if isinstance(n.control, ShardControl)}

    @property
    def peers(self) -> dict[int, PeerControl]:
        """Return the compute nodes to which there is a link, by member id."""
        return {id_: n.control for id_, n in self._others.items() if isinstance(n.control, PeerControl)}

    @property
    def controls(self) -> list[Control]:
        """Return all links."""
        return [n.control for n in self._others.values() if n.control is not None]

    @property
    def ways(self) -> list[Control]:
        """Return the links to nodes with which this one can run steps."""
        attached = [shard for shard in self.shards.values() if shard.is_attached]
        return [*attached, *(peer for peer in self.peers.values() if peer.is_open)]

    @property
    def waiting_for(self) -> list[str]:
        """Return the names of the nodes to which there is no link."""
        return sorted(n.entry.name for n in self._others.values() if n.control is None)

    def still_starting(self) -> NodeError:
        """Return the error for those who ask something of a front that is not ready."""
        waiting, name = self.waiting_for, self._hello.name
        missing = f"; it waits for {', '.join(waiting)}" if waiting else ""
        return NodeError(f"compute node {name} is still starting{missing}; try again soon", node=name)

    def note_parted(self, members: Collection[int]) -> None:
        """These memory nodes have left, and no others: remember by which processes, so that the next ones can be told
        from them."""
        shards = self.shards
        kept = {member: process for member, process in self.parted.items() if member in members}
        new = {m: shards[m].link.info.peer.details.get("process") for m in members if m in shards and m not in kept}
        self.parted = new | kept

    def know(self, entries: Iterable[MemberEntry]) -> None:
        """Have links to these members alone: new ones are sought, and so are those whose address has changed; others
        are not any more. Nothing is said to be lost by that."""
        told = {entry.id: entry for entry in entries if entry.id != self._own}
        for id_, neighbour in list(self._others.items()):
            if told.get(id_) != neighbour.entry:
                self._forget(self._others.pop(id_))
        for id_, entry in told.items():
            if id_ not in self._others:
                self._others[id_] = _Neighbour(entry, asyncio.get_running_loop().create_future())
        if self._is_seeking:
            self._seek_all()

    async def meet(self, members: Collection[int]) -> None:
        """Begin to seek all nodes, and wait until there has been a link to each of ``members``. A ConnectError or
        HandshakeError names one that does not come within ``transport.start_timeout`` seconds."""
        self._is_seeking = True
        self._seek_all()
        awaited = [self._others[member] for member in members]
        await asyncio.gather(*(n.met if self._connects_to(n) else self._expect(n) for n in awaited))

    async def close(self) -> None:
        """Seek no more, and end all links."""
        self._is_seeking = False
        tasks = [n.seeking for n in self._others.values() if n.seeking is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in list(self._links)))

    def free(self) -> None:
        """Free the memory of this end; links and the device's loop have ended."""
        for control in self.controls:
            control.close()

    def greet(self, link: Link) -> bool:
        """Take a link that another compute node has made; return False if it was not expected.

        A node that makes a second link has lost the first, also if this end does not know that yet.
        """
        name = link.info.peer.name
        neighbour = next((n for n in self._others.values() if n.entry.name == name), None)
        if neighbour is None or self._connects_to(neighbour):
            return False
        if neighbour.control is not None:
            neighbour.control.drop(f"{name} has made another link")
        self._take(neighbour, link)
        return True

    def drop(self, member: int, reason: str) -> None:
        """End the link to a member, if there is one: it is lost, and sought again."""
        if (control := self._others[member].control) is not None:
            control.drop(reason)

    def renew(self, member: int) -> None:
        """Replace the link to a member that this node connects to. Nothing is lost by that."""
        neighbour = self._others[member]
        if (control := neighbour.control) is not None:
            neighbour.control = None
            control.drop("attached anew")

    # -- inside

    def _connects_to(self, neighbour: _Neighbour) -> bool:
        """Return whether this end makes the link to another node."""
        return neighbour.entry.role == "memory" or neighbour.entry.id < self._own

    def _seek_all(self) -> None:
        for neighbour in self._others.values():
            if neighbour.seeking is None and self._connects_to(neighbour):
                neighbour.seeking = asyncio.ensure_future(self._seek(neighbour))

    @staticmethod
    def _forget(neighbour: _Neighbour) -> None:
        """Have no link to a node any more."""
        if neighbour.seeking is not None:
            neighbour.seeking.cancel()
        control, neighbour.control = neighbour.control, None
        if control is not None:
            control.drop(f"{neighbour.entry.name} is no member, or has another address")

    async def _seek(self, neighbour: _Neighbour) -> None:
        """Have a link to a node, again and again."""
        node, pause_s = neighbour.entry, PAUSES_S[0]
        while True:
            met = neighbour.met.done()
            try:
                link = await self._connect(node, SEEK_S if met else self._config.transport.start_timeout)
            except LaminaError as error:
                if not met and not neighbour.met.done():
                    neighbour.met.set_exception(error)
                    neighbour.met.exception()  # nothing may wait for it
                log.info("event=not_reached peer=%s reason=%r", node.name, str(error))
            else:
                pause_s = PAUSES_S[0]
                self._take(neighbour, link)
                await neighbour.ended.wait()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSES_S[1])

    async def _connect(self, node: MemberEntry, deadline_s: float) -> Link:
        log.info("event=waiting peer=%s address=%s deadline_s=%g", node.name, node.address, deadline_s)
        try:
            address = Address.parse(node.address)
            link = await self._network.connect(address, self._hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(f"{node.role} node {node.name} could not be reached within {deadline_s:g} s: {e}") from e
        peer = link.info.peer
        if peer.role != node.role or (peer.role == "compute" and peer.name != node.name):
            await link.close()
            raise HandshakeError(
                f"{node.address} should be {node.role} node {node.name}, but a {peer.role} node answers"
                + (f", {peer.name}" if peer.role == node.role else "")
            )
        return link

    async def _expect(self, neighbour: _Neighbour) -> None:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s deadline_s=%g", neighbour.entry.name, deadline_s)
        try:
            await asyncio.wait_for(asyncio.shield(neighbour.met), deadline_s)
        except TimeoutError as e:
            raise ConnectError(f"compute node {neighbour.entry.name} did not connect within {deadline_s:g} s") from e

    def _take(self, neighbour: _Neighbour, link: Link) -> None:
        node, member = neighbour.entry, neighbour.entry.id
        log.info("event=connected peer=%s transport=%s choice=%r", node.name, link.info.transport, link.info.choice)
        self._links = {known for known in self._links if not known.state.closed} | {link}
        ended = neighbour.ended = asyncio.Event()

        def lost(member: int, error: NodeError) -> None:
            ended.set()
            self._there.post(control.close)  # steps that still use it fail
            if neighbour.control is control:
                neighbour.control = None
                self._on_lost(member, error)

        kind = ShardControl if node.role == "memory" else PeerControl
        control: Control = kind(member, node.name, link, self._device, lost)
        neighbour.control = control
        if not neighbour.met.done():
            neighbour.met.set_result(None)
        self._on_found(control)
