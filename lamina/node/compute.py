"""The compute daemon starts, runs the engine or follows the front, serves clients, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

import torch
from prometheus_client.metrics_core import Metric

from lamina.compute.follower import Follower
from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.shard_lane import ShardLane
from lamina.compute.step import StepRunner, Steps
from lamina.config import ClusterConfig, ComputeNodeConfig, format_range
from lamina.errors import LaminaError, NodeError, TransportError, first_error
from lamina.front.constraints import Constraints
from lamina.front.encoder import Encoder
from lamina.front.intake import Intake
from lamina.front.members import Change, Members, State
from lamina.front.session import ClientSession
from lamina.model.tokenizer import Tokenizer
from lamina.node.assemble import (
    Rendezvous,
    agree,
    attach,
    limits,
)
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.front import Front, make_blocks, open_front
from lamina.node.member_times import MemberTimes
from lamina.node.metrics import of_front, of_status, served
from lamina.node.model import BLOCK_TOKENS, OpenModel, ServedModel, open_checkpoint, serve_model
from lamina.node.monitor import CALLER_TIMEOUT_S, Monitor
from lamina.node.tracing import RequestTraces, open_traces
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.runtime.workers import BackgroundWorkers, ParallelWorkers
from lamina.transport import Hello, Link
from lamina.wire.admin import Status
from lamina.wire.codec import encode
from lamina.wire.orders import Enlisted, GaveUp
from lamina.wire.requests import Failed

log = logging.getLogger("lamina.compute")

BLAME_AFTER_S = 1.0
"""How long a start may go on when another node is lost, to end with a reason of its own."""

MakeRunner = Callable[..., Steps]
"""Makes what runs the steps of a node, as `StepRunner` does."""


class ComputeNode:
    """Runs the compute node ``node`` of a cluster. The first one in the file is the front: it serves clients, and
    orders the others to run steps.

    It computes on ``device`` and reaches other nodes over ``network``; ``open_model`` opens its model. ``host`` is the
    process that it lives in, by default this one.
    """

    def __init__(
        self,
        config: ClusterConfig,
        node: ComputeNodeConfig,
        *,
        device: Device,
        network: Network,
        open_model: OpenModel = open_checkpoint,
        make_runner: MakeRunner = StepRunner,
        host: Host | None = None,
    ) -> None:
        self._config = config
        self._node = node
        self._name = node.name
        self._options = config.options(node)
        self._device = device
        self._there = Crossing(device.loop)
        self._network = network
        self._open_model = open_model
        self._make_runner = make_runner
        self._host = host or Host.own()
        self._workers = BackgroundWorkers()
        self._mask_workers = ParallelWorkers()
        names = [n.name for n in config.compute_nodes], [n.name for n in config.memory_nodes]
        self._members = Members(Members.of_names(*names), self._member_changed)
        self._member = self._members.id_of(node.name)
        self._is_front = node.name == config.front.name
        self._monitor = Monitor(
            node.name, device, network, self._options, self._status, {n.name: n.address for n in config.memory_nodes}
        )
        self._times: MemberTimes
        self._rendezvous: Rendezvous
        self._shards: dict[int, ShardControl] = {}
        self._peers: Mapping[int, PeerControl] = {}
        self._clients: dict[Link, None] = {}
        self._served: ServedModel | None = None
        self._runner: Steps | None = None
        self._front: Front | None = None
        self._follower: Follower | None = None
        self._encoder: Encoder | None = None
        self._traces: RequestTraces | None = None
        self._loss: NodeError | None = None
        self._lost = asyncio.Event()

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start and serve; when ``stopping`` is set, finish all requests and leave."""
        self._device.start()
        self._home = Crossing(asyncio.get_running_loop())
        self._times = MemberTimes(self._members)
        self._rendezvous = Rendezvous(self._config, self._node, self._members, self._device, self._network)
        hello = Hello("compute", self._name)
        listening = await self._network.listen(self._node.bind, hello, self._on_link, self._options)
        log.info("event=listening address=%s", listening.address)
        watching = AsyncExitStack()
        try:
            await watching.enter_async_context(served(self._node.metrics, self.metrics))
            worker = await self._start_unless(stopping)
            if worker is not None:
                assert self._served is not None
                log.info(
                    "event=ready model=%s memory_nodes=%d compute_nodes=%d",
                    self._served.facts.fingerprint,
                    len(self._config.memory_nodes),
                    len(self._config.compute_nodes),
                )
                await self._run(worker, stopping)
        except LaminaError as e:
            self._give_up(e)
            raise
        except Exception as e:
            cause = first_error(e)
            if not isinstance(cause, LaminaError):
                log.exception("event=internal_error")
                cause = NodeError.failed("compute", self._name, cause)
            self._give_up(cause)
            raise cause from e
        finally:
            await watching.aclose()
            if self._traces is not None:
                await self._traces.close()
            await listening.close()
            self._monitor.close()
            await asyncio.gather(*(link.close() for link in [*self._clients, *self._rendezvous.links]))
            self._device.close()
            self._workers.close()
            self._mask_workers.close()
            for way in self._ways:
                way.close()

    async def _run(self, worker: Intake | Follower, stopping: asyncio.Event) -> None:
        running = asyncio.ensure_future(worker.run())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((running, stop), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                drained = asyncio.ensure_future(worker.drain())
                await asyncio.wait((running, drained), timeout=DRAIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
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
            log.info("event=left reason=%r", str(error))  # where all are told to stop, some node leaves first

    def _give_up(self, error: LaminaError) -> None:
        """Tell the other compute nodes and the clients why nothing more will come."""
        for peer in self._rendezvous.peers.values():
            peer.send(GaveUp(reason=str(error)))
        blamed = getattr(error, "node", self._name)
        reason = str(error) if blamed != self._name else f"compute node {self._name} failed: {error}"
        for link in self._clients:
            if link.info.peer.role == "client" and not link.state.closed:
                link.send(encode(Failed(kind="NodeError", message=reason, node=blamed)))

    # -- members

    def _member_changed(self, change: Change) -> None:
        """Handle every change of membership; no other function does. The loss of a member ends the work of all.

        A step that waits for the lost member fails as well, of the same error, and may be the first to end the work.
        """
        self._times.note()
        if self._is_front:
            for peer in self._peers.values():
                peer.send(self._members.membership())
        if change.after is State.LOST and self._loss is None:
            self._loss = change.error
            self._lost.set()
            self._end_with_loss()

    def _end_with_loss(self) -> None:
        worker = self._front.intake if self._front else self._follower
        if worker is not None and self._loss is not None:
            worker.fail(self._loss)

    # -- start

    async def _start_unless(self, stopping: asyncio.Event) -> Intake | Follower | None:
        """Start; None if the node is told to stop before. Raises NodeError if another node is lost before."""
        start = asyncio.ensure_future(self._start())
        ends = [asyncio.ensure_future(event.wait()) for event in (stopping, self._lost)]
        try:
            await asyncio.wait((start, *ends), return_when=asyncio.FIRST_COMPLETED)
            if self._loss is not None and not start.done():
                # The start may know better why: what it waits for fails as well.
                await asyncio.wait((start, ends[0]), timeout=BLAME_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
                if not (start.done() or stopping.is_set()):
                    raise self._loss
            return start.result() if start.done() and not stopping.is_set() else None
        except NodeError as error:
            if self._loss is not None and self._loss.node in {peer.name for peer in self._peers.values()} - {
                error.node
            }:
                raise self._loss from error  # memory nodes refuse what is left of a tenant when its front is gone
            raise
        finally:
            for task in (start, *ends):
                task.cancel()

    async def _start(self) -> Intake | Follower:
        """Open the model and find the other nodes, cut it over them, load this node's part, and begin to serve."""
        config, members = self._config, self._members
        log.info("event=opening model=%s", config.model_path, extra={"progress": "reading the model"})
        opening = self._there.start(self._device.run(self._open_model, config))
        meeting = asyncio.ensure_future(self._rendezvous.all())
        try:  # what is wrong with the model is said at once, also where other nodes are missing
            (source, _), (self._shards, self._peers) = await asyncio.gather(opening, meeting)
        finally:
            meeting.cancel()
        self._served = served = serve_model(config, members, source)
        await agree(config, served, self._peers)
        worker = await (self._start_front(served) if self._is_front else self._start_follower(served))
        self._end_with_loss()  # a node that was lost meanwhile
        return worker

    async def _start_front(self, served: ServedModel) -> Intake:
        config, members = self._config, self._members
        tenant = f"{self._name}-{self._host.random.getrandbits(64):016x}"
        lanes = await attach(config, served, members, self._member, tenant, self._shards)
        enlisted = [peer.enlist(tenant) for peer in self._peers.values()]
        blocks = make_blocks(config, served, self._shards)
        self._runner = runner = await self._make_steps(served, lanes)
        tokenizer = await self._there.call(Tokenizer, served.facts.path, served.context)
        self._encoder = Encoder(tokenizer)
        await asyncio.gather(*enlisted)
        for entry in members.entries:
            members.serve(entry.id)
        log.info("event=fitting", extra={"progress": "measuring steps"})
        self._front = await open_front(
            config,
            served,
            members,
            blocks,
            runner,
            self._device,
            self._shards,
            self._peers,
            self._home,
            self._host.random,
            Constraints(self._workers, tokenizer, served.facts.vocabulary, served.facts.stop_tokens),
            self._mask_workers,
        )
        if (traces := open_traces(self._name)) is not None:
            self._traces = traces
            self._front.intake.meter.on_end = traces.ended
        return self._front.intake

    async def _start_follower(self, served: ServedModel) -> Follower:
        config, members = self._config, self._members
        front = self._peers[members.id_of(config.front.name)]
        lanes = await attach(config, served, members, self._member, await front.tenant(), self._shards)
        self._runner = runner = await self._make_steps(served, lanes)
        self._follower = Follower(
            self._name, runner, self._there, front, limits(config, served, members), lambda: members.epoch
        )
        front.send(Enlisted())
        return self._follower

    async def _make_steps(self, served: ServedModel, lanes: Mapping[int, ShardLane]) -> Steps:
        slices = served.schedule.slices(self._member)
        log.info("event=loading slices=%s", format_range(slices), extra={"progress": "loading weights"})
        forward, _ = await self._there.start(self._device.run(served.source.load, slices, self._device.torch_device))
        return self._make_runner(
            forward,
            self._device,
            lanes,
            getattr(torch, served.facts.dtype),
            schedule=served.schedule,
            member=self._member,
            peers={member: peer.lane for member, peer in self._peers.items()},
        )

    # -- links of others

    def _on_link(self, link: Link) -> None:
        role = link.info.peer.role
        if role == "compute":
            if not self._rendezvous.greet(link):
                link.abort(f"no link was expected from compute node {link.info.peer.name}")
            return
        self._clients = {known: None for known in (*self._clients, link) if not known.state.closed}
        if role == "client" and not self._is_front:
            front = self._config.front
            refusal = f"{self._name} is not the front; clients talk to {front.name} at {front.address}"
            link.send(encode(Failed(kind="RequestError", message=refusal)))
            link.deliver()
        elif role == "client":
            session = ClientSession(link, self._workers, self.intake, self._ready_encoder, self._status_now)

            def on_lost(error: TransportError) -> None:
                self._clients.pop(link, None)
                session.on_lost(error)

            link.deliver(on_message=session.on_message, on_lost=on_lost, peer_timeout=CALLER_TIMEOUT_S)
        else:
            self._monitor.take(link)

    def intake(self) -> Intake:
        """Return the intake of this node; raise NodeError while the node is starting, or if it is not the front."""
        if self._front is None:
            waiting = sorted(self._rendezvous.waiting_for)
            missing = f"; it waits for {', '.join(waiting)}" if waiting else ""
            reason = f"compute node {self._name} is still starting{missing}; try again soon"
            raise NodeError(reason, node=self._name)
        return self._front.intake

    def _ready_encoder(self) -> Encoder:
        assert self._encoder is not None, "made before the front"
        return self._encoder

    @property
    def _ways(self) -> list[ShardControl | PeerControl]:
        """Return what leads to the other nodes."""
        return [*self._shards.values(), *self._peers.values()]

    # -- status

    async def _status(self) -> Status:
        return self._status_now()

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus gets at this moment."""
        status = self._status_now()
        return of_status(status) + (of_front(status, self._front.intake.meter) if self._front else [])

    def _status_now(self) -> Status:
        pid = self._host.pid
        status = Status(name=self._name, role="compute", state="starting", pid=pid, busy_s=self._device.busy_s)
        status.epoch = self._members.epoch
        status.members = self._times.describe() if self._is_front else []
        runner, worker = self._runner, self._front.intake if self._front else self._follower
        if worker is None or runner is None:
            if waiting := sorted(self._rendezvous.waiting_for):
                status.state, status.waiting_for = "waiting", ", ".join(waiting)
            return status
        assert self._served is not None
        status.state = "draining" if worker.draining else "ready"
        status.model = self._served.facts.fingerprint
        status.layers = runner.layers
        status.stale_tags = sum(way.lane.stale_tags for way in self._ways)
        status.peers = [way.describe() for way in self._ways]
        if self._follower is not None:
            status.steps = self._follower.steps
        if self._front is not None:
            counters = self._front.intake.counters
            status.steps = counters.steps
            status.requests_running = status.sequences = counters.running
            status.requests_waiting = counters.waiting
            status.tokens_generated = counters.tokens
            status.preemptions = counters.preemptions
            status.prompt_tokens = counters.prompt_tokens
            status.shared_tokens = counters.shared_tokens
            status.kv_tokens_total = self._front.kv_tokens
            status.kv_tokens_free = counters.free_blocks * BLOCK_TOKENS
        return status
