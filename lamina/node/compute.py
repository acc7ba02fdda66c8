"""The compute daemon: loads the model, finds its memory nodes, runs the engine, serves clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from dataclasses import replace
from typing import Any

import torch

from lamina.attention import KVLayout
from lamina.config import ClusterConfig, NodeConfig
from lamina.device import Device
from lamina.engine.engine import Engine
from lamina.engine.fit import ANSWER_TOKENS, fit
from lamina.engine.geometry import shard_by_heads, shard_whole
from lamina.engine.prefix import PrefixKeys
from lamina.engine.remote import RemoteShard, reserve
from lamina.engine.room import Room
from lamina.engine.scheduler import Scheduler
from lamina.engine.step import StepRunner
from lamina.errors import CapacityError, ConfigError, ConnectError, HandshakeError, LaminaError, NodeError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import Blueprint, SlicedModel, cut_into_slices
from lamina.model.weights import load_weights
from lamina.node.daemon import DRAIN_TIMEOUT_S, answer
from lamina.node.front import ClientSession, Tokenizer
from lamina.node.tracing import Tracing
from lamina.probe import measure
from lamina.protocol import AskSpans, AskStatus, Probe, Probed, Record, Status, decode
from lamina.transport import Hello, Link, Listener, connect

log = logging.getLogger("lamina.compute")

BLOCK_TOKENS = 16
"""Tokens of a block of the KV cache."""

REMOTE_TOKENS = 64
"""The most prompt tokens of a step whose past lies on memory nodes, so that these are not kept long from others."""

MAX_PROBES = 64
"""Measurements that may wait for their turn."""

CLIENT_TIMEOUT_S = 30.0
"""Silence that is forgiven to clients, whose event loops may be busy with other things than Lamina."""


class ComputeNode:
    """The compute node ``node`` of a cluster, which is also its front."""

    def __init__(self, config: ClusterConfig, node: NodeConfig) -> None:
        self._config = config
        self._node = node
        self._options = config.options(node)
        self._device = Device(node.device or "cpu", cpus=node.pinned, threads=node.threads)
        self._waiting_for: set[str] = {n.name for n in config.memory_nodes}
        self._shards: list[RemoteShard] = []
        self._links: list[Link] = []
        self._clients: set[Link] = set()
        self._tracing = Tracing(self._device)
        self._probing = asyncio.Lock()
        self._probes: set[asyncio.Task[None]] = set()
        self._runner: StepRunner | None = None
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        self._model = ""
        self._blocks = 0

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start, serve, and when ``stopping`` is set answer what was asked before leaving."""
        hello = Hello("compute", self._node.name)
        listener = await Listener.open(self._node.listen, hello, self._on_link, self._options)
        log.info("event=listening address=%s", listener.address)
        try:
            engine = await _unless(stopping, self._start(hello))
            if engine is not None:
                self._engine = engine
                log.info("event=ready model=%s memory_nodes=%d", self._model, len(self._shards))
                await self._run(engine, stopping)
        finally:
            await listener.close()
            for task in self._probes:
                task.cancel()
            await asyncio.gather(*(link.close() for link in [*self._clients, *self._links]))
            self._device.close()

    async def _run(self, engine: Engine, stopping: asyncio.Event) -> None:
        running = asyncio.ensure_future(engine.run())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                drained = asyncio.ensure_future(engine.drain())
                await asyncio.wait({running, drained}, timeout=DRAIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                if not drained.done():
                    log.warning("event=drain_timeout requests=%d", engine.running + engine.waiting)
                drained.cancel()
        finally:
            stop.cancel()
            if not running.done():
                running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    # -- start

    async def _start(self, hello: Hello) -> Engine:
        """Find the memory nodes, cut the model over them, load it."""
        names = [n.name for n in self._config.memory_nodes]
        self._links = await asyncio.gather(*(self._find(n, hello) for n in self._config.memory_nodes))
        blueprint = await self._device.run(self._cut)
        checkpoint = blueprint.capture.checkpoint
        layers = blueprint.capture.shapes
        pipeline = self._config.pipeline
        context = self._context(checkpoint)
        kv_dtype = self._config.model.kv_dtype or checkpoint.dtype
        kept = KVLayout(layers=layers, dtype=checkpoint.dtype, block_tokens=BLOCK_TOKENS)
        divide = shard_by_heads if pipeline.partition == "heads" else shard_whole
        windows = any(layer.window is not None for layer in layers)
        if pipeline.partition == "tokens" and windows:
            raise ConfigError(
                f'{self._config.file}: pipeline.partition: "tokens" cannot be had for a model with sliding windows; '
                'use "heads" or "requests"'
            )
        tenant = f"{self._node.name}-{secrets.token_hex(8)}"
        for name, link, shard in zip(names, self._links, divide(layers, names), strict=True):
            layout = KVLayout(layers=shard.layers, dtype=kv_dtype, block_tokens=BLOCK_TOKENS)
            remote = RemoteShard(
                name,
                link,
                shard,
                layout,
                self._device,
                dtype=checkpoint.dtype,
                slots=pipeline.batches,
                max_rows=pipeline.max_batch + REMOTE_TOKENS,
            )
            self._shards.append(remote)
            await remote.attach(tenant, checkpoint.fingerprint)
        blocks = [s.capacity_tokens // BLOCK_TOKENS for s in self._shards]
        # Of one window alone: where layers have several, blocks of one kind can be in the way of the other's.
        window = layers[0].window if len(kept.groups) == 1 else None
        room = Room(blocks, BLOCK_TOKENS, pipeline.partition, stripes=not windows, window=window)
        if room.most_tokens < context:
            least = min(self._shards, key=lambda s: s.capacity_tokens)
            raise CapacityError(
                f"the memory nodes can hold {room.most_tokens} tokens of one request, fewer than the context of "
                f"{context} ({least.name} holds the least of this model's KV cache, {least.capacity_tokens} tokens of "
                f"{layout.bytes_per_token} bytes); give them more memory or set model.context lower"
            )
        model = await self._device.run(_load, blueprint, self._device.torch_device, self._config.model.compile)
        self._tokenizer = await self._device.run(Tokenizer, checkpoint.path, context)
        self._model = checkpoint.fingerprint
        self._blocks = room.blocks
        self._runner = StepRunner(model, self._device, self._shards, getattr(torch, checkpoint.dtype))
        scheduler = Scheduler(
            batches=pipeline.batches,
            max_batch=pipeline.max_batch,
            prefill_tokens=pipeline.prefill_tokens,
            room=room,
            prefix=PrefixKeys(
                model=checkpoint.fingerprint, dtype=checkpoint.dtype, kv_dtype=kv_dtype, block_tokens=BLOCK_TOKENS
            ),
            remote_tokens=REMOTE_TOKENS,
            prefill_kv=pipeline.prefill_kv_bytes // kept.bytes_per_token,
            max_waiting=pipeline.max_waiting,
        )
        if context > ANSWER_TOKENS:
            await self._fit(scheduler, self._runner, context)
        return Engine(
            self._node.name,
            self._runner,
            self._shards,
            scheduler,
            batches=pipeline.batches,
            context=context,
            vocabulary=checkpoint.vocabulary,
            stop_tokens=checkpoint.stop_tokens,
        )

    async def _fit(self, scheduler: Scheduler, runner: StepRunner, context: int) -> None:
        """Fit the cost model, while nobody else uses the memory nodes."""
        device, shards, pipeline = self._device, self._shards, self._config.pipeline

        def release(sequence: int) -> None:
            runner.forget(sequence)
            for shard in shards:
                shard.release(sequence)

        shipping = [device.start(shard.run()) for shard in shards]
        try:
            await fit(
                scheduler,
                lambda slot, number, step: device.start(runner.run(slot, number, step)),
                lambda ask: reserve(shards, ask, BLOCK_TOKENS),
                release,
                device.clock,
                slots=pipeline.batches,
                most_rows=min(pipeline.batches * pipeline.max_batch, pipeline.max_waiting),
                most_tokens=min(pipeline.prefill_tokens, context - ANSWER_TOKENS),
            )
        finally:
            for task in shipping:
                task.cancel()

    async def _find(self, node: NodeConfig, hello: Hello) -> Link:
        deadline_s = self._config.transport.start_timeout
        log.info("event=waiting peer=%s address=%s deadline_s=%g", node.name, node.address, deadline_s)
        try:
            link = await connect(node.listen, hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(f"memory node {node.name} was not there within {deadline_s:g} s: {e}") from e
        if link.peer.role != "memory":
            await link.close()
            raise HandshakeError(
                f"{node.address} should be memory node {node.name}, but a {link.peer.role} node answers"
            )
        link.lane_loop = self._device.loop
        link.on_lost = lambda _: None  # start to read; from the attach on, the shard listens
        self._waiting_for.discard(node.name)
        log.info("event=connected peer=%s transport=%s choice=%r", node.name, link.transport, link.choice)
        return link

    def _cut(self) -> Blueprint:
        with torch.inference_mode(False):
            checkpoint = Checkpoint.open(self._config.model_path, self._config.model.dtype)
            return cut_into_slices(capture(checkpoint))

    def _context(self, checkpoint: Checkpoint) -> int:
        asked, most = self._config.model.context, checkpoint.max_context
        if asked is not None and asked > most:
            raise ConfigError(f"{self._config.file}: model.context: {asked} is more than the model's {most}")
        return asked or most

    # -- links of others

    def _on_link(self, link: Link) -> None:
        self._clients = {*(known for known in self._clients if not known.closed), link}
        if link.peer.role == "client":
            link.peer_timeout = CLIENT_TIMEOUT_S
            ClientSession(link, self._device, self._ready_engine, self._ready_tokenizer, self._status)
        else:
            link.on_message = lambda plain: self._answer_monitor(link, plain)
        lost = link.on_lost

        def on_lost(error: Any) -> None:
            self._clients.discard(link)
            if lost:
                lost(error)

        link.on_lost = on_lost

    def _answer_monitor(self, link: Link, plain: dict[str, Any]) -> None:
        match decode(plain, AskStatus | Probe | Record | AskSpans):
            case AskStatus():
                answer(link, self._status())
            case Record() | AskSpans() as asked:
                answer(link, self._tracing.reply(asked))
            case Probe() as asked if len(self._probes) < MAX_PROBES:
                task = asyncio.get_running_loop().create_task(self._probe(link, asked))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            case Probe() as asked:
                answer(link, Probed(kind=asked.kind, error=f"{MAX_PROBES} measurements wait already; try again later"))

    async def _probe(self, link: Link, asked: Probe) -> None:
        """Measure, one at a time, the way to a memory node of this node's file, and to nothing else."""
        node = next((n for n in self._config.memory_nodes if n.name == asked.node), None)
        try:
            if node is None:
                raise ConfigError(f"{self._node.name} knows no memory node called {asked.node!r}")
            async with self._probing:
                probed = await measure(node.listen, self._node.name, replace(self._options, kind=asked.kind))
        except LaminaError as e:
            probed = Probed(kind=asked.kind, error=str(e))
        answer(link, probed)

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            missing = f"; it waits for {', '.join(sorted(self._waiting_for))}" if self._waiting_for else ""
            reason = f"compute node {self._node.name} is still starting{missing}; try again soon"
            raise NodeError(reason, node=self._node.name)
        return self._engine

    def _ready_tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "made before the engine"
        return self._tokenizer

    def _status(self) -> Status:
        engine, runner = self._engine, self._runner
        if engine is None or runner is None:
            waiting = sorted(self._waiting_for)
            return Status(
                name=self._node.name,
                role="compute",
                state="waiting" if waiting else "starting",
                waiting_for=", ".join(waiting),
                pid=os.getpid(),
                busy_s=self._device.busy_s,
            )
        return Status(
            name=self._node.name,
            role="compute",
            state="draining" if engine.draining else "ready",
            pid=os.getpid(),
            model=self._model,
            requests_running=engine.running,
            requests_waiting=engine.waiting,
            tokens_generated=engine.tokens,
            steps=engine.steps,
            layers=runner.layers,
            busy_s=self._device.busy_s,
            preemptions=engine.scheduler.preemptions,
            prompt_tokens=engine.scheduler.prompt_tokens,
            shared_tokens=engine.scheduler.shared_tokens,
            sequences=engine.running,
            kv_tokens_total=self._blocks * BLOCK_TOKENS,
            kv_tokens_free=engine.free_blocks * BLOCK_TOKENS,
            stale_tags=sum(s.stale_tags for s in self._shards),
            peers=[s.describe() for s in self._shards],
        )


def _load(blueprint: Blueprint, device: torch.device, compiled: bool) -> SlicedModel:
    with torch.inference_mode(False):
        weights = load_weights(blueprint.capture, blueprint.weights_of(), device)
        return SlicedModel(blueprint, weights, device, compiled=compiled)


async def _unless(stopping: asyncio.Event, work: Any) -> Any:
    """The result of ``work``, or None if ``stopping`` is set first."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stop.cancel()
        task.cancel()
