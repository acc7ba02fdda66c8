"""What a compute node and memory nodes agree on about space and shared prompts, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from lamina.attention import KVLayout, LayerShape
from lamina.device import Device
from lamina.engine.geometry import shard_by_heads
from lamina.engine.prefix import PrefixKeys
from lamina.engine.prompts import PromptKV
from lamina.engine.remote import RemoteShard
from lamina.errors import CapacityError, NodeError
from lamina.protocol import AskStatus, Status, decode, encode
from lamina.transport import Address, Hello, connect
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

    def __init__(self, shards: list[RemoteShard], device: Device) -> None:
        self.shards = shards
        self._device = device
        self._ids = itertools.count()

    async def reserve(self, tokens: int, keys: list[bytes] | None = None) -> tuple[int, int]:
        """A new sequence, and how many leading positions of it all memory nodes have."""
        sequence = next(self._ids)
        return sequence, min([await shard.reserve(sequence, tokens, keys or []) for shard in self.shards])

    async def extend(self, sequence: int, tokens: int) -> None:
        for shard in self.shards:
            await shard.reserve(sequence, tokens)

    def release(self, sequence: int) -> None:
        for shard in self.shards:
            shard.release(sequence)

    def publish(self, sequence: int, keys: list[bytes]) -> None:
        for shard in self.shards:
            shard.publish(sequence, keys)

    async def ship(self, sequence: int, tokens: int) -> None:
        """Send keys and values of the first positions, layer by layer."""
        kept = PromptKV(sequence, tokens, LAYERS, torch.float32, torch.device("cpu"))
        for shard in self.shards:
            for layer in range(len(LAYERS)):
                await self._device.run(shard.ship, kept, layer, 0, tokens, 0)

    async def share(self, keys: list[bytes]) -> int:
        """How much another prompt with these keys finds now."""
        sequence, shared = await self.reserve(len(PROMPT) + 1, keys)
        self.release(sequence)
        return shared


@contextlib.asynccontextmanager
async def attached(ports: list[int]) -> AsyncIterator[Ends]:
    names, device = ["m0", "m1"], Device(threads=1)
    await harness.eventually(lambda: unattached(ports))
    async with contextlib.AsyncExitStack() as stack:
        shards, running = [], []
        for name, port, heads in zip(names, ports, shard_by_heads(LAYERS, names), strict=True):
            address = Address.parse(f"127.0.0.1:{port}")
            link = await stack.enter_async_context(await connect(address, Hello("compute", "c0"), deadline_s=20))
            layout = KVLayout(layers=heads.layers, dtype="float32", block_tokens=BLOCK)
            shard = RemoteShard(name, link, heads, layout, device, dtype="float32", slots=1, max_rows=4)
            await shard.attach("m")
            running.append(device.start(shard.run()))
            shards.append(shard)
        try:
            yield Ends(shards, device)
        finally:
            for sending in running:
                sending.cancel()
    device.close()


async def status(port: int) -> Status:
    """What a memory node says of itself."""
    async with await connect(Address.parse(f"127.0.0.1:{port}"), Hello("monitor", "test"), deadline_s=20) as link:
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        link.on_message = lambda plain: answer.set_result(decode(plain, Status))
        link.send(encode(AskStatus()))
        return await answer


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
            capacity = min(shard.capacity_tokens for shard in ends.shards)
            first, _ = await ends.reserve(16)
            for tokens in range(32, capacity + 1, 16):
                await ends.extend(first, tokens)
            with pytest.raises(CapacityError, match=f"needs 16 more tokens of KV cache, 0 of {capacity} are free"):
                await ends.extend(first, capacity + 16)
            with pytest.raises(CapacityError, match="memory node m0: "):
                await ends.reserve(16)
            ends.release(first)
            second, _ = await ends.reserve(16)
            ends.release(second)
            await settled(ports)

    asyncio.run(main())


def test_blocks_are_shared_when_all_of_them_has_arrived(ports: list[int]) -> None:
    """However early they are published; and they are found again after their sequence is over."""
    keys = KEYS.keys(PROMPT)

    async def main() -> None:
        async with attached(ports) as ends:
            first, shared = await ends.reserve(len(PROMPT) + 10, keys)
            assert shared == 0
            ends.publish(first, keys)
            assert await ends.share(keys) == 0
            await ends.ship(first, len(PROMPT))

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
            sequence, _ = await ends.reserve(len(PROMPT), keys)
            ends.publish(sequence, keys)
            ends.release(sequence)
            await ends.ship(sequence, len(PROMPT))
            assert await ends.share(keys) == 0
            await settled(ports)

    asyncio.run(main())


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_compute_node_that_asks_for_less_than_it_has_is_sent_away(ports: list[int], tokens: int) -> None:
    """It is in error, and must not go on; the memory node is there for the next one."""

    async def main() -> None:
        async with attached(ports) as ends:
            sequence, _ = await ends.reserve(16)
            with pytest.raises((CapacityError, NodeError), match="holds 16 tokens; expected more for an extension"):
                await ends.extend(sequence, tokens)

    asyncio.run(main())
