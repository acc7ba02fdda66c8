"""A tenant of a memory node: the KV cache of one model, which all of the tenant's compute nodes share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from torch import Tensor

from lamina.attention import BackendFactory, KVLayout, MemoryRange, Rows, Run, create_backend
from lamina.errors import ProtocolError
from lamina.memory.fair_queue import Share, Turns
from lamina.wire.geometry import Geometry
from lamina.wire.tenants import KEY_BYTES, Attach, Publish, Release, Reserve

if TYPE_CHECKING:
    from lamina.memory.serving import AttentionShard


class Tenant:
    """What a memory node has for the compute nodes that attach as one tenant; ``attach`` is what its front asked for.

    Its ``shards`` are their links, by the numbers of the compute nodes, and ``numbers`` are all that there ever were.
    ``grown`` is set when more of a sequence is there, or the sequence is over. ``layers`` and ``stale_tags`` count over
    all links. Made and closed in the device's thread, which also does everything else with the cache; shards come and
    go in the node's.
    """

    def __init__(self, attach: Attach, backend: str | BackendFactory, memory: MemoryRange, turns: Turns) -> None:
        """Errors are those of `create_backend`, for ``backend`` over ``memory``."""
        layout = KVLayout(layers=tuple(attach.layers), dtype=attach.kv_dtype, block_tokens=attach.block_tokens)
        device = turns.device
        self.attach = attach
        self.name = attach.tenant
        self.memory = memory
        self.backend = create_backend(backend, layout, memory, threads=device.threads, cpus=device.cpus)
        self.cache = self.backend.cache
        self.geometry = Geometry(layout.layers, attach.dtype, attach.slots, attach.max_rows)
        self.share = Share(turns)
        self.grown = asyncio.Event()
        self.shards: dict[int, AttentionShard] = {}
        self.numbers: set[int] = set()
        self.layers = 0
        self.stale_tags = 0
        self._to_publish: dict[int, list[bytes]] = {}
        """Keys of sequences' leading blocks that are not complete yet."""

    def close(self) -> None:
        """Let go of the memory and of the share; nobody may compute any more."""
        self.share.leave()
        self.backend.close()

    # -- compute nodes

    def check(self, attach: Attach) -> None:
        """ProtocolError for another compute node that is there already, or does not want the same as the front."""
        number = attach.compute
        if number in self.shards:
            raise ProtocolError(
                f"compute node {number} of tenant {self.name} is attached already, as {self.shards[number].peer}; "
                f"numbers must differ"
            )
        for name in Attach.__struct_fields__:
            own, asked = getattr(self.attach, name), getattr(attach, name)
            if name in ("compute", "outputs") or own == asked:
                continue
            if name == "layers":
                name, own, asked = _difference(own, asked)
            raise ProtocolError(
                f"compute node {number} of tenant {self.name} asks for {name} {asked!s:.300}, its front asked for "
                f"{own!s:.300}; all compute nodes of a tenant have to ask for the same"
            )

    def join(self, number: int, shard: AttentionShard) -> None:
        self.shards[number] = shard
        self.numbers.add(number)

    # -- space

    def reserve(self, message: Reserve) -> int:
        """Set space aside; how many leading positions are shared. Errors are those of the cache."""
        if message.sequence not in self.cache.sequences:
            keys = _split(message.keys)
            return self.cache.reserve(message.sequence, message.tokens, ahead=message.ahead, keys=keys)
        self.cache.extend(message.sequence, message.tokens)
        return 0

    def publish_or_release(self, message: Publish | Release) -> None:
        if message.sequence not in self.cache.sequences:
            return
        if isinstance(message, Publish):
            self._to_publish[message.sequence] = _split(message.keys)
            self._publish_complete(message.sequence)
        else:
            self._to_publish.pop(message.sequence, None)
            self.cache.release(message.sequence)
            self.grown.set()  # whoever waits for more of it waits in vain, and is to learn that

    def append(self, layer: int, run: Run, k: Tensor, v: Tensor) -> bool:
        """Store keys and values of a prompt; False for a sequence that is over."""
        if run.sequence not in self.cache.sequences:
            return False
        self.backend.append(layer, Rows((run,)), k, v)
        self._publish_complete(run.sequence)
        self.grown.set()
        return True

    def _publish_complete(self, sequence: int) -> None:
        """Publish what is to be, once all of it has arrived."""
        keys = self._to_publish.get(sequence)
        if keys and self.cache.complete(sequence) >= len(keys) * self.cache.layout.block_tokens:
            self.cache.publish(sequence, self._to_publish.pop(sequence))


def _split(keys: bytes) -> list[bytes]:
    """ProtocolError unless they are keys, one after the other."""
    if len(keys) % KEY_BYTES:
        raise ProtocolError(f"{len(keys)} bytes of keys; expected a multiple of {KEY_BYTES}")
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _difference(own: list[object], asked: list[object]) -> tuple[str, object, object]:
    """Where two lists of layers differ first: in their number, or what is there."""
    if len(own) != len(asked):
        return "a number of layers of", len(own), len(asked)
    i = next(i for i, (one, other) in enumerate(zip(own, asked, strict=True)) if one != other)
    return f"layer {i}", own[i], asked[i]
