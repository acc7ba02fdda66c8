"""Join a compute node to its cluster: make links to all others, agree on terms, attach to the memory nodes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.shard_lane import ShardLane
from lamina.config import ClusterConfig, ComputeNodeConfig, NodeConfig, format_range, format_size
from lamina.errors import ConfigError, ConnectError, HandshakeError
from lamina.front.members import Members
from lamina.node.model import ServedModel
from lamina.runtime.device import Device
from lamina.runtime.network import Network
from lamina.transport import Hello, Link
from lamina.wire.geometry import shard_by_heads, shard_whole
from lamina.wire.orders import Limits

log = logging.getLogger("lamina.compute")

REMOTE_TOKENS = 64
"""The most prompt tokens of a step whose past lies on memory nodes. More would keep these from other steps for long."""

# -- links


class Neighbours(NamedTuple):
    """Holds all other nodes, by member id."""

    shards: dict[int, ShardControl]
    peers: dict[int, PeerControl]


class Rendezvous:
    """Finds all other nodes of the cluster. ``waiting_for`` names those that are still missing.

    Every compute node connects to every memory node; of two compute nodes, the later one in the file connects to the
    earlier one, which gets the link in `greet`.
    """

    def __init__(
        self, config: ClusterConfig, node: ComputeNodeConfig, members: Members, device: Device, network: Network
    ) -> None:
        self.links: list[Link] = []
        self.peers: dict[int, PeerControl] = {}
        self._shards: dict[int, ShardControl] = {}
        self._config = config
        self._members = members
        self._device = device
        self._network = network
        self._options = config.options(node)
        self._hello = Hello("compute", node.name)
        self._own = members.id_of(node.name)
        self._others = [other for other in config.compute_nodes if other.name != node.name]
        self.waiting_for = {other.name for other in [*config.memory_nodes, *self._others]}
        loop = asyncio.get_running_loop()
        self._greeted = {other.name: loop.create_future() for other in self._others if self._is_later(other.name)}

    def greet(self, link: Link) -> bool:
        """Take a link that another compute node has made; return False if it was not expected."""
        greeted = self._greeted.get(link.info.peer.name)
        if greeted is None or greeted.done():
            return False
        self._take_peer(link)
        greeted.set_result(link)
        return True

    async def all(self) -> Neighbours:
        """Wait for all other nodes. A ConnectError names one that does not come in time."""
        shards = [self._find(node, "memory") for node in self._config.memory_nodes]
        peers = [
            self._expect(node) if self._is_later(node.name) else self._find(node, "compute") for node in self._others
        ]
        await asyncio.gather(*shards, *peers)
        return Neighbours(dict(sorted(self._shards.items())), self.peers)

    def _is_later(self, name: str) -> bool:
        return self._members.id_of(name) > self._own

    async def _find(self, node: NodeConfig, role: str) -> None:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s address=%s deadline_s=%g", node.name, node.address, deadline_s)
        try:
            link = await self._network.connect(node.address, self._hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(f"{role} node {node.name} could not be reached within {deadline_s:g} s: {e}") from e
        peer = link.info.peer
        if peer.role != role or (role == "compute" and peer.name != node.name):
            await link.close()
            raise HandshakeError(
                f"{node.address} should be {role} node {node.name}, but a {peer.role} node answers"
                + (f", {peer.name}" if peer.role == role else "")
            )
        if role == "compute":
            self._take_peer(link)
        else:
            self.links.append(link)
            member = self._members.id_of(node.name)
            self._shards[member] = ShardControl(member, node.name, link, self._device, self._members.lose)
        self._arrived(node.name, link)

    async def _expect(self, node: NodeConfig) -> None:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s deadline_s=%g", node.name, deadline_s)
        try:
            link: Link = await asyncio.wait_for(self._greeted[node.name], deadline_s)
        except TimeoutError as e:
            raise ConnectError(f"compute node {node.name} did not connect within {deadline_s:g} s") from e
        self._arrived(node.name, link)

    def _take_peer(self, link: Link) -> None:
        self.links.append(link)
        name = link.info.peer.name
        member = self._members.id_of(name)
        self.peers[member] = peer = PeerControl(member, name, link, self._device, self._members.lose)
        if name == self._config.front.name:
            peer.on_members = self._members.adopt

    def _arrived(self, name: str, link: Link) -> None:
        self.waiting_for.discard(name)
        log.info("event=connected peer=%s transport=%s choice=%r", name, link.info.transport, link.info.choice)


# -- the others


def step_tokens(config: ClusterConfig) -> int:
    """Return the most tokens of one step."""
    pipeline = config.pipeline
    return pipeline.max_batch + REMOTE_TOKENS + pipeline.prefill_tokens


def limits(config: ClusterConfig, served: ServedModel, members: Members) -> Limits:
    """Return the limits of the front's orders."""
    return Limits(
        slots=config.pipeline.batches,
        tokens=step_tokens(config),
        memory_nodes=frozenset(members.of_role("memory")),
        context=served.context,
        vocabulary=served.facts.vocabulary,
    )


async def agree(config: ClusterConfig, served: ServedModel, peers: Mapping[int, PeerControl]) -> None:
    """Agree with the other compute nodes on terms, and exchange the regions for carries. A ConfigError names what
    differs."""
    nbytes = served.source.carry_bytes(step_tokens(config))
    terms = _terms(config, served)
    found = await asyncio.gather(*(peer.greet(terms, config.pipeline.batches, nbytes) for peer in peers.values()))
    for peer, theirs in zip(peers.values(), found, strict=True):
        for key in sorted({*terms, *theirs}):
            here, there = terms.get(key, "nothing"), theirs.get(key, "nothing")
            if here != there:
                raise ConfigError(
                    f"{config.file}: {key}: {here} here, but {there} on {peer.name}; all compute nodes of a "
                    "cluster need the same model and settings"
                )
        peer.open()


class TenantKey(NamedTuple):
    """Names a cluster to its memory nodes, and proves that a compute node belongs to it."""

    name: str
    token: bytes

    @classmethod
    def of(cls, config: ClusterConfig, model: str) -> TenantKey:
        """Return the key of the cluster of a file with the model of this fingerprint. It is the same at every start, so
        that a front that starts anew finds what memory nodes have kept.

        Only those who know the cluster's secret can make it. A cluster without one is open to all of this machine.
        """
        nodes = [(node.role, node.name, str(node.address)) for node in config.node]
        told = msgspec.json.encode((model, nodes))
        secret = hashlib.blake2b(config.links.secret or b"").digest()

        def digest(purpose: bytes, nbytes: int) -> bytes:
            return hashlib.blake2b(told, digest_size=nbytes, key=secret, person=purpose).digest()

        return cls(f"{config.front.name}-{digest(b'lamina tenant', 16).hex()}", digest(b"lamina token", 32))


async def attach(
    config: ClusterConfig,
    served: ServedModel,
    members: Members,
    member: int,
    key: TenantKey,
    terms: Mapping[int, int],
    shards: Mapping[int, ShardControl],
) -> dict[int, ShardLane]:
    """Attach to all memory nodes as ``member`` of a tenant, and return their lanes by member id. Raises NodeError if
    one refuses.

    ``terms`` are those of the front's attachments, by member id; the front itself has none, and begins new ones.
    """
    pipeline = config.pipeline
    divide = shard_by_heads if pipeline.partition == "heads" else shard_whole
    heads = divide(served.facts.layers, [node.name for node in config.memory_nodes])
    lanes: dict[int, ShardLane] = {}
    for node, own in zip(config.memory_nodes, heads, strict=True):
        shard = shards[members.id_of(node.name)]
        lanes[shard.member] = await shard.attach(
            own,
            served.layout(own.layers),
            tenant=key.name,
            token=key.token,
            term=terms.get(shard.member, 1),
            lease=config.recovery.lease,
            model=served.facts.fingerprint,
            dtype=served.facts.dtype,
            slots=pipeline.batches,
            max_rows=pipeline.max_batch + REMOTE_TOKENS,
            member=member,
            front=members.id_of(config.front.name),
            quota=node.quota,
        )
    return lanes


def _terms(config: ClusterConfig, served: ServedModel) -> dict[str, str]:
    """Return the settings that must be the same on all compute nodes."""
    terms = {
        "model": served.facts.fingerprint,
        "model.dtype": served.facts.dtype,
        "model.kv_dtype": served.kv_dtype,
        "model.context": served.context,
        "compute nodes": [(n.name, n.layers and format_range(n.layers)) for n in config.compute_nodes],
        "memory nodes": [(n.name, n.quota and format_size(n.quota)) for n in config.memory_nodes],
    }
    for key in ("batches", "max_batch", "prefill_tokens", "partition"):
        terms[f"pipeline.{key}"] = getattr(config.pipeline, key)
    return {key: str(value) for key, value in terms.items()}
