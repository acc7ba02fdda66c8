"""The memory daemon: waits for a compute node, holds its KV cache, attends for it. It needs no model."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from lamina.attention import Backend, Memory
from lamina.device import Device
from lamina.engine.shard import AttentionShard, make_backend
from lamina.errors import LaminaError, TransportError
from lamina.node.daemon import DRAIN_TIMEOUT_S, answer
from lamina.protocol import AskStatus, Attach, Failed, Refused, Status, decode, encode
from lamina.transport import Address, Hello, Link, Listener

log = logging.getLogger("lamina.memory")


class MemoryNode:
    """One memory node with ``nbytes`` of KV cache, which serves one compute node at a time."""

    def __init__(self, name: str, listen: Address, nbytes: int, device: Device, *, peer_timeout: float = 2.0) -> None:
        self._name = name
        self._listen = listen
        self._nbytes = nbytes
        self._peer_timeout = peer_timeout
        self._device = device
        self._memory: Memory | None = None
        self._shard: AttentionShard | None = None
        self._owner = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[Link] = set()
        self._draining = False

    async def serve(self, stopping: asyncio.Event) -> None:
        """Listen until ``stopping`` is set, then wait for the compute node to leave, for a bounded time."""
        self._memory = await self._device.run(Memory, self._nbytes)
        hello = Hello("memory", self._name)
        listener = await Listener.open(self._listen, hello, self._on_link, peer_timeout=self._peer_timeout)
        log.info("event=listening address=%s memory_bytes=%d", listener.address, self._nbytes)
        try:
            await stopping.wait()
            self._draining = True
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=DRAIN_TIMEOUT_S)
        finally:
            await listener.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*(link.close() for link in self._links))
            self._device.close()

    def _on_link(self, link: Link) -> None:
        self._links.add(link)
        if link.peer.role == "client":
            refusal = f"{self._name} is a memory node; clients talk to the compute node"
            link.send(encode(Failed(kind="RequestError", message=refusal)))

        def on_message(plain: dict[str, Any]) -> None:
            match decode(plain, Attach | AskStatus):
                case Attach() as attach:
                    self._attach(link, attach)
                case AskStatus():
                    answer(link, self._status())

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
        try:
            assert self._memory is not None
            backend = await self._device.run(make_backend, attach, self._memory)
            self._shard = AttentionShard(link, attach, backend, self._device)
            log.info(
                "event=attached peer=%s model=%s layers=%d kv_heads=%d capacity_tokens=%d",
                peer,
                attach.model,
                len(attach.layers),
                attach.layers[0].kv_heads,
                backend.cache.capacity_tokens,
            )
            await self._shard.serve()
        except* TransportError as group:
            log.info("event=detached peer=%s reason=%r", peer, str(group.exceptions[0]))
        except* LaminaError as group:
            await self._give_up(link, str(group.exceptions[0]))
        except* Exception as group:
            log.exception("event=shard_failed peer=%s", peer)
            await self._give_up(link, f"internal error: {group.exceptions[0]!r}")
        finally:
            if backend is not None:
                await self._device.run(backend.close)
            self._owner, self._shard = "", None
            self._links.discard(link)

    async def _give_up(self, link: Link, reason: str) -> None:
        """Tell the compute node why nothing more will come."""
        log.error("event=shard_failed peer=%s reason=%r", link.peer.name, reason)
        if not link.closed:
            link.send(encode(Refused(reason=reason)))
        await link.close()

    def _status(self) -> Status:
        shard = self._shard
        state = "draining" if self._draining else "ready" if shard else "waiting"
        return Status(
            name=self._name,
            role="memory",
            state=state,  # type: ignore[arg-type]
            waiting_for="" if shard else "a compute node",
            pid=os.getpid(),
            busy_s=self._device.busy_s,
            layers=shard.layers if shard else 0,
            sequences=len(shard.cache.sequences) if shard else 0,
            kv_tokens_total=shard.cache.capacity_tokens if shard else 0,
            kv_tokens_free=shard.cache.free_tokens if shard else 0,
            stale_tags=shard.stale_tags if shard else 0,
        )
