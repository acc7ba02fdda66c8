"""A tenant of a memory node has the KV cache of one model, which all its compute nodes share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lamina.attention import BackendFactory, KVLayout, MemoryRange, Rows, Run, create_backend
from lamina.errors import ProtocolError, UsageError
from lamina.memory.fair_queue import FairQueue, Share
from lamina.memory.moves import Arriving
from lamina.wire.admin import TenantStatus
from lamina.wire.geometry import Geometry
from lamina.wire.tenants import KEY_BYTES, Attach, Expect, Publish, Release, Reserve, short_name

if TYPE_CHECKING:
    from lamina.memory.serving import ServingLane


class Tenant:
    """Holds what a memory node has for one tenant: a cache, the backend that attends over it, a share of the device.

    ``attach`` is what the tenant's front asked for; ``name`` is what people are shown. ``lanes`` are the links of its
    compute nodes, by member id, and ``members`` all that were attached in this term of the front. ``grown`` is set when
    more of a sequence is there, or the sequence is over. ``layers`` and ``stale_tags`` count over all links. It belongs
    to the device's loop, and its methods that touch the cache are operations of the device.
    """

    def __init__(self, attach: Attach, backend: str | BackendFactory, memory: MemoryRange, queue: FairQueue) -> None:
        """Errors are those of `create_backend`, for ``backend`` over ``memory``."""
        layout = KVLayout(layers=tuple(attach.layers), dtype=attach.kv_dtype, block_tokens=attach.block_tokens)
        self.device = device = queue.device
        self.attach = attach
        self.name = short_name(attach.tenant)
        self.memory = memory
        self.backend = create_backend(backend, layout, memory, threads=device.threads, cpus=device.cpus)
        self.cache = self.backend.cache
        self.geometry = Geometry(layout.layers, attach.dtype, attach.slots, attach.max_rows)
        self.share = Share(queue)
        self.grown = asyncio.Event()
        self.lanes: dict[int, ServingLane] = {}
        self.members: set[int] = set()
        self.broken: set[int] = set()
        """The sequences that were here when a compute node left: what it had not sent yet of their prompts will not
        come."""
        self.arriving: dict[int, Arriving] = {}
        """The transfers that are expected and not wholly here, by number."""
        self.layers = 0
        self.stale_tags = 0
        self._to_publish: dict[int, deque[tuple[int, list[bytes]]]] = {}
        """By sequence, the keys of blocks that are not complete yet, with the number of the first of them."""

    def close(self) -> None:
        """Let go of the memory and of the share. No lane may serve any more."""
        self.share.close()
        self.backend.close()

    # -- compute nodes

    def join(self, member: int, lane: ServingLane) -> None:
        """A compute node is attached."""
        self.lanes[member] = lane
        self.members.add(member)

    def leave(self, member: int) -> None:
        """A compute node is gone. Answers for it are dropped from now on."""
        if (lane := self.lanes.pop(member, None)) is not None:
            lane.close()
        self.broken.update(self.cache.sequences)
        self.grown.set()

    def take_over(self) -> None:
        """A new term begins: all sequences are over, published blocks stay. No lane may serve any more."""
        for sequence in list(self.cache.sequences):
            self.cache.release(sequence)
        self._to_publish.clear()
        self.broken.clear()
        self.members.clear()

    def describe(self, compute_nodes: list[str], lease_s: float | None) -> TenantStatus:
        """Return what the status of the node says about this tenant."""
        return TenantStatus(
            name=self.name,
            model=self.attach.model,
            compute_nodes=compute_nodes,
            sequences=len(self.cache.sequences),
            kv_tokens_total=self.cache.capacity_tokens,
            kv_tokens_free=self.cache.free_tokens,
            quota=self.memory.nbytes,
            busy_s=self.share.busy_s,
            lease_s=lease_s,
        )

    # -- space

    def reserve(self, message: Reserve) -> int:
        """Set space aside, and return the number of leading positions that are there. Errors are those of the cache."""
        if message.is_derived:
            return self._derive(message)
        if message.sequence not in self.cache.sequences:
            keys = _split(message.keys)
            return self.cache.reserve(message.sequence, message.tokens, ahead=message.ahead, keys=keys)
        self.cache.extend(message.sequence, message.tokens)
        return 0

    def _derive(self, message: Reserve) -> int:
        parent, transfer = message.parent, message.transfer
        if transfer in self.arriving:
            raise UsageError(
                f"sequence {message.sequence} is to have transfer {transfer}, which is not wholly here yet"
            )
        found = self.cache.derive(
            message.sequence, message.tokens, parent=parent, without=message.without or (0, 0), transfer=transfer
        )
        if parent in self.broken:
            self.broken.add(message.sequence)
        return found

    def publish_or_release(self, message: Publish | Release) -> None:
        """Let others share a sequence's leading blocks, or give back its space. A sequence that is over is ignored."""
        if message.sequence not in self.cache.sequences:
            return
        if isinstance(message, Publish):
            self._to_publish.setdefault(message.sequence, deque()).append((message.first, _split(message.keys)))
            self._publish_complete(message.sequence)
        else:
            self._to_publish.pop(message.sequence, None)
            self.broken.discard(message.sequence)
            self.cache.release(message.sequence)
            self.grown.set()  # a step that waits for more of it waits in vain, and is to learn that

    # -- blocks that move

    def expect(self, message: Expect, on_end: Callable[[int, str | None], None]) -> None:
        """Hold space for a transfer, whose end ``on_end`` is told. Errors are those of the cache."""
        self.cache.require_movable()
        self.cache.transfers.expect(message.transfer, message.blocks)
        self.arriving[message.transfer] = Arriving(message.transfer, message.blocks, on_end)

    def end_arrival(self, arriving: Arriving, failure: str | None) -> None:
        """All of a transfer is here; or it has failed, and its space is free. If it was given up, nothing happens."""
        if self.arriving.get(arriving.transfer) is not arriving:
            return
        del self.arriving[arriving.transfer]
        if failure is not None:
            self.cache.transfers.forget(arriving.transfer)
        arriving.on_end(arriving.transfer, failure)

    def forget(self, transfer: int) -> None:
        """Give up a transfer, and free its space unless it belongs to a sequence. Its end is not told."""
        self.arriving.pop(transfer, None)
        if transfer in self.cache.transfers:
            self.cache.transfers.forget(transfer)

    def forget_all(self) -> None:
        """The front is gone: nobody will use what other memory nodes send."""
        for transfer in list(self.cache.transfers):
            self.forget(transfer)

    # -- prompts

    def append(self, layer: int, run: Run, k: Tensor, v: Tensor) -> bool:
        """Store keys and values of a prompt; return False for a sequence that is over."""
        if run.sequence not in self.cache.sequences:
            return False
        self.backend.append(layer, Rows((run,)), k, v)
        self._publish_complete(run.sequence)
        self.grown.set()
        return True

    def _publish_complete(self, sequence: int) -> None:
        """Publish what is to be published, once all of it has arrived."""
        waiting = self._to_publish.get(sequence)
        if not waiting:
            return
        complete = self.cache.complete(sequence) // self.cache.layout.block_tokens
        while waiting and waiting[0][0] + len(waiting[0][1]) <= complete:
            first, keys = waiting.popleft()
            self.cache.publish(sequence, keys, first)
        if not waiting:
            del self._to_publish[sequence]


def find_difference(attach: Attach, front: Attach) -> tuple[str, object, object] | None:
    """Return what is different in the caches that two compute nodes ask for, and how the ``front`` and the other one
    want it; None if they ask for the same."""
    for name in Attach.__struct_fields__:
        own, asked = getattr(front, name), getattr(attach, name)
        if name in ("member", "front", "outputs", "token", "term", "lease") or own == asked:
            continue
        return _layer_difference(own, asked) if name == "layers" else (name, own, asked)
    return None


def check_same(attach: Attach, front: Attach) -> None:
    """Raise ProtocolError if a compute node does not ask for the same as the ``front`` of its tenant."""
    if (difference := find_difference(attach, front)) is not None:
        name, own, asked = difference
        raise ProtocolError(
            f"compute node {attach.member} of tenant {short_name(front.tenant)} asks for {name} {asked!s:.300}, its "
            f"front asked for {own!s:.300}; all compute nodes of a tenant have to ask for the same"
        )


def _split(keys: bytes) -> list[bytes]:
    """Split joined keys into single ones; raise ProtocolError if the length is not that of whole keys."""
    if len(keys) % KEY_BYTES:
        raise ProtocolError(f"{len(keys)} bytes of keys; expected a multiple of {KEY_BYTES}")
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _layer_difference(own: list[object], asked: list[object]) -> tuple[str, object, object]:
    """Return where two lists of layers differ first: in their number, or in a layer."""
    if len(own) != len(asked):
        return "a number of layers of", len(own), len(asked)
    i = next(i for i, (one, other) in enumerate(zip(own, asked, strict=True)) if one != other)
    return f"layer {i}", own[i], asked[i]
