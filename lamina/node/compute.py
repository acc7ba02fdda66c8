"""The compute daemon starts, runs the engine or follows the front, serves clients, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import torch
from prometheus_client.metrics_core import Metric

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import StepRunner, Steps
from lamina.config import ClusterConfig, ComputeNodeConfig, NodeConfig, format_range
from lamina.errors import (
    LaminaError,
    NodeError,
    NotFrontError,
    ProtocolError,
    SupersededError,
    TransportError,
    first_error,
)
from lamina.front.answers import AnswerKeeper
from lamina.front.constraints import Constraints
from lamina.front.encoder import Encoder
from lamina.front.intake import Intake
from lamina.front.journal import RequestJournal
from lamina.front.members import Change, Members, State
from lamina.front.session import ClientSession
from lamina.front.team import Formation
from lamina.model.tokenizer import Tokenizer
from lamina.node.assemble import TenantKey
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.drains import Drains
from lamina.node.enlistment import Enlistment
from lamina.node.front import Front, make_blocks, open_front
from lamina.node.journal import open_copy, open_journal, was_front
from lamina.node.member_times import MemberTimes
from lamina.node.metrics import of_front, of_status, served
from lamina.node.model import BLOCK_TOKENS, OpenModel, ServedModel, open_checkpoint, serve_model
from lamina.node.monitor import CALLER_TIMEOUT_S, Monitor
from lamina.node.neighbours import Control, Neighbours
from lamina.node.roster import Roster
from lamina.node.succession import Succession
from lamina.node.tracing import RequestTraces, open_traces
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.runtime.workers import BackgroundWorkers, ParallelWorkers
from lamina.transport import Hello, Link
from lamina.wire.admin import Drain, Draining, Status
from lamina.wire.codec import encode
from lamina.wire.orders import Claim, Enlist, GaveUp, Membership, Records
from lamina.wire.questions import send_unless_gone
from lamina.wire.requests import Failed

log = logging.getLogger("lamina.compute")

BLAME_AFTER_S = 1.0
"""How long a start may go on when another node is lost, to end with a reason of its own."""

MakeRunner = Callable[..., Steps]
"""Makes what runs the steps of a node, as `StepRunner` does."""


class ComputeNode:
    """Runs the compute node ``node`` of a cluster. One of them is the front: it serves clients, and orders the others
    to run steps. That is the first one in the file, until another one takes its part as it is lost.

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
        self._journal_workers = BackgroundWorkers()
        self._mask_workers = ParallelWorkers()
        names = [n.name for n in config.compute_nodes], [n.name for n in config.memory_nodes]
        self._members = Members(Members.of_names(*names), self._members_changed)
        self._member = self._members.id_of(node.name)
        self._first = self._members.id_of(config.front.name)
        self._leads = self._member == self._first
        """Whether this node is the front, or is to be it as soon as it has started."""
        self._claim: Claim | None = None
        """The last that is known of which node is the front."""
        self._term = 0
        """The latest term of a front that is known, besides those of the members."""
        self._claimed = asyncio.Event()
        """Set when another node has the front's part, or this one need not wait for the first one in the file."""
        self._succeeds = False
        """Whether this node was a front before it started."""
        self._standby: PeerControl | None = None
        """The compute node that takes this front's part if it is lost."""
        self._monitor = Monitor(
            node.name,
            device,
            network,
            self._options,
            self._status,
            {n.name: n.address for n in config.memory_nodes},
            self._drain,
        )
        self._times: MemberTimes
        self._neighbours: Neighbours
        self._clients: dict[Link, ClientSession | None] = {}
        """The links of clients and operators."""
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
        self._superseded: asyncio.Future[None]
        """Raises the error that ends this node, as another one has the front's part."""
        self._formation = Formation(0, None, {}, {}, frozenset())

    async def serve(self, stopping: asyncio.Event) -> None:
        """Start and serve; when ``stopping`` is set, finish all requests and leave."""
        self._device.start()
        loop = asyncio.get_running_loop()
        self._home, self._superseded = Crossing(loop), loop.create_future()
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
                    len(self._config.memory_nodes),
                    len(self._config.compute_nodes),
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
            if self._enlistment is not None:
                await self._enlistment.release()
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
        """Serve in one part after the other, until told to stop."""
        await self._run_part(worker, stopping)
        while isinstance(worker, Enlistment) and not stopping.is_set():
            changing = asyncio.ensure_future(self._succeed(worker))
            stop = asyncio.ensure_future(stopping.wait())
            await asyncio.wait((changing, stop), return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if not changing.done():
                changing.cancel()
                await asyncio.wait((changing,))
                return
            worker = changing.result()
            await self._run_part(worker, stopping)

    async def _run_part(self, worker: Intake | Enlistment, stopping: asyncio.Event) -> None:
        running, self._running = self._running or asyncio.ensure_future(worker.run()), None
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((running, stop, self._superseded), return_when=asyncio.FIRST_COMPLETED)
            if self._superseded.done():
                self._superseded.result()
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
        if isinstance(control, PeerControl):
            control.on_members = partial(self._adopt, control.member)
            control.on_claim = partial(self._note_claim, control)
            control.on_enlist = partial(self._note_enlist, control.member)
            control.on_records = partial(self._keep, control.member)
            if self._claim is not None:
                control.send(Claim(front=self._claim.front, term=self._known_term))
        if (side := self._roster or self._enlistment) is not None:
            side.found(control)

    def _node_lost(self, member: int, error: NodeError) -> None:
        """The link to another node has ended. During the start of the front that ends the start."""
        if self._leads and not self._is_ready and self._loss is None:
            self._loss = error
            self._lost.set()
        if (side := self._roster or self._enlistment) is not None:
            side.lost(member, error)

    def _adopt(self, member: int, told: Membership) -> None:
        """Take over what the front says of the members."""
        if self._enlistment is not None and member == self._enlistment.front:
            self._enlistment.adopt(told)

    def _note_enlist(self, member: int, enlist: Enlist) -> None:
        if self._enlistment is not None and member == self._enlistment.front:
            self._enlistment.enlisted(enlist)

    def _keep(self, member: int, records: Records) -> None:
        if self._enlistment is not None and member == self._enlistment.front:
            self._enlistment.keep(records)

    def _members_changed(self, changes: list[Change]) -> None:
        """Handle every change of membership; no other function does."""
        self._times.note()
        if self._roster is not None:
            self._roster.changed()
        if self._front is not None:
            self._choose_standby()

    # -- which node is the front

    @property
    def _known_term(self) -> int:
        """Return the latest term of a front that is known."""
        return max(self._term, *(self._members.term(entry.id) for entry in self._members.entries))

    def _note_claim(self, peer: PeerControl, claim: Claim) -> None:
        """Take in which node another one takes for the front, unless more is known here."""
        known = self._known_term
        if not any(entry.id == claim.front and entry.role == "compute" for entry in self._members.entries):
            raise ProtocolError(f"{peer.name} takes member {claim.front} for the front, which is no compute node here")
        if claim.term < known:
            return
        self._term = claim.term
        if claim.front == self._member:  # also of one that has started anew since
            return
        before = self._claim
        if before is not None and claim.term == known and claim.front != before.front and not peer.leads:
            return
        self._claim = claim
        self._claimed.set()
        if before != claim:
            self._tell_claim()
        if self._roster is not None:
            name = self._members.entry(claim.front).name
            reason = f"compute node {name} has taken the part of the front, in term {claim.term}"
            self._roster.supersede(SupersededError(reason, node=self._name, term=claim.term, holder=name))
        elif self._enlistment is not None:
            self._enlistment.follow(claim.front)

    def _lead_from(self, term: int) -> None:
        """This node is the front from now on."""
        self._leads, self._term, self._claim = True, term, Claim(front=self._member, term=term)
        self._tell_claim()

    def _tell_claim(self) -> None:
        assert self._claim is not None
        for peer in self._neighbours.peers.values():
            peer.send(self._claim)

    @property
    def _leader(self) -> NodeConfig:
        """Return the node that is the front, as far as this one knows."""
        front = self._claim.front if self._claim is not None else self._first
        return self._config.find(self._members.entry(front).name)

    def _not_front(self) -> NotFrontError:
        leader = self._leader
        reason = f"{self._name} is not the front; clients talk to {leader.name} at {leader.address}"
        return NotFrontError(reason, node=self._name, address=str(leader.address))

    def _choose_standby(self) -> None:
        """Have the first of the other compute nodes that serve keep a copy of the journal."""
        peers, serving = self._neighbours.peers, self._members.in_state("compute", State.SERVING)
        chosen = next((peers[member] for member in serving if member in peers), None)
        if chosen is self._standby:
            return
        if self._standby is not None:
            self._standby.send(Records(kind="none"))
        self._standby = chosen
        if chosen is not None:
            log.info("event=standby member=%s", chosen.name)
            if self._journal is None:
                chosen.send(Records(kind="all"))
        if self._journal is not None:
            self._journal.mirror(
                None if chosen is None else lambda kind, data: chosen.send(Records(kind=kind, data=data))
            )

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
        first = self._first
        awaited = [entry.id for entry in members.entries if entry.id != first] if self._leads else [first]
        meeting = asyncio.ensure_future(self._neighbours.meet(awaited))
        claimed = asyncio.ensure_future(self._claimed.wait())

        async def serve_opened() -> ServedModel:
            source, _ = await opening
            self._served = served = serve_model(config, members, source)
            if not self._leads:
                self._succeeds = await self._workers.run(was_front, config, served, self._name, self._host)
            if self._succeeds:  # it may be needed as the front again, where the first node is gone
                self._claimed.set()
            return served

        async def meet() -> None:
            await asyncio.wait((meeting, claimed), return_when=asyncio.FIRST_COMPLETED)
            if not claimed.done():
                meeting.result()

        try:  # what is wrong with the model is said at once, also where other nodes are missing
            served, _ = await asyncio.gather(serve_opened(), meet())
        finally:
            meeting.cancel()
            claimed.cancel()
        worker = await self._start_part(served)
        if self._loss is not None:  # a node that was lost meanwhile
            raise self._loss
        return worker

    async def _start_part(self, served: ServedModel) -> Intake | Enlistment:
        """Begin as the front, if this is the first node of the file and no other one has its part; else follow."""
        if self._leads and not self._claimed.is_set():
            try:
                return await self._lead(served)
            except SupersededError as error:
                if not error.holder:
                    raise
                await self._give_way(error)
        self._send_away()
        return await self._start_follower(served)

    async def _lead(
        self, served: ServedModel, *, copy: bytes | None = None, needed: frozenset[int] = frozenset()
    ) -> Intake:
        """Become the front of a cluster that has none: one that starts; or whose front is lost, which may have
        ``needed``, and of whose journal there may be a ``copy``. SupersededError if it has one."""
        config, members = self._config, self._members
        self._journal = journal = open_journal(config, served, self._name, self._host, self._journal_workers)
        kept = await journal.open(self._workers, copy) if journal is not None else []
        key = TenantKey.of(config, served.facts.fingerprint)
        self._roster = roster = Roster(
            config, served, members, self._neighbours, member=self._member, key=key, term=self._known_term
        )
        roster.on_formed, roster.on_settled, roster.on_stranded = self._formed, self._settled, self._stranded
        roster.on_seized = self._lead_from
        if not needed:
            self._lead_from(self._known_term)
        completing = asyncio.ensure_future(roster.take_over(needed) if needed else roster.complete())
        try:
            if self._runner is None:
                self._runner = await self._make_steps(served)
            tokenizer = await self._there.call(Tokenizer, served.facts.path, served.context)
            self._encoder = Encoder(tokenizer)
            await completing
        finally:
            completing.cancel()
        blocks = make_blocks(config, served, roster.serving)
        if not needed:
            log.info("event=fitting", extra={"progress": "measuring steps"})
        self._formed(self._formation, frozenset())
        front = await open_front(
            config,
            self._name,
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
            fits=not needed,  # requests wait already, and nodes may come and go
        )
        front.intake.on_suspect, roster.on_superseded = roster.suspect, self._end_superseded
        if (traces := open_traces(self._name)) is not None:
            self._traces = traces
            front.intake.meter.on_end = traces.ended
        self._front = front
        self._drains = Drains(config, served, members, roster, front.engine, self._there)
        self._answers.open(front.intake, tokenizer, kept)
        if kept:
            log.info("event=restored requests=%d", len(kept))
        self._choose_standby()
        return front.intake

    def _end_superseded(self, error: NodeError) -> None:
        """Another front has this one's part. What clients have asked goes on there."""
        if not self._superseded.done():
            self._superseded.set_exception(error)
            self._superseded.exception()  # the node may be ending already

    async def _give_way(self, error: SupersededError) -> None:
        """There is another front, or will be: this node follows."""
        log.warning("event=not_front reason=%r", str(error))
        self._loss = None
        assert self._roster is not None
        await self._roster.close()
        self._roster = None
        if self._journal is not None:
            await self._journal.close()
            self._journal = None
        for member in self._neighbours.shards:  # a memory node may have this front, though it has not heard so yet
            self._neighbours.renew(member)
        if self._leader is self._node:
            self._claim = Claim(front=self._members.id_of(error.holder), term=error.term)
        self._send_away()

    def _send_away(self) -> None:
        """This node is not the front: send clients to where it is."""
        self._leads = False
        for link, session in self._clients.items():
            if session is not None:
                self._refuse(link)
                session.on_lost(self._not_front())
                self._clients[link] = None

    def _refuse(self, link: Link) -> None:
        """Tell a client where the front is, and tell it again whatever it says."""

        def refuse(_: object = None) -> None:
            send_unless_gone(link, Failed.of(self._not_front()))

        refuse()
        link.deliver(on_message=refuse)

    async def _succeed(self, before: Enlistment) -> Intake | Enlistment:
        """Take the part of the front that is lost; or go on following, if it is not."""
        assert self._served is not None
        log.warning("event=taking_over front=%s", self._leader.name)
        copy, needed, self._term = await before.release(), before.needed, self._known_term
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
        log.warning("event=took_over term=%d", self._known_term)
        return intake

    def _make_enlistment(self, served: ServedModel, *, succeeds: bool) -> Enlistment:
        async def make_steps() -> Steps:
            if self._runner is None:
                self._runner = await self._make_steps(served)
            return self._runner

        key = TenantKey.of(self._config, served.facts.fingerprint)
        self._enlistment = Enlistment(
            self._config,
            served,
            self._members,
            self._neighbours,
            self._there,
            name=self._name,
            front=self._members.id_of(self._leader.name),
            make_steps=make_steps,
            make_copy=lambda: open_copy(self._config, served, self._name, self._host, self._journal_workers),
            succession=Succession(self._config, self._network, name=self._name, tenant=key.name),
            succeeds=succeeds,
        )
        return self._enlistment

    async def _start_follower(self, served: ServedModel) -> Enlistment:
        enlistment = self._make_enlistment(served, succeeds=self._succeeds or self._member == self._first)
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
        self._clients = {known: session for known, session in self._clients.items() if not known.state.closed}
        self._clients[link] = None
        if role == "client" and not self._leads:
            self._refuse(link)
        elif role == "client":
            session = ClientSession(
                link, self._workers, self._answers, self.intake, self._ready_encoder, self._status_now
            )
            self._clients[link] = session

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
        if not self._leads:
            return Draining(error=str(self._not_front()))
        if self._drains is None or not self._is_ready:
            return Draining(error=f"compute node {self._name} is still starting; try again soon")
        return await self._drains.ask(asked)

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus gets at this moment."""
        status = self._status_now()
        return of_status(status) + (of_front(status, self._front.intake.meter) if self._front else [])

    def _status_now(self) -> Status:
        pid = self._host.pid
        status = Status(name=self._name, role="compute", state="starting", pid=pid, busy_s=self._device.busy_s)
        status.epoch = self._members.epoch
        status.front = self._leader.name
        status.members = self._times.describe() if self._leads else []
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
