"""What a compute node is made of, step by step: links to the others, the cut model, shards of the KV cache, weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lamina.attention import KVLayout, LayerShape
from lamina.compute.forward import ForwardPass
from lamina.compute.peer_control import PeerControl
from lamina.compute.schedule import Schedule
from lamina.compute.shard_control import ShardControl
from lamina.compute.shard_lane import ShardLane
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import ConfigError, ConnectError, HandshakeError
from lamina.front.members import Members
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import Blueprint, SlicedModel, carry_shapes, cut_into_slices
from lamina.model.weights import load_weights
from lamina.runtime.device import Device
from lamina.runtime.network import Network
from lamina.transport import Hello, Link
from lamina.wire.geometry import aligned, shard_by_heads, shard_whole
from lamina.wire.orders import Limits

log = logging.getLogger("lamina.compute")

BLOCK_TOKENS = 16
"""Tokens of a block of the KV cache."""

REMOTE_TOKENS = 64
"""The most prompt tokens of a step whose past lies on memory nodes, so that these are not kept long from others."""

_IDLE = "each batch runs on one of them; set pipeline.batches to twice the number of replicas"
_ROTATION = (
    "layers change nodes from step to step, so long prompts are slow: all but their first chunks attend on the memory "
    "nodes; a multiple of the replicas as pipeline.batches avoids that"
)

# -- links


class Neighbours(NamedTuple):
    """All other nodes, by member id."""

    shards: dict[int, ShardControl]
    peers: dict[int, PeerControl]


class Rendezvous:
    """Finds all other nodes of the cluster. ``waiting_for`` names those that are still missing.

    Every compute node connects to every memory node; of two compute nodes, the later one in the file connects to the
    earlier one, which gets the link in `greet`.
    """

    def __init__(
        self, config: ClusterConfig, node: NodeConfig, members: Members, device: Device, network: Network
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
        """Take a link that another compute node has made; False if it was not expected."""
        greeted = self._greeted.get(link.info.peer.name)
        if greeted is None or greeted.done():
            return False
        self._take_peer(link)
        greeted.set_result(link)
        return True

    async def all(self) -> Neighbours:
        """Wait for all other nodes; ConnectError names one that does not come in time."""
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
            link = await self._network.connect(node.listen, self._hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(f"{role} node {node.name} was not there within {deadline_s:g} s: {e}") from e
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
            raise ConnectError(f"compute node {node.name} did not come within {deadline_s:g} s") from e
        self._arrived(node.name, link)

    def _take_peer(self, link: Link) -> None:
        self.links.append(link)
        name = link.info.peer.name
        member = self._members.id_of(name)
        self.peers[member] = PeerControl(member, name, link, self._device, self._members.lose)

    def _arrived(self, name: str, link: Link) -> None:
        self.waiting_for.discard(name)
        log.info("event=connected peer=%s transport=%s choice=%r", name, link.info.transport, link.info.choice)


# -- the model


@dataclass(frozen=True)
class CutModel:
    """A model cut into slices, and what the cluster file makes of it."""

    blueprint: Blueprint
    schedule: Schedule
    context: int
    """The most tokens of one request."""
    kv_dtype: str

    @property
    def checkpoint(self) -> Checkpoint:
        """Where it comes from."""
        return self.blueprint.capture.checkpoint

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The attention of each layer."""
        return self.blueprint.capture.shapes

    @property
    def has_windows(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(layer.window is not None for layer in self.layers)

    def layout(self, layers: tuple[LayerShape, ...]) -> KVLayout:
        """How a memory node stores these heads of the model's layers."""
        return KVLayout(layers=layers, dtype=self.kv_dtype, block_tokens=BLOCK_TOKENS)


def read_blueprint(config: ClusterConfig) -> Blueprint:
    """Read the checkpoint's configuration and cut the model. Errors are those of the checkpoint and the capture."""
    with torch.inference_mode(False):
        return cut_into_slices(capture(Checkpoint.open(config.model_path, config.model.dtype)))


def fit_model(config: ClusterConfig, members: Members, blueprint: Blueprint) -> CutModel:
    """See that file and model fit each other; ConfigError says where they do not."""
    layers, checkpoint = blueprint.capture.shapes, blueprint.capture.checkpoint
    pipeline = config.pipeline
    ranges = [node.layer_range for node in config.compute_nodes]
    given = [r for r in ranges if r is not None]
    if given and given[-1].stop != len(layers):
        raise ConfigError(
            f"{config.file}: node {config.compute_nodes[-1].name}: layers: the last compute node ends "
            f"with layer {given[-1].stop - 1}, the model with layer {len(layers) - 1}"
        )
    firsts = tuple(r.start for r in given) if given else None
    asked, most = config.model.context, checkpoint.max_context
    if asked is not None and asked > most:
        raise ConfigError(f"{config.file}: model.context: {asked} is more than the model's {most}")
    cut = CutModel(
        blueprint,
        Schedule(len(layers), members.of_role("compute"), pipeline.batches, firsts),
        asked or most,
        config.model.kv_dtype or checkpoint.dtype,
    )
    if pipeline.partition == "tokens" and cut.has_windows:
        raise ConfigError(
            f'{config.file}: pipeline.partition: "tokens" cannot be had for a model with sliding windows; '
            'use "heads" or "requests"'
        )
    if firsts is None and len(ranges) > pipeline.batches:
        log.warning("event=idle_replicas replicas=%d batches=%d reason=%r", len(ranges), pipeline.batches, _IDLE)
    if not cut.schedule.is_settled:
        log.warning("event=rotation replicas=%d batches=%d reason=%r", len(ranges), pipeline.batches, _ROTATION)
    return cut


def load_forward(config: ClusterConfig, cut: CutModel, member: int, device: torch.device) -> ForwardPass:
    """Load the weights of a member's slices; called within an operation of its device."""
    own = cut.schedule.slices(member)
    with torch.inference_mode(False):
        names = cut.blueprint.weights_of(own.start, own.stop - 1)
        weights = load_weights(cut.blueprint.capture, names, device)
        return SlicedModel(cut.blueprint, weights, device, own.start, own.stop - 1, compiled=config.model.compile)


LoadForward = Callable[[ClusterConfig, CutModel, int, torch.device], ForwardPass]
"""Makes the forward pass of a compute node, as `load_forward` does."""


# -- the others


def step_tokens(config: ClusterConfig) -> int:
    """The most tokens of one step."""
    pipeline = config.pipeline
    return pipeline.max_batch + REMOTE_TOKENS + pipeline.prefill_tokens


def limits(config: ClusterConfig, cut: CutModel, members: Members) -> Limits:
    """What the front's orders have to keep to."""
    return Limits(
        slots=config.pipeline.batches,
        tokens=step_tokens(config),
        memory_nodes=frozenset(members.of_role("memory")),
        context=cut.context,
        vocabulary=cut.checkpoint.vocabulary,
    )


async def agree(config: ClusterConfig, cut: CutModel, peers: Mapping[int, PeerControl]) -> None:
    """Agree with the other compute nodes on terms, and on where carries go; ConfigError names what differs."""
    nbytes = _carry_bytes(cut.blueprint, step_tokens(config))
    terms = _terms(config, cut)
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


async def attach(
    config: ClusterConfig,
    cut: CutModel,
    members: Members,
    member: int,
    tenant: str,
    shards: Mapping[int, ShardControl],
) -> dict[int, ShardLane]:
    """Attach to all memory nodes as ``member`` of a tenant; their lanes, by member id. NodeError if one refuses."""
    pipeline = config.pipeline
    divide = shard_by_heads if pipeline.partition == "heads" else shard_whole
    heads = divide(cut.layers, [node.name for node in config.memory_nodes])
    lanes: dict[int, ShardLane] = {}
    for node, own in zip(config.memory_nodes, heads, strict=True):
        shard = shards[members.id_of(node.name)]
        lanes[shard.member] = await shard.attach(
            own,
            cut.layout(own.layers),
            tenant=tenant,
            model=cut.checkpoint.fingerprint,
            dtype=cut.checkpoint.dtype,
            slots=pipeline.batches,
            max_rows=pipeline.max_batch + REMOTE_TOKENS,
            member=member,
            front=members.id_of(config.front.name),
            quota=node.quota_bytes,
        )
    return lanes


def _terms(config: ClusterConfig, cut: CutModel) -> dict[str, str]:
    """What all compute nodes must have alike."""
    terms = {
        "model": cut.checkpoint.fingerprint,
        "model.dtype": cut.checkpoint.dtype,
        "model.kv_dtype": cut.kv_dtype,
        "model.context": cut.context,
        "compute nodes": [(n.name, n.layers) for n in config.compute_nodes],
        "memory nodes": [(n.name, n.quota) for n in config.memory_nodes],
    }
    for key in ("batches", "max_batch", "prefill_tokens", "partition"):
        terms[f"pipeline.{key}"] = getattr(config.pipeline, key)
    return {key: str(value) for key, value in terms.items()}


def _carry_bytes(blueprint: Blueprint, tokens: int) -> int:
    """The most bytes that a slice of ``tokens`` tokens hands over: its carry, and the attention of rows of prompts."""
    most = 0
    for piece in blueprint.slices[:-1]:
        shapes = carry_shapes(piece.carry, tokens)
        nbytes = sum(aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes)
        most = max(most, nbytes + aligned(piece.sizes.o * tokens))
    return most
