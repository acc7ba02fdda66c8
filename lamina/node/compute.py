"""The compute daemon starts, runs the engine or follows the front, serves clients, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import torch
from prometheus_client.metrics_core import Metric

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import StepRunner, Steps
from lamina.config import ClusterConfig, ComputeNodeConfig, format_range
from lamina.errors import LaminaError, NodeError, TransportError, first_error
from lamina.front.answers import AnswerKeeper
from lamina.front.constraints import Constraints
from lamina.front.encoder import Encoder
from lamina.front.intake import Intake
from lamina.front.journal import RequestJournal
from lamina.front.members import Change, Members
from lamina.front.session import ClientSession
from lamina.front.team import Formation
from lamina.model.tokenizer import Tokenizer
from lamina.node.admission import Admission, Door
from lamina.node.assemble import TenantKey
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.drains import Drains
from lamina.node.enlistment import Enlistment
from lamina.node.front import Front, make_blocks, open_front
from lamina.node.journal import open_journal
from lamina.node.member_times import MemberTimes
from lamina.node.metrics import of_front, of_status, served
from lamina.node.model import BLOCK_TOKENS, OpenModel, ServedModel, open_checkpoint, serve_model
from lamina.node.monitor import CALLER_TIMEOUT_S, Monitor
from lamina.node.neighbours import Control, Neighbours
from lamina.node.roster import Roster
from lamina.node.tracing import RequestTraces, open_traces
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.runtime.workers import BackgroundWorkers, ParallelWorkers
from lamina.transport import Hello, Link
from lamina.wire.admin import Drain, Draining, Status
from lamina.wire.codec import encode
from lamina.wire.members import MemberEntry
from lamina.wire.orders import GaveUp, Membership
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
    process that it lives in, by default this one. ``entries`` are the members as the front has told them to a node that
    the file does not name, by default those of the file.
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
        entries: Sequence[MemberEntry] | None = None,
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
        self._journal_workers = BackgroundWorkers()
        self._mask_workers = ParallelWorkers()
        self._members = Members(entries or Members.of_nodes(config.node), self._members_changed)
        self._member = self._members.id_of(node.name)
        self._is_front = node.name == config.front.name
        self._door = Door(config, node.name)
        self._monitor = Monitor(
            node.name,
            device,
            network,
            self._options,
            self._status,
            {n.name: n.address for n in config.memory_nodes},
            self._drain if self._is_front else None,
            self._door.ask,
        )
        self._times: MemberTimes
        self._neighbours: Neighbours
        self._clients: dict[Link, None] = {}
        self._served: ServedModel | None = None
        self._runner: Steps | None = None
        self._roster: Roster | None = None
        self._front: Front | None = None
        self._drains: Drains | None = None
        self._enlistment: Enlistment | None = None
        self._answers = AnswerKeeper(node.name, config.recovery.lease)
        self._journal: RequestJournal | None = None
        self._encoder: Encoder | None = None
        self._traces: RequestTraces | None = None
        self._loss: NodeError | None = None
        """The first loss of a node during the start of the front."""
        self._lost = asyncio.Event()
        self._is_ready = False
        self._running: asyncio.Future[None] | None = None
        """What a follower does from its start on."""
        self._formation = Formation(0, None, {}, {}, frozenset())

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start and serve; when ``stopping`` is set, finish all requests and leave."""
        self._device.start()
        self._home = Crossing(asyncio.get_running_loop())
        self._times = MemberTimes(self._members)
        self._neighbours = Neighbours(
            self._config, self._node, self._members, self._device, self._network, self._found, self._node_lost
        )
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
                    len(self._members.of_role("memory")),
                    len(self._members.of_role("compute")),
                )
                self._is_ready = True
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
            await self._door.close()
            if self._drains is not None:
                await self._drains.close()
            if self._roster is not None:
                await self._roster.close()
                if stopping.is_set():
                    self._roster.detach()
            await asyncio.gather(*(link.close() for link in self._clients), self._neighbours.close())
            self._answers.close()
            if self._journal is not None:
                await self._journal.close()
            self._device.close()
            self._workers.close()
            self._journal_workers.close()
            self._mask_workers.close()
            self._neighbours.free()

    async def _run(self, worker: Intake | Enlistment, stopping: asyncio.Event) -> None:
        running = self._running or asyncio.ensure_future(worker.run())
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
        with contextlib.suppress(asyncio.CancelledError):
            await running

    def _give_up(self, error: LaminaError) -> None:
        """Tell the other compute nodes and the clients why nothing more will come."""
        for peer in self._neighbours.peers.values():
            peer.send(GaveUp(reason=str(error)))
        blamed = getattr(error, "node", self._name)
        reason = str(error) if blamed != self._name else f"compute node {self._name} failed: {error}"
        for link in self._clients:
            if link.info.peer.role == "client" and not link.state.closed:
                link.send(encode(Failed(kind="NodeError", message=reason, node=blamed)))

    # -- members

    def _found(self, control: Control) -> None:
        """There is a link to another node."""
        if isinstance(control, PeerControl) and control.member == self._members.id_of(self._config.front.name):
            control.on_members = self._adopt
        if (side := self._roster or self._enlistment) is not None:
            side.found(control)

    def _node_lost(self, member: int, error: NodeError) -> None:
        """The link to another node has ended. During the start of the front that ends the start."""
        if self._is_front and not self._is_ready and self._loss is None:
            self._loss = error
            self._lost.set()
        if (side := self._roster or self._enlistment) is not None:
            side.lost(member, error)

    def _adopt(self, told: Membership) -> None:
        """Take over what the front says of the members. Raises ConfigError if it has another file."""
        self._members.adopt(told, fixed=(self._member, self._members.id_of(self._config.front.name)))
        self._neighbours.know(self._members.entries)
        if self._enlistment is not None:
            self._enlistment.members_changed()

    def _members_changed(self, changes: list[Change]) -> None:
        """Handle every change of membership; no other function does."""
        self._times.note()
        if self._roster is not None:
            self._roster.changed()

    def _formed(self, formation: Formation, lost: frozenset[int]) -> None:
        """Run the steps that begin from now on with other members."""
        assert self._roster is not None
        shards = {m: shard.lane for m, shard in sorted(self._roster.serving.items())}
        peers = {m: peer.lane for m, peer in formation.peers.items()}
        self._formation = formation
        if self._runner is not None:
            self._there.post(self._runner.reform, formation.schedule, shards, peers)
        if self._front is not None:
            self._there.post(self._front.engine.changed, formation, lost)

    def _settled(self) -> None:
        if self._front is not None:
            self._there.post(self._front.engine.settle)

    def _stranded(self, error: NodeError) -> None:
        if self._front is not None:
            self._there.post(self._front.engine.strand, error)

    # -- start

    async def _start_unless(self, stopping: asyncio.Event) -> Intake | Enlistment | None:
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
            peers = {n.name for n in self._config.compute_nodes} - {error.node, self._name}
            if self._loss is not None and self._loss.node in peers:
                raise self._loss from error  # memory nodes refuse what is left of a tenant when its front is gone
            raise
        finally:
            for task in (start, *ends):
                task.cancel()

    async def _start(self) -> Intake | Enlistment:
        """Open the model and find the other nodes, cut it over them, load this node's part, and begin to serve."""
        config, members = self._config, self._members
        log.info("event=opening model=%s", config.model_path, extra={"progress": "reading the model"})
        opening = self._there.start(self._device.run(self._open_model, config))
        # The front tells another compute node with which nodes it works.
        front = members.id_of(config.front.name)
        awaited = [entry.id for entry in members.entries if entry.id != front] if self._is_front else [front]
        meeting = asyncio.ensure_future(self._neighbours.meet(awaited))
        try:  # what is wrong with the model is said at once, also where other nodes are missing
            (source, _), _ = await asyncio.gather(opening, meeting)
        finally:
            meeting.cancel()
        self._served = served = serve_model(config, members, source)
        worker = await (self._start_front(served) if self._is_front else self._start_follower(served))
        if self._loss is not None:  # a node that was lost meanwhile
            raise self._loss
        return worker

    async def _start_front(self, served: ServedModel) -> Intake:
        config, members = self._config, self._members
        self._journal = journal = open_journal(config, served, self._host, self._journal_workers)
        kept = await journal.open(self._workers) if journal is not None else []
        key = TenantKey.of(config, served.facts.fingerprint)
        self._roster = roster = Roster(config, served, members, self._neighbours, member=self._member, key=key)
        roster.on_formed, roster.on_settled, roster.on_stranded = self._formed, self._settled, self._stranded
        completing = asyncio.ensure_future(roster.complete())
        try:
            self._runner = await self._make_steps(served)
            tokenizer = await self._there.call(Tokenizer, served.facts.path, served.context)
            self._encoder = Encoder(tokenizer)
            await completing
        finally:
            completing.cancel()
        blocks = make_blocks(config, served, roster.serving)
        log.info("event=fitting", extra={"progress": "measuring steps"})
        self._formed(self._formation, frozenset())
        front = await open_front(
            config,
            served,
            members,
            blocks,
            self._runner,
            self._device,
            roster.serving,
            self._formation,
            self._home,
            self._host.random,
            Constraints(self._workers, tokenizer, served.facts.vocabulary, served.facts.stop_tokens),
            self._mask_workers,
            journal,
        )
        front.intake.on_suspect, roster.on_superseded = roster.suspect, front.intake.fail
        if (traces := open_traces(self._name)) is not None:
            self._traces = traces
            front.intake.meter.on_end = traces.ended
        self._front = front
        self._drains = drains = Drains(config, served, members, roster, front.engine, self._there)
        self._door.open(Admission(config, served, members, roster, drains, blocks, self._there, self._network))
        self._answers.open(front.intake, tokenizer, kept)
        if kept:
            log.info("event=restored requests=%d", len(kept))
        return front.intake

    async def _start_follower(self, served: ServedModel) -> Enlistment:
        async def make_steps() -> Steps:
            self._runner = await self._make_steps(served)
            return self._runner

        self._enlistment = enlistment = Enlistment(
            self._config,
            served,
            self._members,
            self._neighbours,
            self._there,
            name=self._name,
            make_steps=make_steps,
        )
        self._running = running = asyncio.ensure_future(enlistment.run())
        ready = asyncio.ensure_future(enlistment.ready())
        try:
            await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            ready.cancel()
            if not enlistment.is_ready:
                running.cancel()
        return enlistment

    async def _make_steps(self, served: ServedModel) -> Steps:
        slices = served.schedule.slices(self._member)
        log.info("event=loading slices=%s", format_range(slices), extra={"progress": "loading weights"})
        forward, _ = await self._there.start(self._device.run(served.source.load, slices, self._device.torch_device))
        dtype = getattr(torch, served.facts.dtype)
        return self._make_runner(forward, self._device, dtype, member=self._member)

    # -- links of others

    def _on_link(self, link: Link) -> None:
        role = link.info.peer.role
        if role == "compute":
            if not self._neighbours.greet(link):
                link.abort(f"no link was expected from compute node {link.info.peer.name}")
            return
        self._clients = {known: None for known in (*self._clients, link) if not known.state.closed}
        if role == "client" and not self._is_front:
            front = self._config.front
            refusal = f"{self._name} is not the front; clients talk to {front.name} at {front.address}"
            link.send(encode(Failed(kind="RequestError", message=refusal)))
            link.deliver()
        elif role == "client":
            session = ClientSession(
                link, self._workers, self._answers, self.intake, self._ready_encoder, self._status_now
            )

            def on_lost(error: TransportError) -> None:
                self._clients.pop(link, None)
                session.on_lost(error)

            link.deliver(on_message=session.on_message, on_lost=on_lost, peer_timeout=CALLER_TIMEOUT_S)
        else:
            self._monitor.take(link)

    def intake(self) -> Intake:
        """Return the intake of this node; raise NodeError while the node is starting, or if it is not the front."""
        if self._front is None:
            waiting = self._neighbours.waiting_for
            missing = f"; it waits for {', '.join(waiting)}" if waiting else ""
            reason = f"compute node {self._name} is still starting{missing}; try again soon"
            raise NodeError(reason, node=self._name)
        return self._front.intake

    def _ready_encoder(self) -> Encoder:
        assert self._encoder is not None, "made before the front"
        return self._encoder

    @property
    def _ways(self) -> list[ShardControl | PeerControl]:
        """Return what leads to the other nodes that serve."""
        neighbours = self._neighbours
        attached = [shard for shard in neighbours.shards.values() if shard.is_attached]
        return [*attached, *(peer for peer in neighbours.peers.values() if peer.is_open)]

    # -- status

    async def _status(self) -> Status:
        return self._status_now()

    async def _drain(self, asked: Drain) -> Draining:
        if self._drains is None or not self._is_ready:
            return Draining(error=f"compute node {self._name} is still starting; try again soon")
        return await self._drains.ask(asked)

    def reload(self) -> None:
        """Read the cluster file again, on the front that serves: see `lamina.node.admission.Admission.reload`."""
        self._door.reload()

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus gets at this moment."""
        status = self._status_now()
        return of_status(status) + (of_front(status, self._front.intake.meter) if self._front else [])

    def _status_now(self) -> Status:
        pid = self._host.pid
        status = Status(name=self._name, role="compute", state="starting", pid=pid, busy_s=self._device.busy_s)
        status.epoch = self._members.epoch
        status.members = self._times.describe() if self._is_front else []
        runner, worker = self._runner, self._front.intake if self._front else self._enlistment
        if worker is None or runner is None or not self._is_ready:
            if waiting := self._neighbours.waiting_for:
                status.state, status.waiting_for = "waiting", ", ".join(waiting)
            return status
        assert self._served is not None
        status.state = "draining" if worker.draining else "ready"
        missing = self._enlistment.missing if self._enlistment else self._roster.missing if self._roster else []
        if missing:
            status.state, status.waiting_for = "waiting", ", ".join(missing)
        status.model = self._served.facts.fingerprint
        status.layers = runner.layers
        status.stale_tags = sum(way.lane.stale_tags for way in self._ways)
        status.peers = [way.describe() for way in self._ways]
        if self._enlistment is not None:
            status.steps = self._enlistment.steps
        if self._front is not None:
            counters = self._front.intake.counters
            status.steps = counters.steps
            status.requests_running = status.sequences = counters.running
            status.requests_waiting = counters.waiting
            status.tokens_generated = counters.tokens
            status.preemptions = counters.preemptions
            status.prompt_tokens = counters.prompt_tokens
            status.shared_tokens = counters.shared_tokens
            status.moves, status.failed_moves = counters.moves, counters.failed_moves
            status.moved_bytes = counters.moved_blocks * BLOCK_TOKENS * self._served.bytes_per_token
            status.redirections = counters.redirections
            status.requests_resumed = self._front.intake.meter.resumed
            status.kv_tokens_total = counters.blocks * BLOCK_TOKENS
            status.kv_tokens_free = counters.free_blocks * BLOCK_TOKENS
        if (journal := self._journal) is not None:
            status.journal = self._config.recovery.journal
            status.journal_bytes = journal.bytes
            status.journal_failure = "" if journal.failure is None else str(journal.failure)
        return status
