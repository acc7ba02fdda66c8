"""The compute daemon: starts, runs the engine or follows the front, serves clients, says how it is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from dataclasses import replace
from typing import Any

from lamina.attention import KVLayout
from lamina.compute.follower import Follower
from lamina.compute.peer import ComputePeer
from lamina.compute.shard import RemoteShard
from lamina.compute.step import StepRunner
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import CapacityError, ConfigError, LaminaError, NodeError
from lamina.front.blocks import Room
from lamina.front.cost import CostModel
from lamina.front.engine import Engine
from lamina.front.fit import ANSWER_TOKENS, fit
from lamina.front.prefix import PrefixKeys
from lamina.front.scheduler import Scheduler
from lamina.front.session import ClientSession
from lamina.front.space import reserve
from lamina.front.team import Team
from lamina.front.text import Tokenizer
from lamina.node.assemble import BLOCK_TOKENS, REMOTE_TOKENS, Assembly
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.monitor import Tracing
from lamina.node.probe import measure
from lamina.runtime.device import Device
from lamina.transport import Hello, Link, Listener
from lamina.wire.admin import AskSpans, AskStatus, Probe, Probed, Record, Status
from lamina.wire.codec import decode, encode
from lamina.wire.questions import answer
from lamina.wire.requests import Failed
from lamina.wire.tenants import Refused

log = logging.getLogger("lamina.compute")

MAX_PROBES = 64
"""Measurements that may wait for their turn."""

CLIENT_TIMEOUT_S = 30.0
"""Silence that is forgiven to clients, whose event loops may be busy with other things than Lamina."""


class ComputeNode:
    """The compute node ``node`` of a cluster. The first one of the file is the front: it serves clients, and tells the
    others what to do."""

    def __init__(self, config: ClusterConfig, node: NodeConfig, *, runner: type[StepRunner] = StepRunner) -> None:
        """``runner`` runs steps; benchmarks have others."""
        self._config = config
        self._node = node
        self._options = config.options(node)
        self._device = Device(node.device or "cpu", cpus=node.pinned, threads=node.threads)
        self._make_runner = runner
        self._assembly: Assembly
        self._is_front = node.name == config.front.name
        self._clients: set[Link] = set()
        self._tracing = Tracing(self._device)
        self._probing = asyncio.Lock()
        self._probes: set[asyncio.Task[None]] = set()
        self._runner: StepRunner | None = None
        self._engine: Engine | None = None
        self._follower: Follower | None = None
        self._tokenizer: Tokenizer | None = None
        self._blocks = 0

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start, serve, and when ``stopping`` is set answer what was asked before leaving."""
        self._assembly = Assembly(self._config, self._node, self._device, self._make_runner)
        hello = Hello("compute", self._node.name)
        listener = await Listener.open(self._node.listen, hello, self._on_link, self._options)
        log.info("event=listening address=%s", listener.address)
        try:
            worker = await _unless(stopping, self._start())
            if worker is not None:
                log.info(
                    "event=ready model=%s memory_nodes=%d compute_nodes=%d",
                    self._assembly.checkpoint.fingerprint,
                    len(self._config.memory_nodes),
                    len(self._config.compute_nodes),
                )
                await self._run(worker, stopping)
        except LaminaError as e:
            self._give_up(str(e))
            raise
        finally:
            await listener.close()
            for task in self._probes:
                task.cancel()
            await asyncio.gather(*(link.close() for link in [*self._clients, *self._assembly.links]))
            self._device.close()

    async def _run(self, worker: Engine | Follower, stopping: asyncio.Event) -> None:
        running = asyncio.ensure_future(worker.run())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                drained = asyncio.ensure_future(worker.drain())
                await asyncio.wait({running, drained}, timeout=DRAIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                if not drained.done() and not running.done():
                    log.warning("event=drain_timeout")
                drained.cancel()
        finally:
            stop.cancel()
            if not running.done():
                running.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await running
        except NodeError as error:
            if not (stopping.is_set() and worker is self._follower):
                raise
            log.info("event=left reason=%r", str(error))  # where all are told to stop, somebody leaves first

    def _give_up(self, reason: str) -> None:
        """Tell the other compute nodes why nothing more will come."""
        for peer in self._assembly.peers:
            peer.send(Refused(reason=reason))

    # -- start

    async def _start(self) -> Engine | Follower:
        """Find the other nodes, cut the model over them, load this node's part."""
        assembly = self._assembly
        await assembly.connect()
        await assembly.cut()
        await assembly.meet()
        await assembly.attach()
        if not self._is_front:
            self._runner = await assembly.load()
            follower = Follower(
                self._node.name, self._runner, assembly.shards, assembly.peers, assembly.front, assembly.limits()
            )
            await assembly.ready()
            self._follower = follower
            return follower
        room = self._room()
        self._runner = await assembly.load()
        self._tokenizer = await self._device.run(Tokenizer, assembly.checkpoint.path, assembly.context)
        await assembly.ready()
        self._engine = await self._make_engine(self._runner, room)
        return self._engine

    def _room(self) -> Room:
        assembly = self._assembly
        blocks = [s.capacity_tokens // BLOCK_TOKENS for s in assembly.shards]
        # Of one window alone: where layers have several, blocks of one kind can be in the way of the other's.
        group, *others = assembly.layout.groups
        window = None if others else group.window
        partition, stripes = self._config.pipeline.partition, not assembly.has_windows
        room = Room(blocks, BLOCK_TOKENS, partition, stripes=stripes, window=window)
        if room.most_tokens < assembly.context:
            least = min(assembly.shards, key=lambda s: s.capacity_tokens)
            raise CapacityError(
                f"the memory nodes can hold {room.most_tokens} tokens of one request, fewer than the context of "
                f"{assembly.context} ({least.name} holds the least of this model's KV cache, {least.capacity_tokens} "
                f"tokens of {assembly.layout.bytes_per_token} bytes); give them more memory or set model.context lower"
            )
        self._blocks = room.blocks
        return room

    async def _make_engine(self, runner: StepRunner, room: Room) -> Engine:
        assembly, pipeline = self._assembly, self._config.pipeline
        checkpoint, layers = assembly.checkpoint, assembly.blueprint.capture.shapes
        kept = KVLayout(layers=layers, dtype=checkpoint.dtype, block_tokens=BLOCK_TOKENS)
        scheduler = Scheduler(
            batches=pipeline.batches,
            max_batch=pipeline.max_batch,
            prefill_tokens=pipeline.prefill_tokens,
            room=room,
            prefix=PrefixKeys(
                model=checkpoint.fingerprint,
                dtype=checkpoint.dtype,
                kv_dtype=assembly.kv_dtype,
                block_tokens=BLOCK_TOKENS,
            ),
            remote_tokens=REMOTE_TOKENS,
            prefill_kv=pipeline.prefill_kv_bytes // kept.bytes_per_token,
            keep_chunks=assembly.schedule.is_settled,
            max_waiting=pipeline.max_waiting,
            cost=CostModel(compute_nodes=assembly.schedule.nodes),
        )
        team = Team(runner, assembly.peers)
        if assembly.context > ANSWER_TOKENS:
            await self._fit(scheduler, team)
        return Engine(
            self._node.name,
            team,
            assembly.shards,
            scheduler,
            batches=pipeline.batches,
            context=assembly.context,
            vocabulary=checkpoint.vocabulary,
            stop_tokens=checkpoint.stop_tokens,
        )

    async def _fit(self, scheduler: Scheduler, team: Team) -> None:
        """Fit the cost model, while nobody else uses the nodes."""
        device, shards, pipeline = self._device, self._assembly.shards, self._config.pipeline

        def release(sequence: int) -> None:
            team.forget([sequence])
            for shard in shards:
                shard.release(sequence)

        shipping = [device.start(shard.run()) for shard in shards]
        try:
            await fit(
                scheduler,
                lambda slot, number, step: device.start(team.run(slot, number, step)),
                lambda ask: reserve(shards, ask, BLOCK_TOKENS),
                release,
                device.clock,
                slots=pipeline.batches,
                most_rows=min(pipeline.batches * pipeline.max_batch, pipeline.max_waiting),
                most_tokens=min(pipeline.prefill_tokens, self._assembly.context - ANSWER_TOKENS),
            )
        finally:
            for task in shipping:
                task.cancel()

    # -- links of others

    def _on_link(self, link: Link) -> None:
        if link.info.peer.role == "compute":
            if not self._assembly.greet(link):
                link.abort(f"compute node {link.info.peer.name} was not expected")
            return
        self._clients = {*(known for known in self._clients if not known.state.closed), link}
        if link.info.peer.role == "client" and not self._is_front:
            front = self._config.front
            refusal = f"{self._node.name} is not the front; clients talk to {front.name} at {front.address}"
            link.send(encode(Failed(kind="RequestError", message=refusal)))
            link.deliver(on_lost=lambda _: self._clients.discard(link))
        elif link.info.peer.role == "client":
            link.deliver(peer_timeout=CLIENT_TIMEOUT_S)
            ended = functools.partial(self._clients.discard, link)
            ClientSession(link, self._device, self._ready_engine, self._ready_tokenizer, self._status, ended)
        else:
            link.deliver(
                on_message=lambda plain: self._answer_monitor(link, plain),
                on_lost=lambda _: self._clients.discard(link),
            )

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
            waiting = sorted(self._assembly.waiting_for)
            missing = f"; it waits for {', '.join(waiting)}" if waiting else ""
            reason = f"compute node {self._node.name} is still starting{missing}; try again soon"
            raise NodeError(reason, node=self._node.name)
        return self._engine

    def _ready_tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "made before the engine"
        return self._tokenizer

    def _status(self) -> Status:
        assembly, worker, runner = self._assembly, self._engine or self._follower, self._runner
        status = Status(name=self._node.name, role="compute", state="starting", pid=os.getpid())
        status.busy_s = self._device.busy_s
        if worker is None or runner is None:
            if waiting := sorted(assembly.waiting_for):
                status.state, status.waiting_for = "waiting", ", ".join(waiting)
            return status
        status.state = "draining" if worker.draining else "ready"
        status.model = assembly.checkpoint.fingerprint
        status.steps, status.layers = worker.steps, runner.layers
        ways: list[RemoteShard | ComputePeer] = [*assembly.shards, *assembly.peers]
        status.stale_tags = sum(way.stale_tags for way in ways)
        status.peers = [way.describe() for way in ways]
        if (engine := self._engine) is not None:
            status.requests_running = status.sequences = engine.running
            status.requests_waiting = engine.waiting
            status.tokens_generated = engine.tokens
            status.preemptions = engine.scheduler.preemptions
            status.prompt_tokens = engine.scheduler.prompt_tokens
            status.shared_tokens = engine.scheduler.shared_tokens
            status.kv_tokens_total = self._blocks * BLOCK_TOKENS
            status.kv_tokens_free = engine.free_blocks * BLOCK_TOKENS
        return status


async def _unless(stopping: asyncio.Event, work: Any) -> Any:
    """The result of ``work``, or None if ``stopping`` is set first."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() and not stopping.is_set() else None
    finally:
        stop.cancel()
        task.cancel()
