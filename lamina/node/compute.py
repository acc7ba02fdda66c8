"""The compute daemon starts, runs the engine or follows the front, serves clients, and leaves in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from functools import partial

import torch
from prometheus_client.metrics_core import Metric

from lamina.compute.peer_control import PeerControl
from lamina.compute.step import StepRunner, Steps
from lamina.config import ClusterConfig, ComputeNodeConfig, format_range
from lamina.errors import LaminaError, NodeError, SupersededError, first_error
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
from lamina.node.claims import Claims
from lamina.node.drains import Drains
from lamina.node.enlistment import Enlistment
from lamina.node.front import Front, describe_front, describe_journal, make_blocks, open_front
from lamina.node.journal import Standby, open_copy, open_journal, was_front
from lamina.node.member_times import MemberTimes
from lamina.node.metrics import of_front, of_status, served
from lamina.node.model import OpenModel, ServedModel, open_checkpoint, serve_model
from lamina.node.monitor import Monitor
from lamina.node.neighbours import Control, Neighbours
from lamina.node.parts import Part, StartLoss, run_part, unless
from lamina.node.quorum import Quorum
from lamina.node.reception import Reception
from lamina.node.roster import Roster
from lamina.node.succession import Heir
from lamina.node.tracing import RequestTraces, open_traces
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.runtime.workers import BackgroundWorkers, ParallelWorkers
from lamina.transport import Hello, Link
from lamina.wire.admin import Drain, Draining, Status
from lamina.wire.members import MemberEntry
from lamina.wire.orders import Claim, GaveUp, Records

log = logging.getLogger("lamina.compute")

MakeRunner = Callable[..., Steps]
"""Makes what runs the steps of a node, as `StepRunner` does."""


class ComputeNode:
    """Runs the compute node ``node`` of a cluster. One of them is the front: it serves clients, and orders the others
    to run steps. That is the first one in the file, until another one takes its part as it is lost.

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
        self._first = self._members.id_of(config.front.name)
        self._has_joined, self._leads = entries is not None, self._member == self._first
        """Whether no file names this node; whether it is the front, or is to be it as soon as it has started."""
        self._claims = Claims(config, self._members, member=self._member, tell=self._tell)
        self._succeeds = False
        """Whether this node was a front before it started."""
        self._awaited: Collection[int] = frozenset(entry.id for entry in self._members.entries)
        """The nodes without which this one does not start as the front."""
        self._door = Door(lambda: None if self._leads else self._claims.refusal)
        ways, asked = {n.name: n.address for n in config.memory_nodes}, (self._drain, self._door.ask)
        self._monitor = Monitor(node.name, device, network, self._options, self._status, ways, *asked)
        self._times: MemberTimes
        self._neighbours: Neighbours
        self._reception = Reception(self._monitor, self._open_session, lambda: self._claims.refusal)
        self._standby: Standby | None = None
        self._served: ServedModel | None = None
        self._runner: Steps | None = None
        self._roster: Roster | None = None
        self._front: Front | None = None
        self._drains: Drains | None = None
        self._enlistment: Enlistment | None = None
        self._answers = AnswerKeeper(node.name, config.recovery.lease)
        self._journal: RequestJournal | None = None
        self._encoder: Encoder
        """It is made before the front."""
        self._traces: RequestTraces | None = None
        self._loss = StartLoss()
        self._is_ready = False
        self._running: asyncio.Future[None] | None = None
        """What a follower does from its start on."""
        self._superseded: asyncio.Future[None]
        """Raises the error that ends this node, as another one has the front's part."""
        self._formation = Formation(0, None, {}, {}, frozenset())

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start and serve; when ``stopping`` is set, finish all requests and leave."""
        self._device.start()
        config, loop = self._config, asyncio.get_running_loop()
        self._home, self._superseded = Crossing(loop), loop.create_future()
        self._times = MemberTimes(self._members)
        self._neighbours = Neighbours(
            config, self._node, self._members, self._device, self._network, self._found, self._node_lost
        )
        hello = Hello("compute", self._name, {"journal": config.recovery.journal})
        listening = await self._network.listen(self._node.bind, hello, self._on_link, self._options)
        log.info("event=listening address=%s", listening.address)
        watching = AsyncExitStack()
        try:
            await watching.enter_async_context(served(self._node.metrics, self.metrics))
            peers = [node.name for node in config.compute_nodes if node is not self._node]
            part = await self._loss.end(self._start(), stopping, peers)
            if part is not None:
                assert self._served is not None
                counts = len(self._members.of_role("memory")), len(self._members.of_role("compute"))
                model = self._served.facts.fingerprint
                log.info("event=ready model=%s memory_nodes=%d compute_nodes=%d", model, *counts)
                self._is_ready = True
                await self._run(part, stopping)
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
            if self._enlistment is not None:
                await self._enlistment.release()
            await self._door.close()
            if self._drains is not None:
                await self._drains.close()
            if self._roster is not None:
                await self._roster.close(detach=stopping.is_set())
            await asyncio.gather(self._reception.close(), self._neighbours.close())
            self._answers.close()
            if self._journal is not None:
                await self._journal.close()
            self._device.close()
            for workers in (self._workers, self._journal_workers, self._mask_workers):
                workers.close()
            self._neighbours.free()

    async def _run(self, part: Part, stopping: asyncio.Event) -> None:
        """Serve in one part after the other, until told to stop."""
        while True:
            running, self._running = self._running or asyncio.ensure_future(part.run()), None
            await run_part(part, running, stopping, self._superseded)
            if stopping.is_set() or not isinstance(part, Enlistment):
                return
            if (changed := await unless(stopping, self._succeed(part))) is None:
                return
            part = changed

    def _give_up(self, error: LaminaError) -> None:
        """Tell the other compute nodes and the clients why nothing more will come."""
        for peer in self._neighbours.peers.values():
            peer.send(GaveUp(reason=str(error)))
        self._reception.fail(error, self._name)

    # -- members

    def _found(self, control: Control) -> None:
        """There is a link to another node."""
        if isinstance(control, PeerControl):
            control.on_claim = partial(self._note_claim, control)
            self._claims.greet(control)
        if (side := self._roster or self._enlistment) is not None:
            side.found(control)

    def _node_lost(self, member: int, error: NodeError) -> None:
        """The link to another node has ended. During the start of the front that ends the start."""
        if member in self._awaited and self._leads and not self._is_ready:
            self._loss.note(error)
        if (side := self._roster or self._enlistment) is not None:
            side.lost(member, error)

    def _members_changed(self, changes: list[Change]) -> None:
        """Handle every change of membership; no other function does."""
        self._times.note()
        if self._roster is not None:
            self._roster.changed()
        if self._standby is not None:
            self._standby.choose()

    # -- which node is the front

    def _tell(self, message: Claim) -> None:
        for peer in self._neighbours.peers.values():
            peer.send(message)

    def _note_claim(self, peer: PeerControl, claim: Claim) -> None:
        """Take in which node another one takes for the front."""
        if (error := self._claims.note(peer, claim)) is None:
            return
        if self._roster is not None:
            self._roster.supersede(error)
        elif self._enlistment is not None:
            self._enlistment.follow(claim.front)

    def _lead_from(self, term: int) -> None:
        """This node is the front from now on."""
        self._leads = True
        self._claims.lead(term)

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

    # -- start

    async def _start(self) -> Part:
        """Open the model and find the other nodes, cut it over them, load this node's part, and begin to serve."""
        config, members = self._config, self._members
        log.info("event=opening model=%s", config.model_path, extra={"progress": "reading the model"})
        opening = self._there.start(self._device.run(self._open_model, config))
        # The front tells another compute node with which nodes it works.
        others = [entry.id for entry in members.entries if entry.id != self._member]
        quorum = Quorum(config, members, self._neighbours, own=self._member)
        met = asyncio.ensure_future(self._neighbours.meet(others if self._leads else [self._first]))
        try:  # what is wrong with the model is said at once, also where other nodes are missing
            source, _ = await opening
            self._served = served = serve_model(config, members, source)
            self._succeeds = await self._workers.run(was_front, config, served, self._name, self._host)
            if self._succeeds and self._leads:
                self._awaited = ()
                self._loss.forgive()
                await self._claims.unless_taken(quorum.enough(served, met))
                self._awaited = frozenset((*self._neighbours.shards, *self._neighbours.peers))
            elif not self._succeeds:  # else it may be needed as the front again, where the first node is gone
                await self._claims.unless_taken(met)
        finally:
            met.cancel()
        part = await self._start_part(served)
        self._loss.check()  # for a node that was lost meanwhile
        return part

    async def _start_part(self, served: ServedModel) -> Part:
        """Begin as the front, if this is the first node of the file and no other one has its part; else follow."""
        if self._leads and not self._claims.taken.is_set():
            # What it does without other nodes is what a node does that takes the part of a front over.
            needed = frozenset(self._neighbours.shards) if self._neighbours.waiting_for else frozenset()
            try:
                return await self._lead(served, needed=needed)
            except SupersededError as error:
                if not error.holder:
                    raise
                await self._give_way(error)
        self._follow()
        enlistment = self._make_enlistment(served, succeeds=self._succeeds or self._member == self._first)
        self._running = await enlistment.begin()
        return enlistment

    async def _lead(
        self, served: ServedModel, *, copy: bytes | None = None, needed: frozenset[int] = frozenset()
    ) -> Intake:
        """Become the front of a cluster that has none: one that starts with all nodes; or, as others are missing, with
        the memory nodes ``needed``, which a front that is lost may have. There may be a ``copy`` of its journal.
        SupersededError if there is a front."""
        config, members = self._config, self._members
        self._journal = journal = open_journal(config, served, self._name, self._host, self._journal_workers)
        kept = await journal.open(self._workers, copy) if journal is not None else []
        key = TenantKey.of(config, served.facts.fingerprint)
        self._roster = roster = Roster(
            config, served, members, self._neighbours, member=self._member, key=key, term=self._claims.term
        )
        roster.on_formed, roster.on_seized = self._formed, self._lead_from
        if not needed:
            self._lead_from(self._claims.term)
        completing = asyncio.ensure_future(roster.take_over(needed) if needed else roster.complete())
        try:
            runner = await self._make_steps(served)
            tokenizer = await self._there.call(Tokenizer, served.facts.path, served.context)
            self._encoder = Encoder(tokenizer)
            await completing
        finally:
            completing.cancel()
        blocks = make_blocks(config, served, roster.serving, whole=not needed)
        if not needed:
            log.info("event=fitting", extra={"progress": "measuring steps"})
        self._formed(self._formation, frozenset())
        front = await open_front(
            config,
            self._name,
            served,
            members,
            blocks,
            runner,
            self._device,
            roster.serving,
            self._formation,
            self._home,
            self._host.random,
            Constraints(self._workers, tokenizer, served.facts.vocabulary, served.facts.stop_tokens),
            self._mask_workers,
            journal,
            fits=not needed,  # requests wait already, and nodes may come and go
        )
        front.intake.on_suspect, roster.on_superseded = roster.suspect, self._end_superseded
        roster.on_settled = lambda: self._there.post(front.engine.settle)
        roster.stranding.on_stranded = lambda error: self._there.post(front.engine.strand, error)
        if (traces := open_traces(self._name)) is not None:
            self._traces = traces
            front.intake.meter.on_end = traces.ended
        self._front = front
        self._drains = drains = Drains(config, served, members, roster, front.engine, self._there)
        self._door.open(Admission(config, served, members, roster, drains, blocks, self._there, self._network))
        self._answers.open(front.intake, tokenizer, kept)
        if kept:
            log.info("event=restored requests=%d", len(kept))
        self._standby = Standby(members, self._neighbours, journal, [node.name for node in config.compute_nodes])
        return front.intake

    def _end_superseded(self, error: NodeError) -> None:
        """Another front has this one's part. What clients have asked goes on there."""
        if not self._superseded.done():
            self._superseded.set_exception(error)
            self._superseded.exception()  # the node may be ending already

    async def _give_way(self, error: SupersededError) -> None:
        """There is another front, or will be: this node follows."""
        log.warning("event=not_front reason=%r", str(error))
        self._loss.forgive()
        assert self._roster is not None
        await self._roster.close()
        self._roster = None
        if self._journal is not None:
            await self._journal.close()
            self._journal = None
        for member in self._neighbours.shards:  # a memory node may have this front, though it has not heard so yet
            self._neighbours.renew(member)
        self._claims.give_way(error)
        self._follow()

    def _follow(self) -> None:
        """This node is not the front."""
        self._leads = False
        self._reception.send_away()

    async def _succeed(self, before: Enlistment) -> Part:
        """Take the part of the front that is lost; or go on following, if it is not."""
        assert self._served is not None
        log.warning("event=taking_over front=%s", self._claims.leader.name)
        self._claims.remember()
        copy, needed = await before.release(), before.needed
        self._enlistment = None
        try:
            intake = await self._lead(self._served, copy=copy, needed=needed)
        except SupersededError as error:
            if self._leads or not error.holder:
                raise
            await self._give_way(error)
            after = self._make_enlistment(self._served, succeeds=True)
            if copy is not None:
                after.keep(Records(kind="all", data=copy))
            return after
        log.warning("event=took_over term=%d", self._claims.term)
        return intake

    def _make_enlistment(self, served: ServedModel, *, succeeds: bool) -> Enlistment:
        key = TenantKey.of(self._config, served.facts.fingerprint)
        heir = None if self._has_joined else Heir(self._config, self._network, name=self._name, tenant=key.name)
        self._enlistment = Enlistment(
            self._config,
            served,
            self._members,
            self._neighbours,
            self._there,
            name=self._name,
            front=self._members.id_of(self._claims.leader.name),
            make_steps=lambda: self._make_steps(served),
            make_copy=lambda: open_copy(self._config, served, self._name, self._host, self._journal_workers),
            heir=heir,
            succeeds=succeeds,
        )
        return self._enlistment

    async def _make_steps(self, served: ServedModel) -> Steps:
        """Return what runs this node's slices, whose weights are loaded once."""
        if self._runner is None:
            slices, device = served.schedule.slices(self._member), self._device
            log.info("event=loading slices=%s", format_range(slices), extra={"progress": "loading weights"})
            forward, _ = await self._there.start(device.run(served.source.load, slices, device.torch_device))
            dtype = getattr(torch, served.facts.dtype)
            self._runner = self._make_runner(forward, device, dtype, member=self._member)
        return self._runner

    # -- links of others

    def _on_link(self, link: Link) -> None:
        if link.info.peer.role == "compute":
            if not self._neighbours.greet(link):
                link.abort(f"no link was expected from compute node {link.info.peer.name}")
            return
        self._reception.take(link, serves=self._leads)

    def _open_session(self, link: Link) -> ClientSession:
        return ClientSession(link, self._workers, self._answers, self.intake, lambda: self._encoder, self._status_now)

    def intake(self) -> Intake:
        """Return the intake of this node; raise NodeError while the node is starting, or if it is not the front."""
        if self._front is None:
            raise self._neighbours.still_starting()
        return self._front.intake

    # -- status

    async def _status(self) -> Status:
        return self._status_now()

    async def _drain(self, asked: Drain) -> Draining:
        if self._drains is None or not self._is_ready:
            return Draining(error=str(self._neighbours.still_starting() if self._leads else self._claims.refusal))
        return await self._drains.ask(asked)

    def reload(self) -> None:
        """Read the cluster file again, on the front that serves: see `lamina.node.admission.Admission.reload`."""
        self._door.reload()

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus gets at this moment."""
        status = self._status_now()
        return of_status(status) + (of_front(status, self._front.intake.meter) if self._front else [])

    def _status_now(self) -> Status:
        status = Status(name=self._name, role="compute", state="starting", pid=self._host.pid)
        status.busy_s, status.epoch = self._device.busy_s, self._members.epoch
        status.front = self._claims.leader.name
        status.members = self._times.describe() if self._leads else []
        runner, worker = self._runner, self._front.intake if self._front else self._enlistment
        if worker is None or runner is None or not self._is_ready:
            if waiting := self._neighbours.waiting_for:
                status.state, status.waiting_for = "waiting", ", ".join(waiting)
            return status
        status.state = "draining" if worker.draining else "ready"
        missing = self._enlistment.missing if self._enlistment else self._roster.missing if self._roster else []
        if missing:
            status.state, status.waiting_for = "waiting", ", ".join(missing)
        assert self._served is not None
        status.model = self._served.facts.fingerprint
        status.layers = runner.layers
        status.stale_tags = sum(way.lane.stale_tags for way in self._neighbours.ways)
        status.peers = [way.describe() for way in self._neighbours.ways]
        if self._enlistment is not None:
            status.steps = self._enlistment.steps
        if self._front is not None:
            describe_front(status, self._front, self._served)
        if self._journal is not None:
            describe_journal(status, self._journal, self._config.recovery)
        return status
