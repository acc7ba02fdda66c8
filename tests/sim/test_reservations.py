"""What a compute node and memory nodes agree on about space and shared prompts, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
import torch

from lamina.admin import AdminClient
from lamina.attention import KVLayout, LayerShape
from lamina.compute.prompts import PromptKV
from lamina.compute.shard_control import ShardControl
from lamina.errors import CapacityError, NodeError
from lamina.front.prefix import PrefixKeys
from lamina.front.sequence import CacheChanges, ReservationRequest, Sequence
from lamina.front.space import Space
from lamina.runtime.cpu import CpuDevice
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Address, Hello, Options, connect
from lamina.wire.admin import Status
from lamina.wire.geometry import shard_by_heads
from lamina.wire.placement import Placement
from lamina.wire.requests import Request
from tests import harness

BLOCK = 16
LAYERS = [LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25)] * 2
KEYS = PrefixKeys(model="m", dtype="float32", kv_dtype="float32", block_tokens=BLOCK)
PROMPT = [random.Random(1).randrange(300) for _ in range(100)]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    ports = harness.free_ports(2)
    folder, wiring = tmp_path_factory.mktemp("memory"), harness.Wiring()
    nodes = [harness.start_memory(folder, port, memory="256KiB", wiring=wiring) for port in ports]
    with harness.running(*nodes):
        yield ports


class Ends:
    """The compute node's ends of the ways to all memory nodes."""

    def __init__(self, shards: dict[int, ShardControl], device: Device) -> None:
        self.shards = shards
        self.everywhere = Placement(tuple(shards))
        self._space = Space(shards, BLOCK, lambda request, answer: None)
        self._there = Crossing(device.loop)
        self._id = 0

    def ask(self, tokens: int, keys: list[bytes] | None = None) -> ReservationRequest:
        """Something that a new sequence asks for."""
        self._id += 1
        sequence = Sequence(Request([1], 1), [1], 1, frozenset(), id=self._id)
        return ReservationRequest(sequence, self._id, self.everywhere, tokens, keys=tuple(keys or ()))

    async def reserve(self, ask: ReservationRequest, nodes: slice = slice(None)) -> int:
        return await self._space.hold(replace(ask, placement=Placement(self.everywhere.members[nodes])))

    def decide(self, changes: CacheChanges) -> None:
        self._space.apply(changes)

    def release(self, ask: ReservationRequest, nodes: slice = slice(None)) -> None:
        self._space.apply(CacheChanges(released=[ask.id]))

    def publish(self, ask: ReservationRequest, keys: list[bytes], nodes: slice = slice(None)) -> None:
        for member in self.everywhere.members[nodes]:
            self.shards[member].publish(ask.id, keys)

    def ship(self, ask: ReservationRequest, tokens: int, nodes: slice = slice(None)) -> None:
        """Send keys and values of the first positions, layer by layer."""
        kept = PromptKV(ask.id, tokens, LAYERS, torch.float32, torch.device("cpu"))
        zeros = torch.zeros(tokens, LAYERS[0].kv_heads, LAYERS[0].qk_dim)
        for layer in range(len(LAYERS)):
            kept.store(layer, 0, zeros, zeros)
        for member in self.everywhere.members[nodes]:
            for layer in range(len(LAYERS)):
                self._there.post(self.shards[member].lane.ship, kept, layer, 0, tokens, 0)

    async def share(self, keys: list[bytes], nodes: slice = slice(None)) -> int:
        """How much another prompt with these keys finds now."""
        ask = self.ask(len(PROMPT) + 1, keys)
        shared = await self.reserve(ask, nodes)
        self.release(ask, nodes)
        return shared


@contextlib.asynccontextmanager
async def attached(ports: list[int]) -> AsyncIterator[Ends]:
    device = CpuDevice(threads=1)
    device.start()
    there, names = Crossing(device.loop), ["m0", "m1"]
    await harness.eventually(lambda: unattached(ports))
    async with contextlib.AsyncExitStack() as stack:
        shards, running = {}, []
        for member, (name, port, heads) in enumerate(zip(names, ports, shard_by_heads(LAYERS, names), strict=True), 1):
            address = Address.parse(f"127.0.0.1:{port}")
            link = await stack.enter_async_context(await connect(address, Hello("compute", "c0"), deadline_s=20))
            layout = KVLayout(layers=heads.layers, dtype="float32", block_tokens=BLOCK)
            shards[member] = shard = ShardControl(member, name, link, device, lambda member, error: None)
            lane = await shard.attach(
                heads,
                layout,
                tenant="m",
                model="m",
                dtype="float32",
                slots=1,
                max_rows=4,
                member=0,
                front=0,
            )
            running.append(there.start(lane.run(device)))
        try:
            yield Ends(shards, device)
        finally:
            for task in running:
                task.cancel()
    device.close()


async def status(port: int) -> Status:
    """What a memory node says of itself."""
    address, options = Address.parse(f"127.0.0.1:{port}"), Options(kind="control")
    async with await AdminClient.connect(address, options, name="test", deadline_s=20) as asking:
        return await asking.status()


async def unattached(ports: list[int]) -> bool:
    return all([(await status(port)).state == "waiting" for port in ports])


async def settled(ports: list[int]) -> None:
    """Wait until no memory node holds anything."""

    async def idle() -> bool:
        states = [await status(port) for port in ports]
        return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in states)

    await harness.eventually(idle)


def test_a_sequence_takes_more_space_as_it_goes_on(ports: list[int]) -> None:
    """Until there is none, which leaves it what it has; a release gives all of it back."""

    async def main() -> None:
        async with attached(ports) as ends:
            capacity = min(shard.capacity_tokens for shard in ends.shards.values())
            first = ends.ask(16)
            await ends.reserve(first)
            for tokens in range(32, capacity + 1, 16):
                await ends.reserve(ReservationRequest(first.sequence, first.id, ends.everywhere, tokens, tokens - 16))
            with pytest.raises(CapacityError, match=f"needs 16 more tokens of KV cache, 0 of {capacity} are free"):
                await ends.reserve(
                    ReservationRequest(first.sequence, first.id, ends.everywhere, capacity + 16, capacity)
                )
            second = ends.ask(16)
            with pytest.raises(CapacityError, match="memory node m0: "):
                await ends.reserve(second)
            ends.release(first)
            await ends.reserve(second)
            ends.release(second)
            await settled(ports)

    asyncio.run(main())


def test_blocks_are_shared_when_all_of_them_has_arrived(ports: list[int]) -> None:
    """However early they are published; and they are found again after their sequence is over."""
    keys = KEYS.keys(PROMPT)

    async def main() -> None:
        async with attached(ports) as ends:
            first = ends.ask(len(PROMPT) + 10, keys)
            assert await ends.reserve(first) == 0
            ends.publish(first, keys)
            assert await ends.share(keys) == 0
            ends.ship(first, len(PROMPT))

            async def found() -> bool:
                return await ends.share(keys) == 96

            await harness.eventually(found)
            other = KEYS.keys([*PROMPT[:40], 0, *PROMPT[41:]])
            assert await ends.share(other) == 32
            assert await ends.share(KEYS.keys(PROMPT, salt="mine")) == 0
            ends.release(first)
            assert await ends.share(keys) == 96
            await settled(ports)

    asyncio.run(main())


def test_a_sequence_that_ends_early_publishes_nothing(ports: list[int]) -> None:
    """What arrives of it afterwards is dropped."""
    keys = KEYS.keys(PROMPT, salt="early")

    async def main() -> None:
        async with attached(ports) as ends:
            ask = ends.ask(len(PROMPT), keys)
            await ends.reserve(ask)
            ends.publish(ask, keys)
            ends.release(ask)
            await settled(ports)
            ends.ship(ask, len(PROMPT))
            assert await ends.share(keys) == 0
            await settled(ports)

    asyncio.run(main())


def test_all_memory_nodes_share_equally_much(ports: list[int]) -> None:
    """The least of what each has, though one has more; then what is missing is stored everywhere, and found."""
    keys = KEYS.keys(PROMPT, salt="uneven")
    both, left, right = slice(None), slice(0, 1), slice(1, 2)

    async def main() -> None:
        async with attached(ports) as ends:
            for blocks, node in ((4, left), (2, right)):
                ask = ends.ask(len(PROMPT), keys)
                assert await ends.reserve(ask, node) == 0
                ends.publish(ask, keys[:blocks], node)
                ends.ship(ask, len(PROMPT), node)

                async def found(node: slice = node, blocks: int = blocks) -> bool:
                    return await ends.share(keys, node) == 16 * blocks

                await harness.eventually(found)
                ends.release(ask, node)
            assert await ends.share(keys, both) == 32
            assert await ends.share(keys, left) == 64
            await settled(ports)

    asyncio.run(main())


@pytest.mark.parametrize("rounds", range(6))
def test_a_sequence_that_is_over_at_once_leaves_nothing(ports: list[int], rounds: int) -> None:
    """Whether its release is decided before the reservation is sent, right after, or while it is answered."""

    async def main() -> None:
        async with attached(ports) as ends:
            ask = ends.ask(16)
            ends.decide(CacheChanges(reservations=[ask]))
            for _ in range(rounds):
                await asyncio.sleep(0)
            ends.release(ask)
            await settled(ports)

    asyncio.run(main())


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_compute_node_that_asks_for_less_than_it_has_is_sent_away(ports: list[int], tokens: int) -> None:
    """It is in error, and must not go on; the memory node is there for the next one."""

    async def main() -> None:
        async with attached(ports) as ends:
            ask = ends.ask(16)
            await ends.reserve(ask)
            with pytest.raises(NodeError, match="holds 16 tokens; expected more for an extension"):
                await ends.reserve(ReservationRequest(ask.sequence, ask.id, ends.everywhere, tokens, tokens - 1))

    asyncio.run(main())
