"""The memory daemon: waits for compute nodes, holds their tenants' KV caches, attends for them. It needs no model."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from lamina.attention import Loans, Memory, default_backend
from lamina.attention.backend import require_backend
from lamina.attention.native.library import choose_isa
from lamina.attention.pool import numa_node_of, numa_nodes
from lamina.config import NodeConfig
from lamina.errors import ConfigError, LaminaError, ProtocolError
from lamina.memory.fair_queue import Turns
from lamina.memory.serving import AttentionShard
from lamina.memory.tenant import Tenant
from lamina.node import probe
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.monitor import Tracing
from lamina.runtime.device import Device
from lamina.transport import Hello, Link, Listener, Options
from lamina.wire.admin import AskSpans, AskStatus, Record, Status, TenantStatus
from lamina.wire.codec import FRONT, decode, encode
from lamina.wire.questions import answer
from lamina.wire.requests import Failed
from lamina.wire.tenants import Attach, Refused

log = logging.getLogger("lamina.memory")


class MemoryNode:
    """The memory node ``node`` of a cluster, or of several: it serves any number of tenants.

    The memory for KV cache is the node's: taken when it starts, and lent to tenants.
    """

    def __init__(self, node: NodeConfig, options: Options) -> None:
        self._node = node
        self._name = node.name
        self._options = options
        self._device = Device(cpus=node.pinned, threads=node.threads)
        self._tracing = Tracing(self._device)
        self._attention: str = node.attention or "auto"
        self._taken: asyncio.Future[Loans] | None = None
        self._turns = Turns(self._device)
        self._tenants: dict[str, Tenant] = {}
        self._changing = asyncio.Lock()
        """Held while a compute node is admitted or a tenant ends: whoever comes next has what those before it left."""
        self._layers = self._stale_tags = 0
        """Of tenants that are gone."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[Link] = set()
        self._echoes = probe.Echoes()
        self._draining = False

    async def serve(self, stopping: asyncio.Event) -> None:
        """Listen until ``stopping`` is set, then wait for the compute nodes to leave, for a bounded time."""
        # Somebody may attach at once; that is answered when the memory is there.
        self._taken = self._device.run(self._take)
        hello = Hello("memory", self._name)
        listener = await Listener.open(self._node.listen, hello, self._on_link, self._options)
        log.info("event=listening address=%s", listener.address)
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((self._taken, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not self._taken.done():
                return  # told to stop before there was anything to drain
            self._taken.result()
            await stopped
            self._draining = True
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=DRAIN_TIMEOUT_S)
        finally:
            self._taken.cancel()
            stopped.cancel()
            await listener.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(link.close() for link in self._links))
            self._device.close()

    def _take(self) -> Loans:
        """Choose the backend and take the memory; for much memory that takes seconds."""
        if self._attention == "auto":
            self._attention = default_backend()
        require_backend(self._attention)
        isa = choose_isa() if self._attention == "native" else "any"
        memory = self._bound_memory()
        report = memory.report()
        log.info(
            "event=memory bytes=%d huge_page_bytes=%d numa=%s attention=%s isa=%s threads=%d",
            report.nbytes,
            report.huge_bytes,
            "any" if report.numa is None else report.numa,
            self._attention,
            isa,
            self._device.threads,
        )
        return Loans(memory)

    def _bound_memory(self) -> Memory:
        nbytes = self._node.memory_bytes
        if self._node.numa is not None:
            return Memory(nbytes, numa=self._node.numa)
        near = numa_node_of(frozenset(self._device.cpus)) if self._device.cpus and len(numa_nodes()) > 1 else None
        try:
            return Memory(nbytes, numa=near)
        except ConfigError as error:  # nobody asked for it, and pinned threads touch memory near themselves anyway
            log.warning("event=unbound reason=%r", str(error))
            return Memory(nbytes)

    def _on_link(self, link: Link) -> None:
        if link.info.peer.role == probe.ROLE:
            self._echoes.take(link)
            return
        self._links = {*(known for known in self._links if not known.state.closed), link}
        if link.info.peer.role == "client":
            refusal = f"{self._name} is a memory node; clients talk to the compute node"
            link.send(encode(Failed(kind="RequestError", message=refusal)))

        def on_message(plain: dict[str, Any]) -> None:
            match decode(plain, Attach | AskStatus | Record | AskSpans):
                case Attach() as attach:
                    self._attach(link, attach)
                case AskStatus():
                    answer(link, self._status())
                case Record() | AskSpans() as asked:
                    answer(link, self._tracing.reply(asked))

        link.deliver(
            on_message=on_message,
            on_lost=lambda _: self._links.discard(link),
            lane_loop=self._device.loop if link.info.peer.role == "compute" else None,
        )

    def _attach(self, link: Link, attach: Attach) -> None:
        if link.info.peer.role != "compute":
            link.abort(f"a {link.info.peer.role} must not attach")
            return
        if self._draining:
            link.send(encode(Refused(reason="is draining and takes no compute node")))
            return
        link.deliver(
            on_message=lambda _: link.abort("a message before the answer to Attach"),
            on_lost=lambda _: self._links.discard(link),
        )
        task = asyncio.get_running_loop().create_task(self._serve_link(link, attach))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_link(self, link: Link, attach: Attach) -> None:
        """Hold the cache of a compute node's tenant, until the link ends."""
        peer = link.info.peer.name
        tenant: Tenant | None = None
        reason = f"memory node {self._name} was told to stop"
        try:
            assert self._taken is not None
            loans = await asyncio.shield(self._taken)
            async with self._changing:
                tenant = await self._admit(attach, loans)
            shard = AttentionShard(link, attach, tenant, self._device)
            log.info(
                "event=attached peer=%s transport=%s choice=%r tenant=%r compute=%d model=%r layers=%d kv_heads=%d "
                "bytes=%d capacity_tokens=%d",
                peer,
                link.info.transport,
                link.info.choice,
                tenant.name,
                attach.compute,
                attach.model,
                len(attach.layers),
                attach.layers[0].kv_heads,
                tenant.memory.nbytes,
                tenant.cache.capacity_tokens,
            )
            await shard.serve()
        except* LaminaError as group:
            reason = str(group.exceptions[0])
        except* Exception as group:
            log.exception("event=shard_failed peer=%s", peer)
            reason = f"internal error: {group.exceptions[0]!r}"
        finally:
            if tenant is not None and attach.compute == FRONT:
                await self._end(tenant, f"tenant {tenant.name} has ended, as its front {peer} is gone: {reason}")
        if link.state.closed:
            log.info("event=detached peer=%s reason=%r", peer, reason)
        else:  # whoever comes next need not wait until this one has heard it
            log.error("event=refused peer=%s reason=%r", peer, reason)
            link.send(encode(Refused(reason=reason)))
            await link.close()
        self._links.discard(link)

    async def _admit(self, attach: Attach, loans: Loans) -> Tenant:
        """The tenant of a compute node; that of a front is made. LaminaError says why it cannot be."""
        name, number = attach.tenant, attach.compute
        tenant = self._tenants.get(name)
        if number != FRONT:
            if tenant is None:
                raise ProtocolError(
                    f"compute node {number} wants to join tenant {name}, and there is none of this name "
                    f"({', '.join(self._tenants) or 'there are none'}); its front has to attach first"
                )
            tenant.check(attach)
            return tenant
        if tenant is not None:
            raise ProtocolError(f"tenant {name} is here already; tenants' names must differ")
        memory = loans.lend(name, attach.quota)
        try:
            tenant = await self._device.run(Tenant, attach, self._attention, memory, self._turns)
        except BaseException:
            loans.give_back(name)
            raise
        self._tenants[name] = tenant
        return tenant

    async def _end(self, tenant: Tenant, reason: str) -> None:
        """Part with a tenant whose front is gone: with its other compute nodes, then with its cache."""
        assert self._taken is not None
        async with self._changing:
            del self._tenants[tenant.name]
            others = list(tenant.shards.values())
            for shard in others:
                shard.end(reason)
            await asyncio.gather(*(shard.ended.wait() for shard in others))
            await self._device.run(tenant.close)
            self._taken.result().give_back(tenant.name)
            self._layers += tenant.layers
            self._stale_tags += tenant.stale_tags

    def _status(self) -> Status:
        tenants = [self._describe(tenant) for tenant in self._tenants.values()]
        there = self._taken is not None and self._taken.done()
        state = "draining" if self._draining else "ready" if tenants else "waiting" if there else "starting"
        return Status(
            name=self._name,
            role="memory",
            state=state,  # type: ignore[arg-type]
            waiting_for="a compute node" if state == "waiting" else "",
            pid=os.getpid(),
            busy_s=self._device.busy_s,
            layers=self._layers + sum(tenant.layers for tenant in self._tenants.values()),
            sequences=sum(tenant.sequences for tenant in tenants),
            kv_tokens_total=sum(tenant.kv_tokens_total for tenant in tenants),
            kv_tokens_free=sum(tenant.kv_tokens_free for tenant in tenants),
            stale_tags=self._stale_tags + sum(tenant.stale_tags for tenant in self._tenants.values()),
            tenants=tenants,
        )

    @staticmethod
    def _describe(tenant: Tenant) -> TenantStatus:
        return TenantStatus(
            name=tenant.name,
            model=tenant.attach.model,
            compute_nodes=[shard.peer for _, shard in sorted(tenant.shards.items())],
            sequences=len(tenant.cache.sequences),
            kv_tokens_total=tenant.cache.capacity_tokens,
            kv_tokens_free=tenant.cache.free_tokens,
            quota=tenant.memory.nbytes,
            busy_s=tenant.share.busy_s,
        )
