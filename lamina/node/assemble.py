"""What a compute node is made of: links to the others, the part of the model that it runs, its shards, its peers."""

from __future__ import annotations

import asyncio
import logging
import secrets

import torch

from lamina.attention import KVLayout
from lamina.compute.peer import ComputePeer
from lamina.compute.schedule import Schedule
from lamina.compute.shard import RemoteShard
from lamina.compute.step import StepRunner
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import ConfigError, ConnectError, HandshakeError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import Blueprint, SlicedModel, carry_shapes, cut_into_slices
from lamina.model.weights import load_weights
from lamina.runtime.device import Device
from lamina.transport import Hello, Link, connect
from lamina.wire.codec import FRONT
from lamina.wire.geometry import aligned, shard_by_heads, shard_whole
from lamina.wire.orders import Enlisted, Limits

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


class Assembly:
    """Puts a compute node together, step by step; ``links`` and ``waiting_for`` say how far it has come.

    Of two compute nodes the later one in the file connects to the earlier one. All of them cut the model; the front
    attaches to the memory nodes and then tells the others as what to attach.
    """

    def __init__(self, config: ClusterConfig, node: NodeConfig, device: Device, runner: type[StepRunner]) -> None:
        self._config = config
        self._node = node
        self._device = device
        self._make_runner = runner
        self._options = config.options(node)
        self._hello = Hello("compute", node.name)
        self._others = [n for n in config.compute_nodes if n.name != node.name]
        self._names = [n.name for n in config.compute_nodes]
        self.index = self._names.index(node.name)
        self.waiting_for = {n.name for n in [*config.memory_nodes, *self._others]}
        self.links: list[Link] = []
        loop = asyncio.get_running_loop()
        self._met: dict[str, asyncio.Future[Link]] = {n.name: loop.create_future() for n in self._others}
        self.shards: list[RemoteShard] = []
        self.peers: list[ComputePeer] = []
        self.blueprint: Blueprint
        self.schedule: Schedule
        self.context = 0
        self.layout: KVLayout
        """Of the last memory node's shard."""

    @property
    def checkpoint(self) -> Checkpoint:
        return self.blueprint.capture.checkpoint

    @property
    def kv_dtype(self) -> str:
        return self._config.model.kv_dtype or self.checkpoint.dtype

    # -- links

    def greet(self, link: Link) -> bool:
        """Take a link that another compute node has made; False if it was not expected."""
        met = self._met.get(link.info.peer.name)
        if met is None or met.done() or self._is_before(link.info.peer.name):
            return False
        self._meet(link)
        met.set_result(link)
        return True

    async def connect(self) -> None:
        """Find all other nodes; ConnectError names one that does not come in time."""
        memory = [self._find(node, "memory") for node in self._config.memory_nodes]
        before = [self._find(node, "compute") for node in self._others if self._is_before(node.name)]
        after = [self._expect(node) for node in self._others if not self._is_before(node.name)]
        found = await asyncio.gather(*memory, *before, *after)
        self._memory_links = found[: len(memory)]

    def _is_before(self, name: str) -> bool:
        return self._names.index(name) < self.index

    async def _find(self, node: NodeConfig, role: str) -> Link:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s address=%s deadline_s=%g", node.name, node.address, deadline_s)
        try:
            link = await connect(node.listen, self._hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(f"{role} node {node.name} was not there within {deadline_s:g} s: {e}") from e
        if link.info.peer.role != role or (role == "compute" and link.info.peer.name != node.name):
            await link.close()
            raise HandshakeError(
                f"{node.address} should be {role} node {node.name}, but a {link.info.peer.role} node answers"
                + (f", {link.info.peer.name}" if link.info.peer.role == role else "")
            )
        if role == "compute":
            self._meet(link)
        else:
            self.links.append(link)
            link.deliver(lane_loop=self._device.loop)  # start to read; from the attach on, the shard listens
        self._arrived(node.name, link)
        return link

    async def _expect(self, node: NodeConfig) -> Link:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s deadline_s=%g", node.name, deadline_s)
        try:
            link = await asyncio.wait_for(self._met[node.name], deadline_s)
        except TimeoutError as e:
            raise ConnectError(f"compute node {node.name} did not come within {deadline_s:g} s") from e
        self._arrived(node.name, link)
        return link

    def _meet(self, link: Link) -> None:
        self.links.append(link)
        self.peers.append(ComputePeer(self._names.index(link.info.peer.name), link.info.peer.name, link, self._device))

    def _arrived(self, name: str, link: Link) -> None:
        self.waiting_for.discard(name)
        log.info("event=connected peer=%s transport=%s choice=%r", name, link.info.transport, link.info.choice)

    # -- the model

    async def cut(self) -> None:
        """Read the checkpoint's configuration, cut the model, and see that file and model fit."""
        self.blueprint = await self._device.run(self._cut)
        layers = self.blueprint.capture.shapes
        pipeline = self._config.pipeline
        if pipeline.partition == "tokens" and self.has_windows:
            raise ConfigError(
                f'{self._config.file}: pipeline.partition: "tokens" cannot be had for a model with sliding windows; '
                'use "heads" or "requests"'
            )
        ranges = [n.layer_range for n in self._config.compute_nodes]
        given = [r for r in ranges if r is not None]
        if given and given[-1].stop != len(layers):
            raise ConfigError(
                f"{self._config.file}: node {self._config.compute_nodes[-1].name}: layers: the last compute node ends "
                f"with layer {given[-1].stop - 1}, the model with layer {len(layers) - 1}"
            )
        firsts = tuple(r.start for r in given) if given else None
        self.schedule = Schedule(len(layers), len(ranges), pipeline.batches, firsts)
        asked, most = self._config.model.context, self.checkpoint.max_context
        if asked is not None and asked > most:
            raise ConfigError(f"{self._config.file}: model.context: {asked} is more than the model's {most}")
        self.context = asked or most
        if firsts is None and len(ranges) > pipeline.batches:
            log.warning("event=idle_replicas replicas=%d batches=%d reason=%r", len(ranges), pipeline.batches, _IDLE)
        if not self.schedule.is_settled:
            log.warning("event=rotation replicas=%d batches=%d reason=%r", len(ranges), pipeline.batches, _ROTATION)

    def _cut(self) -> Blueprint:
        with torch.inference_mode(False):
            checkpoint = Checkpoint.open(self._config.model_path, self._config.model.dtype)
            return cut_into_slices(capture(checkpoint))

    @property
    def has_windows(self) -> bool:
        return any(layer.window is not None for layer in self.blueprint.capture.shapes)

    async def load(self) -> StepRunner:
        """Load the weights of this node's slices; what runs them."""
        own = self.schedule.slices(self.index)

        def read() -> SlicedModel:
            with torch.inference_mode(False):
                names = self.blueprint.weights_of(own.start, own.stop - 1)
                weights = load_weights(self.blueprint.capture, names, self._device.torch_device)
                return SlicedModel(
                    self.blueprint,
                    weights,
                    self._device.torch_device,
                    own.start,
                    own.stop - 1,
                    compiled=self._config.model.compile,
                )

        model = await self._device.run(read)
        return self._make_runner(
            model,
            self._device,
            self.shards,
            getattr(torch, self.checkpoint.dtype),
            schedule=self.schedule,
            index=self.index,
            peers=self.peers,
        )

    # -- the others

    def limits(self) -> Limits:
        """What orders have to keep to."""
        return Limits(
            slots=self._config.pipeline.batches,
            tokens=self._step_tokens,
            memory_nodes=len(self._config.memory_nodes),
            context=self.context,
            vocabulary=self.checkpoint.vocabulary,
        )

    @property
    def _step_tokens(self) -> int:
        """The most of one step."""
        pipeline = self._config.pipeline
        return pipeline.max_batch + REMOTE_TOKENS + pipeline.prefill_tokens

    async def meet(self) -> None:
        """Agree with the other compute nodes, and on where carries go."""
        pipeline = self._config.pipeline
        nbytes = _carry_bytes(self.blueprint, self._step_tokens)
        terms = self._terms()
        found = await asyncio.gather(*(peer.greet(terms, pipeline.batches, nbytes) for peer in self.peers))
        for peer, theirs in zip(self.peers, found, strict=True):
            for key in sorted({*terms, *theirs}):
                here, there = terms.get(key, "nothing"), theirs.get(key, "nothing")
                if here != there:
                    raise ConfigError(
                        f"{self._config.file}: {key}: {here} here, but {there} on {peer.name}; all compute nodes of a "
                        "cluster need the same model and settings"
                    )
            peer.open()

    async def attach(self) -> None:
        """Attach to the memory nodes, all compute nodes as one tenant."""
        if self.index == FRONT:
            tenant = f"{self._node.name}-{secrets.token_hex(8)}"
            await self._attach(tenant)
            for peer in self.peers:
                peer.enlist(tenant)
        else:
            await self._attach(await self.front.tenant())

    async def ready(self) -> None:
        """Wait, as the front, until all are ready; as another one say so."""
        if self.index == FRONT:
            await asyncio.gather(*(peer.enlisted() for peer in self.peers))
        else:
            self.front.send(Enlisted())

    @property
    def front(self) -> ComputePeer:
        """The front, as another compute node sees it."""
        return next(peer for peer in self.peers if peer.index == FRONT)

    def _terms(self) -> dict[str, str]:
        """What all compute nodes must have alike."""
        config = self._config
        terms = {
            "model": self.checkpoint.fingerprint,
            "model.dtype": self.checkpoint.dtype,
            "model.kv_dtype": self.kv_dtype,
            "model.context": self.context,
            "compute nodes": [(n.name, n.layers) for n in config.compute_nodes],
            "memory nodes": [(n.name, n.quota) for n in config.memory_nodes],
        }
        for key in ("batches", "max_batch", "prefill_tokens", "partition"):
            terms[f"pipeline.{key}"] = getattr(config.pipeline, key)
        return {key: str(value) for key, value in terms.items()}

    async def _attach(self, tenant: str) -> None:
        pipeline, layers = self._config.pipeline, self.blueprint.capture.shapes
        divide = shard_by_heads if pipeline.partition == "heads" else shard_whole
        nodes = self._config.memory_nodes
        shards = divide(layers, [n.name for n in nodes])
        for node, link, shard in zip(nodes, self._memory_links, shards, strict=True):
            self.layout = KVLayout(layers=shard.layers, dtype=self.kv_dtype, block_tokens=BLOCK_TOKENS)
            remote = RemoteShard(
                node.name,
                link,
                shard,
                self.layout,
                self._device,
                dtype=self.checkpoint.dtype,
                slots=pipeline.batches,
                max_rows=pipeline.max_batch + REMOTE_TOKENS,
            )
            self.shards.append(remote)
            await remote.attach(tenant, self.checkpoint.fingerprint, compute=self.index, quota=node.quota_bytes)


def _carry_bytes(blueprint: Blueprint, tokens: int) -> int:
    """What a slice of ``tokens`` tokens hands over at most: its carry, and the attention of rows of prompts."""
    most = 0
    for piece in blueprint.slices[:-1]:
        shapes = carry_shapes(piece.carry, tokens)
        nbytes = sum(aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes)
        most = max(most, nbytes + aligned(piece.sizes.o * tokens))
    return most
