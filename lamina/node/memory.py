"""The memory daemon waits for compute nodes, holds their tenants' KV caches, and attends for them. It needs no
model."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.metrics_core import Metric

from lamina.attention import BackendFactory, Memory, MemoryRange, QuotaPool, default_backend
from lamina.attention.backend import require_backend
from lamina.attention.native.library import choose_isa
from lamina.attention.pool import numa_node_of, numa_nodes
from lamina.config import MemoryNodeConfig
from lamina.errors import ConfigError, LaminaError, ProtocolError, first_error
from lamina.memory.control import ServingControl
from lamina.memory.fair_queue import FairQueue
from lamina.memory.tenant import Tenant, check_same
from lamina.node import probe
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.metrics import of_status, served
from lamina.node.monitor import CALLER_TIMEOUT_S, Asked, Monitor
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.transport import Hello, Link, Options
from lamina.wire.admin import Status, TenantStatus
from lamina.wire.codec import decode, encode
from lamina.wire.requests import Failed
from lamina.wire.tenants import Attach, Refused

log = logging.getLogger("lamina.memory")


@dataclass(eq=False)
class _Tenancy:
    """Holds the node's loop's part of a tenant: what its front asked for, its memory, and its links by member id."""

    attach: Attach
    tenant: Tenant
    memory: MemoryRange
    links: dict[int, ServingControl] = field(default_factory=dict)


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
        self._attention: str | BackendFactory = backend or node.attention
        self._taken: asyncio.Future[tuple[QuotaPool, float]] | None = None
        self._queue = FairQueue(device)
        self._tenancies: dict[str, _Tenancy] = {}
        self._changing = asyncio.Lock()
        """Held while a compute node is admitted or a tenant ends, so that the next one finds the memory that is
        left."""
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
        hello = Hello("memory", self._name)
        listening = await self._network.listen(self._node.bind, hello, self._on_link, self._options)
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

        def on_message(plain: dict[str, Any]) -> None:
            match decode(plain, Attach | Asked):
                case Attach() as attach:
                    self._attach(link, attach)
                case asked:
                    self._monitor.ask(link, asked)

        link.deliver(
            on_message=on_message,
            on_lost=lambda _: self._links.pop(link, None),
            lane_loop=self._device.loop if role == "compute" else None,
            peer_timeout=None if role == "compute" else CALLER_TIMEOUT_S,
        )

    def _attach(self, link: Link, attach: Attach) -> None:
        if link.info.peer.role != "compute":
            link.abort(f"a {link.info.peer.role} cannot attach; only compute nodes can")
            return
        if self._draining:
            link.send(encode(Refused(reason="is draining and takes no compute node")))
            return
        link.deliver(on_message=lambda _: link.abort("a message before the answer to Attach"))
        task = asyncio.get_running_loop().create_task(self._serve_link(link, attach))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _serve_link(self, link: Link, attach: Attach) -> None:
        """Hold the cache of a compute node's tenant, until the link ends."""
        peer = link.info.peer.name
        tenancy: _Tenancy | None = None
        reason = f"memory node {self._name} was told to stop"
        try:
            assert self._taken is not None
            quotas, _ = await asyncio.shield(self._taken)
            async with self._changing:
                tenancy = await self._admit(attach, quotas)
                control = ServingControl(link, attach, tenancy.tenant, self._device)
                tenancy.links[attach.member] = control
            self._log_attached(link, attach, tenancy)
            try:
                await control.serve()
            finally:
                tenancy.links.pop(attach.member, None)
        except* LaminaError as group:
            reason = str(first_error(group))
        except* Exception as group:
            log.exception("event=shard_failed peer=%s", peer)
            reason = f"internal error: {first_error(group)!r}"
        finally:
            if tenancy is not None and attach.from_front:
                await self._end(tenancy, f"tenant {attach.tenant} has ended, as its front {peer} is gone: {reason}")
        if link.state.closed:
            log.info("event=detached peer=%s reason=%r", peer, reason)
        else:  # the next compute node need not wait until this one has heard it
            log.error("event=refused peer=%s reason=%r", peer, reason)
            link.send(encode(Refused(reason=reason)))
            await link.close()
        self._links.pop(link, None)

    # -- tenants

    async def _admit(self, attach: Attach, quotas: QuotaPool) -> _Tenancy:
        """Return the tenant of a compute node, after making it for a front. A LaminaError says why that is
        impossible."""
        name = attach.tenant
        tenancy = self._tenancies.get(name)
        if not attach.from_front:
            if tenancy is None:
                raise ProtocolError(
                    f"compute node {attach.member} wants to join tenant {name}, which is not here (tenants: "
                    f"{', '.join(self._tenancies) or 'none'}); its front has to attach first"
                )
            if (known := tenancy.links.get(attach.member)) is not None:
                raise ProtocolError(
                    f"compute node {attach.member} of tenant {name} is attached already, as {known.peer}; "
                    f"member ids must differ"
                )
            check_same(attach, tenancy.attach)
            return tenancy
        if tenancy is not None:
            raise ProtocolError(f"tenant {name} is here already; tenants' names must differ")
        memory = quotas.allocate(name, attach.quota)
        try:
            tenant, _ = await self._there.start(self._device.run(Tenant, attach, self._attention, memory, self._queue))
        except BaseException:
            quotas.free(name)
            raise
        self._tenancies[name] = tenancy = _Tenancy(attach, tenant, memory)
        return tenancy

    async def _end(self, tenancy: _Tenancy, reason: str) -> None:
        """End a tenant whose front is gone: first the links of its other compute nodes, then its cache."""
        assert self._taken is not None
        async with self._changing:
            tenant = tenancy.tenant
            del self._tenancies[tenant.name]
            others = list(tenancy.links.values())
            for other in others:
                other.end(reason)
            await asyncio.gather(*(other.ended.wait() for other in others))
            await self._there.start(self._device.run(tenant.close))
            self._taken.result()[0].free(tenant.name)
            self._layers += tenant.layers
            self._stale_tags += tenant.stale_tags

    def _log_attached(self, link: Link, attach: Attach, tenancy: _Tenancy) -> None:
        log.info(
            "event=attached peer=%s transport=%s choice=%r tenant=%r compute=%d model=%r layers=%d kv_heads=%d "
            "bytes=%d capacity_tokens=%d",
            link.info.peer.name,
            link.info.transport,
            link.info.choice,
            attach.tenant,
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
        named = [(t.tenant, [link.peer for _, link in sorted(t.links.items())]) for t in tenancies]
        told = await self._there.call(_describe, named) if named else []
        there = self._taken is not None and self._taken.done()
        state = "draining" if self._draining else "ready" if told else "waiting" if there else "starting"
        return Status(
            name=self._name,
            role="memory",
            state=state,  # type: ignore[arg-type]
            waiting_for="a compute node" if state == "waiting" else "",
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


def _describe(named: list[tuple[Tenant, list[str]]]) -> list[TenantStatus]:
    """Describe tenants, on the device's loop."""
    return [tenant.describe(compute_nodes) for tenant, compute_nodes in named]
