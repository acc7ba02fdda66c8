"""The memory daemon: waits for a compute node, holds its KV cache, attends for it. It needs no model."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from lamina import probe
from lamina.attention import Backend, Memory, default_backend
from lamina.attention.backend import require_backend
from lamina.attention.native.library import choose_isa
from lamina.attention.pool import numa_node_of, numa_nodes
from lamina.config import NodeConfig
from lamina.device import Device
from lamina.engine.shard import AttentionShard, make_backend
from lamina.errors import ConfigError, LaminaError, TransportError
from lamina.node.daemon import DRAIN_TIMEOUT_S, answer
from lamina.node.tracing import Tracing
from lamina.protocol import AskSpans, AskStatus, Attach, Failed, Record, Refused, Status, decode, encode
from lamina.transport import Hello, Link, Listener, Options

log = logging.getLogger("lamina.memory")


class MemoryNode:
    """The memory node ``node`` of a cluster, which serves one compute node at a time.

    The memory for KV cache is the node's: taken when it starts, and lent to one compute node after the other.
    """

    def __init__(self, node: NodeConfig, options: Options) -> None:
        self._node = node
        self._name = node.name
        self._options = options
        self._device = Device(cpus=node.pinned, threads=node.threads)
        self._tracing = Tracing(self._device)
        self._attention: str = node.attention or "auto"
        self._taken: asyncio.Future[Memory] | None = None
        self._shard: AttentionShard | None = None
        self._owner = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[Link] = set()
        self._echoes = probe.Echoes()
        self._draining = False

    async def serve(self, stopping: asyncio.Event) -> None:
        """Listen until ``stopping`` is set, then wait for the compute node to leave, for a bounded time."""
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
            await asyncio.gather(*(link.close() for link in self._links))
            self._device.close()

    def _take(self) -> Memory:
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
        return memory

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
        if link.peer.role == probe.ROLE:
            self._echoes.take(link)
            return
        if link.peer.role == "compute":
            link.lane_loop = self._device.loop
        self._links = {*(known for known in self._links if not known.closed), link}
        if link.peer.role == "client":
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

        link.on_message = on_message
        link.on_lost = lambda _: self._links.discard(link)

    def _attach(self, link: Link, attach: Attach) -> None:
        if link.peer.role != "compute":
            link.abort(f"a {link.peer.role} must not attach")
            return
        if self._draining:
            link.send(encode(Refused(reason="is draining and takes no compute node")))
            return
        if self._owner:
            link.send(encode(Refused(reason=f"already serves compute node {self._owner}, and serves one at a time")))
            return
        self._owner = link.peer.name
        link.on_message = lambda _: link.abort("a message before the answer to Attach")
        task = asyncio.get_running_loop().create_task(self._serve_shard(link, attach))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_shard(self, link: Link, attach: Attach) -> None:
        """Hold a shard for the compute node at the other end until the link ends."""
        peer = link.peer.name
        backend: Backend | None = None
        refusal = ""
        try:
            assert self._taken is not None
            memory = await asyncio.shield(self._taken)
            backend = await self._device.run(make_backend, attach, self._attention, memory, self._device)
            self._shard = AttentionShard(link, attach, backend, self._device)
            log.info(
                "event=attached peer=%s transport=%s choice=%r model=%s layers=%d kv_heads=%d capacity_tokens=%d",
                peer,
                link.transport,
                link.choice,
                attach.model,
                len(attach.layers),
                attach.layers[0].kv_heads,
                backend.cache.capacity_tokens,
            )
            await self._shard.serve()
        except* TransportError as group:
            reason = str(group.exceptions[0])
            if link.closed:
                log.info("event=detached peer=%s reason=%r", peer, reason)
            else:  # it sent what cannot be, over a link that is in order
                refusal = reason
        except* LaminaError as group:
            refusal = str(group.exceptions[0])
        except* Exception as group:
            log.exception("event=shard_failed peer=%s", peer)
            refusal = f"internal error: {group.exceptions[0]!r}"
        finally:
            if backend is not None:
                await self._device.run(backend.close)
            self._owner, self._shard = "", None
        if refusal:  # whoever comes next need not wait until this one has heard it
            await self._give_up(link, refusal)
        self._links.discard(link)

    async def _give_up(self, link: Link, reason: str) -> None:
        """Tell the compute node why nothing more will come."""
        log.error("event=shard_failed peer=%s reason=%r", link.peer.name, reason)
        if not link.closed:
            link.send(encode(Refused(reason=reason)))
        await link.close()

    def _status(self) -> Status:
        shard = self._shard
        there = self._taken is not None and self._taken.done()
        state = "draining" if self._draining else "ready" if shard else "waiting" if there else "starting"
        return Status(
            name=self._name,
            role="memory",
            state=state,  # type: ignore[arg-type]
            waiting_for="a compute node" if state == "waiting" else "",
            pid=os.getpid(),
            busy_s=self._device.busy_s,
            layers=shard.layers if shard else 0,
            sequences=len(shard.cache.sequences) if shard else 0,
            kv_tokens_total=shard.cache.capacity_tokens if shard else 0,
            kv_tokens_free=shard.cache.free_tokens if shard else 0,
            stale_tags=shard.stale_tags if shard else 0,
        )
