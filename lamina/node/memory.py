"""The memory daemon waits for compute nodes, holds their tenants' KV caches, and attends for them. It needs no
model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

from prometheus_client.metrics_core import Metric

from lamina.attention import BackendFactory, Memory, MemoryRange, QuotaPool, default_backend
from lamina.attention.backend import require_backend
from lamina.attention.native.library import choose_isa
from lamina.attention.pool import numa_node_of, numa_nodes
from lamina.config import MemoryNodeConfig
from lamina.errors import CapacityError, ConfigError, LaminaError, ProtocolError, TransportError, first_error
from lamina.memory.control import ServingControl, StaleTermError
from lamina.memory.couriers import CourierReceiver
from lamina.memory.fair_queue import FairQueue
from lamina.memory.tenant import Tenant, check_same, find_difference
from lamina.node import probe
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.metrics import of_status, served
from lamina.node.monitor import CALLER_TIMEOUT_S, Asked, Monitor
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.transport import Address, Hello, Link, Options
from lamina.wire.admin import Status, TenantStatus
from lamina.wire.codec import decode, encode
from lamina.wire.moves import Join, layout_digest
from lamina.wire.requests import Failed
from lamina.wire.tenants import Attach, Refused, short_name

log = logging.getLogger("lamina.memory")


@dataclass(eq=False)
class _Tenancy:
    """Holds the node's loop's part of a tenant: what its front asked for in the present term, its memory, and its links
    by member id. ``receivers`` are those on which other memory nodes send blocks. ``lease`` ends it; None while the
    front is there."""

    attach: Attach
    tenant: Tenant
    memory: MemoryRange
    links: dict[int, ServingControl] = field(default_factory=dict)
    receivers: list[CourierReceiver] = field(default_factory=list)
    lease: asyncio.TimerHandle | None = None

    @property
    def lease_s(self) -> float | None:
        """Return the seconds that are left of the lease."""
        return None if self.lease is None else max(0.0, self.lease.when() - asyncio.get_running_loop().time())

    def cancel_lease(self) -> None:
        if self.lease is not None:
            self.lease.cancel()
            self.lease = None


class MemoryNode:
    """Runs the memory node ``node`` of one or several clusters. It serves any number of tenants.

    The node takes the memory for KV cache when it starts, and divides it among tenants under quotas. It computes on
    ``device`` and is reached over ``network``; ``backend`` makes what attends, by default what ``node`` names.
    ``host`` is the process that it lives in, by default this one.
    """

    def __init__(
        self,
        node: MemoryNodeConfig,
        options: Options,
        *,
        device: Device,
        network: Network,
        backend: BackendFactory | None = None,
        host: Host | None = None,
    ) -> None:
        self._node = node
        self._name = node.name
        self._options = options
        self._device = device
        self._there = Crossing(device.loop)
        self._network = network
        self._host = host or Host.own()
        # By this a front tells a process that has left its cluster from the next one of that name.
        self._hello = Hello("memory", self._name, {"process": f"{self._host.random.getrandbits(64):016x}"})
        self._attention: str | BackendFactory = backend or node.attention
        self._taken: asyncio.Future[tuple[QuotaPool, float]] | None = None
        self._queue = FairQueue(device)
        self._tenancies: dict[str, _Tenancy] = {}
        self._changing = asyncio.Lock()
        """Held while a compute node is admitted or a tenant ends, so that the next one finds the memory that is
        left, and so that of two fronts one comes after the other."""
        self._layers = self._stale_tags = 0
        """The counts of tenants that are gone."""
        self._monitor = Monitor(node.name, device, network, options, self._status)
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._links: dict[Link, None] = {}
        self._echoes = probe.Echoes()
        self._draining = False

    async def serve(self, stopping: asyncio.Event) -> None:
        """Listen until ``stopping`` is set, then wait for the compute nodes to leave, for a bounded time."""
        self._device.start()
        # A compute node may attach at once; that is answered when the memory is there.
        self._taken = self._there.start(self._device.run(self._take))
        listening = await self._network.listen(self._node.bind, self._hello, self._on_link, self._options)
        log.info("event=listening address=%s", listening.address)
        stopped = asyncio.ensure_future(stopping.wait())
        watching = AsyncExitStack()
        try:
            await watching.enter_async_context(served(self._node.metrics, self.metrics))
            await asyncio.wait((self._taken, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not self._taken.done():
                return  # told to stop before there was anything to drain
            self._taken.result()
            await stopped
            self._draining = True
            if self._tasks:
                await asyncio.wait(list(self._tasks), timeout=DRAIN_TIMEOUT_S)
        finally:
            self._taken.cancel()
            stopped.cancel()
            await watching.aclose()
            await listening.close()
            self._monitor.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for tenancy in list(self._tenancies.values()):  # those in lease
                await self._close(tenancy, TransportError(f"memory node {self._name} was told to stop"))
            await asyncio.gather(*(link.close() for link in self._links))
            self._device.close()

    # -- memory

    def _take(self) -> QuotaPool:
        """Choose the backend and take the memory, which takes seconds if it is large."""
        if self._attention == "auto":
            self._attention = default_backend()
        attention = require_backend(self._attention).name
        isa = choose_isa() if attention == "native" else "any"
        log.info("event=taking bytes=%d", self._node.memory, extra={"progress": "taking memory"})
        memory = self._bound_memory()
        report = memory.report()
        log.info(
            "event=memory bytes=%d huge_page_bytes=%d numa=%s attention=%s isa=%s threads=%d",
            report.nbytes,
            report.huge_bytes,
            "any" if report.numa is None else report.numa,
            attention,
            isa,
            self._device.threads,
        )
        return QuotaPool(memory)

    def _bound_memory(self) -> Memory:
        nbytes = self._node.memory
        if self._node.numa is not None:
            return Memory(nbytes, numa=self._node.numa)
        near = numa_node_of(frozenset(self._device.cpus)) if self._device.cpus and len(numa_nodes()) > 1 else None
        try:
            return Memory(nbytes, numa=near)
        except ConfigError as error:  # it was not asked for, and pinned threads touch memory near themselves anyway
            log.warning("event=unbound reason=%r", str(error))
            return Memory(nbytes)

    # -- links

    def _on_link(self, link: Link) -> None:
        role = link.info.peer.role
        if role == probe.ROLE:
            self._echoes.take(link)
            return
        self._links = {known: None for known in (*self._links, link) if not known.state.closed}
        if role == "client":
            refusal = f"{self._name} is a memory node; clients talk to the compute node"
            link.send(encode(Failed(kind="RequestError", message=refusal)))
        link.deliver(
            on_message=lambda plain: self._on_message(link, plain),
            on_lost=lambda _: self._links.pop(link, None),
            lane_loop=self._device.loop if role in ("compute", "memory") else None,
            peer_timeout=None if role in ("compute", "memory") else CALLER_TIMEOUT_S,
        )

    def _on_message(self, link: Link, plain: dict[str, Any]) -> None:
        match decode(plain, Attach | Join | Asked):
            case Attach() as attach:
                self._attach(link, attach)
            case Join() as join:
                self._join(link, join)
            case asked:
                self._monitor.ask(link, asked)

    def _attach(self, link: Link, attach: Attach) -> None:
        if link.info.peer.role != "compute":
            link.abort(f"a {link.info.peer.role} cannot attach; only compute nodes can")
            return
        if self._draining:
            link.send(encode(Refused(reason="is draining and takes no compute node")))
            return
        link.deliver(on_message=lambda _: link.abort("a message before the answer to Attach"))
        self._begin(self._serve_link(link, attach))

    def _join(self, link: Link, join: Join) -> None:
        if link.info.peer.role != "memory":
            link.abort(f"a {link.info.peer.role} cannot send blocks; only memory nodes can")
            return
        if self._draining:
            link.send(encode(Refused(reason="is draining and takes no blocks")))
            return
        link.deliver(on_message=lambda _: link.abort("a message before the answer to Join"))
        self._begin(self._receive(link, join))

    async def _open_link(self, address: Address) -> Link:
        """Connect to another memory node. Errors are those of `Network.connect`."""
        return await self._network.connect(address, self._hello, self._options, deadline_s=self._options.peer_timeout)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _serve_link(self, link: Link, attach: Attach) -> None:
        """Hold the cache of a compute node's tenant, until the link ends."""
        peer = link.info.peer.name
        tenancy: _Tenancy | None = None
        reason, term, has_left = f"memory node {self._name} was told to stop", None, False
        try:
            assert self._taken is not None
            quotas, _ = await asyncio.shield(self._taken)
            async with self._changing:
                tenancy = await self._admit(attach, quotas, peer)
                control = ServingControl(
                    link, attach, tenancy.tenant, self._device, self._open_link, self._options.peer_timeout
                )
                tenancy.links[attach.member] = control
            self._log_attached(link, attach, tenancy)
            try:
                await control.serve()
            finally:
                has_left = control.has_detached
                del tenancy.links[attach.member]
        except* LaminaError as group:
            error = first_error(group)
            reason, term = str(error), error.term if isinstance(error, StaleTermError) else None
        except* Exception as group:
            log.exception("event=shard_failed peer=%s", peer)
            reason = f"internal error: {first_error(group)!r}"
        finally:
            if tenancy is not None and attach.from_front:
                gone = f"its front {peer} is gone: {reason}"
                await (self._end(tenancy, attach, gone) if has_left else self._keep(tenancy, attach, gone))
        if has_left or link.state.closed:
            log.info("event=detached peer=%s reason=%r", peer, reason)
        else:  # the next compute node need not wait until this one has heard it
            log.error("event=refused peer=%s reason=%r", peer, reason)
            link.send(encode(Refused(reason=reason, term=term)))
        if tenancy is None and term is not None and attach.from_front:  # it may ask again, in a later term
            link.deliver(
                on_message=lambda plain: self._on_message(link, plain), on_lost=lambda _: self._links.pop(link, None)
            )
            return
        if not link.state.closed:
            await link.close()
        self._links.pop(link, None)

    async def _receive(self, link: Link, join: Join) -> None:
        """Take the blocks that another memory node sends, until the link ends."""
        peer, name = link.info.peer.name, short_name(join.tenant)
        reason = f"memory node {self._name} was told to stop"
        try:
            async with self._changing:
                tenancy = self._joined(join)
                receiver = CourierReceiver(link, join, tenancy.tenant, self._device, self._options.peer_timeout)
                tenancy.receivers.append(receiver)
            log.info("event=joined peer=%s transport=%s tenant=%s", peer, link.info.transport, name)
            try:
                await receiver.serve()
            finally:
                tenancy.receivers.remove(receiver)
        except* LaminaError as group:
            reason = str(first_error(group))
        except* Exception as group:
            log.exception("event=receiver_failed peer=%s", peer)
            reason = f"internal error: {first_error(group)!r}"
        log.info("event=parted peer=%s tenant=%s reason=%r", peer, name, reason)
        if not link.state.closed:
            link.send(encode(Refused(reason=reason)))
            await link.close()
        self._links.pop(link, None)

    # -- tenants

    def _joined(self, join: Join) -> _Tenancy:
        """Return the tenant for which another memory node has blocks; a LaminaError says why it cannot take them."""
        tenancy, name = self._tenancies.get(join.tenant), short_name(join.tenant)
        if tenancy is None or not compare_digest(join.token, tenancy.attach.token):
            raise ProtocolError(f"no tenant {name} with this token is here; its front has to attach first")
        if join.layout != layout_digest(tenancy.attach):
            raise ProtocolError(
                f"blocks of tenant {name} hold something else here: model, types or heads are different"
            )
        return tenancy

    async def _admit(self, attach: Attach, quotas: QuotaPool, peer: str) -> _Tenancy:
        """Return the tenant of a compute node, after making it for a front, or taking it over. A LaminaError says why
        that is impossible."""
        tenancy = self._tenancies.get(attach.tenant)
        name = short_name(attach.tenant)
        if tenancy is not None and not compare_digest(attach.token, tenancy.attach.token):
            raise ProtocolError(
                f"tenant {name} is here, and compute node {peer} does not have its token; the compute nodes of a "
                "cluster need the same secret, model and nodes in their files"
            )
        if attach.from_front:
            return await self._admit_front(tenancy, attach, quotas, peer)
        if tenancy is None:
            here = ", ".join(other.tenant.name for other in self._tenancies.values())
            raise ProtocolError(
                f"compute node {attach.member} wants to join tenant {name}, which is not here (tenants: "
                f"{here or 'none'}); its front has to attach first"
            )
        if (present := tenancy.attach.term) != attach.term:
            do = "attach again, in the present term" if attach.term < present else "its front has to attach first"
            raise StaleTermError(
                f"compute node {attach.member} wants to join tenant {name} in term {attach.term}, which is in term "
                f"{present}; {do}",
                present,
            )
        if (known := tenancy.links.get(attach.member)) is not None:
            raise ProtocolError(
                f"compute node {attach.member} of tenant {name} is attached already, as {known.peer}; "
                f"member ids must differ"
            )
        check_same(attach, tenancy.attach)
        return tenancy

    async def _admit_front(self, tenancy: _Tenancy | None, attach: Attach, quotas: QuotaPool, peer: str) -> _Tenancy:
        """Begin a term, in the cache of the term before if there is one and it fits."""
        name = short_name(attach.tenant)
        if tenancy is not None:
            before = tenancy.attach
            if attach.term <= before.term:
                raise StaleTermError(
                    f"tenant {name} is in term {before.term} already; to take it over, {peer} has to begin a later "
                    f"one, got {attach.term}",
                    before.term,
                )
            over = StaleTermError(
                f"superseded by {peer}, the front of tenant {name} in term {attach.term}", attach.term
            )
            if (difference := find_difference(attach, before)) is None:
                tenancy.cancel_lease()
                tenancy.attach = attach
                await self._end_links(tenancy, over)
                await self._there.start(self._device.run(tenancy.tenant.take_over))
                return tenancy
            log.info("event=renewed tenant=%s reason=%r", name, "{}: {!s:.100}, before {!s:.100}".format(*difference))
            await self._close(tenancy, over)
        try:
            memory = quotas.allocate(name, attach.quota)
        except CapacityError as error:
            raise CapacityError(f"{error}{self._leases()}") from error
        try:
            tenant, _ = await self._there.start(self._device.run(Tenant, attach, self._attention, memory, self._queue))
        except BaseException:
            quotas.free(name)
            raise
        self._tenancies[attach.tenant] = tenancy = _Tenancy(attach, tenant, memory)
        return tenancy

    async def _keep(self, tenancy: _Tenancy, attach: Attach, reason: str) -> None:
        """Keep a tenant whose front is gone, which attached as ``attach`` says, for its lease."""
        if not self._is_present(tenancy, attach):
            return  # a later front has taken over
        if attach.lease == 0:
            await self._end(tenancy, attach, reason)
            return
        log.info("event=leased tenant=%s seconds=%g reason=%r", tenancy.tenant.name, attach.lease, reason)
        after = f"{reason}; it did not come back within {attach.lease:g} s"
        loop = asyncio.get_running_loop()
        tenancy.lease = loop.call_later(attach.lease, lambda: self._begin(self._end(tenancy, attach, after)))

    async def _end(self, tenancy: _Tenancy, attach: Attach, reason: str) -> None:
        """End a tenant, unless a later front than the one that attached as ``attach`` says has taken over."""
        async with self._changing:
            if self._is_present(tenancy, attach):
                name = tenancy.tenant.name
                await self._close(tenancy, TransportError(f"tenant {name} has ended, as {reason}"))

    def _is_present(self, tenancy: _Tenancy, attach: Attach) -> bool:
        return self._tenancies.get(attach.tenant) is tenancy and tenancy.attach is attach

    async def _close(self, tenancy: _Tenancy, reason: TransportError) -> None:
        """End all links of a tenant, then its cache."""
        assert self._taken is not None
        tenant = tenancy.tenant
        del self._tenancies[tenancy.attach.tenant]
        tenancy.cancel_lease()
        await self._end_links(tenancy, reason)
        await self._there.start(self._device.run(tenant.close))
        self._taken.result()[0].free(tenant.name)
        self._layers += tenant.layers
        self._stale_tags += tenant.stale_tags
        log.info("event=tenant_ended tenant=%s reason=%r", tenant.name, str(reason))

    async def _end_links(self, tenancy: _Tenancy, reason: TransportError) -> None:
        """End all links of a tenant; none is served any more when this returns."""
        controls: list[ServingControl | CourierReceiver] = [*tenancy.links.values(), *tenancy.receivers]
        for control in controls:
            control.end(reason)
        await asyncio.gather(*(control.ended.wait() for control in controls))

    def _leases(self) -> str:
        """Return what a compute node is told that found no room, about the tenants whose front is gone."""
        kept = [(t.tenant.name, t.lease_s) for t in self._tenancies.values()]
        told = [f"{name} for {seconds:.0f} s more" for name, seconds in kept if seconds is not None]
        return f"; kept for fronts that may come back: {', '.join(told)}" if told else ""

    def _log_attached(self, link: Link, attach: Attach, tenancy: _Tenancy) -> None:
        log.info(
            "event=attached peer=%s transport=%s choice=%r tenant=%s term=%d compute=%d model=%r layers=%d kv_heads=%d "
            "bytes=%d capacity_tokens=%d",
            link.info.peer.name,
            link.info.transport,
            link.info.choice,
            tenancy.tenant.name,
            attach.term,
            attach.member,
            attach.model,
            len(attach.layers),
            attach.layers[0].kv_heads,
            tenancy.memory.nbytes,
            tenancy.tenant.cache.capacity_tokens,
        )

    # -- status

    async def _status(self) -> Status:
        tenancies = list(self._tenancies.values())
        named = [(t.tenant, [link.peer for _, link in sorted(t.links.items())], t.lease_s) for t in tenancies]
        told = await self._there.call(_describe, named) if named else []
        there = self._taken is not None and self._taken.done()
        used = any(tenancy.links for tenancy in tenancies)
        state = "draining" if self._draining else "ready" if used else "waiting" if there else "starting"
        leased = [t.tenant.name for t in tenancies if t.lease_s is not None]
        waiting_for = f"the front of {', '.join(leased)}" if leased else "a compute node"
        return Status(
            name=self._name,
            role="memory",
            state=state,  # type: ignore[arg-type]
            waiting_for=waiting_for if state == "waiting" else "",
            pid=self._host.pid,
            busy_s=self._device.busy_s,
            layers=self._layers + sum(tenancy.tenant.layers for tenancy in tenancies),
            sequences=sum(tenant.sequences for tenant in told),
            kv_tokens_total=sum(tenant.kv_tokens_total for tenant in told),
            kv_tokens_free=sum(tenant.kv_tokens_free for tenant in told),
            stale_tags=self._stale_tags + sum(tenancy.tenant.stale_tags for tenancy in tenancies),
            peers=[link.describe() for t in tenancies for _, link in sorted(t.links.items())],
            tenants=told,
        )

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus gets at this moment."""
        return of_status(await self._status())


def _describe(named: list[tuple[Tenant, list[str], float | None]]) -> list[TenantStatus]:
    """Describe tenants, on the device's loop."""
    return [tenant.describe(compute_nodes, lease_s) for tenant, compute_nodes, lease_s in named]
