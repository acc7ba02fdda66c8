"""What a compute node and memory nodes agree on about space and shared prompts, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import torch

from lamina.attention import KVLayout, LayerShape
from lamina.compute.prompts import PromptKV
from lamina.compute.shard_control import ShardControl
from lamina.errors import CapacityError, NodeError
from lamina.front.prefix import PrefixKeys
from lamina.front.sequence import CacheChanges, ReservationRequest, Sequence
from lamina.front.space import Space
from lamina.node.model import open_checkpoint
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Hello, Options
from lamina.wire.geometry import shard_by_heads
from lamina.wire.placement import Placement
from lamina.wire.requests import Request
from tests.sim.clusters import LINK, eventually, make_config

BLOCK = 16
LAYERS = [LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25)] * 2
KEYS = PrefixKeys(model="m", dtype="float32", kv_dtype="float32", block_tokens=BLOCK)
PROMPT = [random.Random(1).randrange(300) for _ in range(100)]


class Ends:
    """The compute node's ends of the ways to all memory nodes."""

    def __init__(self, shards: dict[int, ShardControl], device: Device, cluster: SimCluster) -> None:
        self.cluster = cluster
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
                self._there.post(self.shards[member].lane.queue_prompt, kept, layer, 0, tokens, 0)

    async def share(self, keys: list[bytes], nodes: slice = slice(None)) -> int:
        """How much another prompt with these keys finds now."""
        ask = self.ask(len(PROMPT) + 1, keys)
        shared = await self.reserve(ask, nodes)
        self.release(ask, nodes)
        return shared


@contextlib.asynccontextmanager
async def attached(cluster: SimCluster) -> AsyncIterator[Ends]:
    """A compute node that is attached to both memory nodes, and runs nothing."""
    world, memory = cluster.world, cluster.config.memory_nodes
    device, names = world.device("c0", lambda name, at: 0.0), [node.name for node in memory]
    async with contextlib.AsyncExitStack() as stack:
        shards, running = {}, []
        for member, (node, heads) in enumerate(zip(memory, shard_by_heads(LAYERS, names), strict=True), 1):
            link = await world.network.connect(node.address, Hello("compute", "c0"), Options(), deadline_s=20)
            await stack.enter_async_context(link)
            layout = KVLayout(layers=heads.layers, dtype="float32", block_tokens=BLOCK)
            shards[member] = shard = ShardControl(member, node.name, link, device, lambda member, error: None)
            lane = await shard.attach(
                heads,
                layout,
                tenant="m",
                token=bytes(16),
                model="m",
                dtype="float32",
                slots=1,
                max_rows=4,
                member=0,
                front=0,
            )
            running.append(asyncio.ensure_future(lane.send_prompts(device)))
        try:
            yield Ends(shards, device, cluster)
            assert not any(task.done() for task in running), running
        finally:
            for task in running:
                task.cancel()


def attach(work: Callable[[Ends], Awaitable[None]]) -> None:
    """Run ``work`` with a compute node that is attached to two memory nodes."""
    config = make_config(memory=256 << 10)

    async def main(world: World) -> None:
        cluster = SimCluster(world, config, open_model=open_checkpoint)
        for node in config.memory_nodes:
            await cluster.start(node.name)
        async with attached(cluster) as ends:
            await work(ends)
        assert await cluster.stop_all() == {"m0": None, "m1": None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


async def settled(ends: Ends) -> None:
    """Wait until no memory node holds anything."""

    async def idle() -> bool:
        states = [await ends.cluster.status(name) for name in ("m0", "m1")]
        return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in states)

    await eventually(idle)


def test_a_sequence_takes_more_space_as_it_goes_on() -> None:
    """Until there is none, which leaves it what it has; a release gives all of it back."""

    async def work(ends: Ends) -> None:
        capacity = min(shard.capacity_tokens for shard in ends.shards.values())
        first = ends.ask(16)
        await ends.reserve(first)
        for tokens in range(32, capacity + 1, 16):
            await ends.reserve(ReservationRequest(first.sequence, first.id, ends.everywhere, tokens, tokens - 16))
        with pytest.raises(CapacityError, match=f"needs 16 more tokens of KV cache, 0 of {capacity} are free"):
            await ends.reserve(ReservationRequest(first.sequence, first.id, ends.everywhere, capacity + 16, capacity))
        second = ends.ask(16)
        with pytest.raises(CapacityError, match="memory node m0: "):
            await ends.reserve(second)
        ends.release(first)
        await ends.reserve(second)
        ends.release(second)
        await settled(ends)

    attach(work)


def test_blocks_are_shared_when_all_of_them_has_arrived() -> None:
    """However early they are published; and they are found again after their sequence is over."""
    keys = KEYS.keys(PROMPT)

    async def work(ends: Ends) -> None:
        first = ends.ask(len(PROMPT) + 10, keys)
        assert await ends.reserve(first) == 0
        ends.publish(first, keys)
        assert await ends.share(keys) == 0
        ends.ship(first, len(PROMPT))

        async def found() -> bool:
            return await ends.share(keys) == 96

        await eventually(found)
        other = KEYS.keys([*PROMPT[:40], 0, *PROMPT[41:]])
        assert await ends.share(other) == 32
        assert await ends.share(KEYS.keys(PROMPT, salt="mine")) == 0
        ends.release(first)
        assert await ends.share(keys) == 96
        await settled(ends)

    attach(work)


def test_a_sequence_that_ends_early_publishes_nothing() -> None:
    """What arrives of it afterwards is dropped."""
    keys = KEYS.keys(PROMPT, salt="early")

    async def work(ends: Ends) -> None:
        ask = ends.ask(len(PROMPT), keys)
        await ends.reserve(ask)
        ends.publish(ask, keys)
        ends.release(ask)
        await settled(ends)
        ends.ship(ask, len(PROMPT))
        assert await ends.share(keys) == 0
        await settled(ends)

    attach(work)


def test_all_memory_nodes_share_equally_much() -> None:
    """The least of what each has, though one has more; then what is missing is stored everywhere, and found."""
    keys = KEYS.keys(PROMPT, salt="uneven")
    both, left, right = slice(None), slice(0, 1), slice(1, 2)

    async def work(ends: Ends) -> None:
        for blocks, node in ((4, left), (2, right)):
            ask = ends.ask(len(PROMPT), keys)
            assert await ends.reserve(ask, node) == 0
            ends.publish(ask, keys[:blocks], node)
            ends.ship(ask, len(PROMPT), node)

            async def found(node: slice = node, blocks: int = blocks) -> bool:
                return await ends.share(keys, node) == 16 * blocks

            await eventually(found)
            ends.release(ask, node)
        assert await ends.share(keys, both) == 32
        assert await ends.share(keys, left) == 64
        await settled(ends)

    attach(work)


@pytest.mark.parametrize("rounds", range(6))
def test_a_sequence_that_is_over_at_once_leaves_nothing(rounds: int) -> None:
    """Whether its release is decided before the reservation is sent, right after, or while it is answered."""

    async def work(ends: Ends) -> None:
        ask = ends.ask(16)
        ends.decide(CacheChanges(reservations=[ask]))
        for _ in range(rounds):
            await asyncio.sleep(0)
        ends.release(ask)
        await settled(ends)

    attach(work)


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_compute_node_that_asks_for_less_than_it_has_is_sent_away(tokens: int) -> None:
    """It is in error, and must not go on; the memory node is there for the next one."""

    async def work(ends: Ends) -> None:
        ask = ends.ask(16)
        await ends.reserve(ask)
        with pytest.raises(NodeError, match="holds 16 tokens; expected more for an extension"):
            await ends.reserve(ReservationRequest(ask.sequence, ask.id, ends.everywhere, tokens, tokens - 1))

    attach(work)


def test_a_reservation_that_cannot_be_sent_is_refused() -> None:
    """Its request fails, with the reason, and no other. After a loss none is refused, as the loss fails them all."""

    async def work(ends: Ends) -> None:
        answers: list[int | CapacityError] = []
        space = Space(ends.shards, BLOCK, lambda request, answer: answers.append(answer))
        space.apply(CacheChanges(reservations=[ends.ask(1 << 70), ends.ask(40)]))
        await asyncio.sleep(1)
        assert str(answers[0]).startswith("space cannot be reserved: ")
        assert answers[1:] == [0]

        for shard in ends.shards.values():
            shard.link.abort("the test is over")
        space.apply(CacheChanges(reservations=[ends.ask(40)]))
        await asyncio.sleep(1)
        assert len(answers) == 2

    attach(work)
