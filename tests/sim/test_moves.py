"""Blocks move from one memory node to another, while the sequence goes on and whatever befalls the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
import torch
from msgspec.structs import replace

from lamina.attention import LayerShape, Partial, Run, attend, merge
from lamina.config import NodeConfig
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.link import LinkModel
from lamina.transport import Address, Hello, Lane, Link, Options, Region
from lamina.wire import moves
from lamina.wire.codec import encode
from lamina.wire.moves import MOVE_HEADER, Join, Joined, MoveGeometry, MoveHeader, layout_digest
from lamina.wire.plan import StepPlan
from lamina.wire.tags import Kind, pack
from lamina.wire.tenants import Attach, Expected, Moved, MoveFailed, Refused, Reserved
from tests.sim.clusters import LINK, PEER_TIMEOUT_S, WINDOWS, eventually, simulate_memory
from tests.sim.raw import RawCompute, asking, raw_compute

SHAPE = LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25)
LAYERS = [SHAPE, LayerShape(q_heads=4, kv_heads=4, qk_dim=16, v_dim=32, scale=0.3), SHAPE]
BLOCK = 16
MEMORY = 1 << 20
SLOW = LinkModel(latency_s=1e-4, bytes_per_s=2e6)
"""A move of some blocks takes a tenth of a second."""
T = 7
"""The number of a transfer."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a transfer has many more of them than there are buffers."""
    monkeypatch.setattr(moves, "MOVE_BYTES", 12 << 10)


class Context:
    """q, k and v of every layer and position of one sequence, and the attention that they must give."""

    def __init__(self, positions: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: str, dim: str) -> list[torch.Tensor]:
            sizes = [(getattr(shape, heads), getattr(shape, dim)) for shape in LAYERS]
            return [torch.randn(positions, 1, *size, generator=generator) for size in sizes]

        self.q, self.k = normal("q_heads", "qk_dim"), normal("kv_heads", "qk_dim")
        self.v = normal("kv_heads", "v_dim")

    def exact(self, layer: int, position: int) -> torch.Tensor:
        k, v = (x[layer][: position + 1, 0].double() for x in (self.k, self.v))
        return attend(self.q[layer][position], k, v, shape=LAYERS[layer], q_start=position).o

    async def decode(self, lies: Lies, position: int, tolerance: float = 1e-5) -> None:
        """A step with one row, which is stored on the first node of ``lies`` behind all that is there; the past lies on
        all of them. Its attention has to be right."""
        (owner, own), *others = lies.nodes.items()
        run = Run(lies.sequence, own, 1)
        plans = {owner: StepPlan((run,), (), 0 if any(n for _, n in others) else 1)}
        plans |= {node: StepPlan((), (Run(lies.sequence, n, 1),), 0) for node, n in others if n}
        for node, plan in plans.items():
            node.plan(position, plan)
        for layer, shape in enumerate(LAYERS):
            for node in plans:
                node.query(layer, position, self.q[layer][position])
            owner.key_value(layer, position, self.k[layer][position], self.v[layer][position])
            for node in plans:
                tag = await node.answer()
                assert (tag.kind, tag.layer) == (Kind.OUTPUT, layer)
            if len(plans) == 1:
                found = owner.output(plans[owner], layer)
            else:
                found = _merged([node.partial(plan, layer) for node, plan in plans.items()]).o
            torch.testing.assert_close(found, self.exact(layer, position).float(), rtol=tolerance, atol=tolerance)
            assert shape.q_heads == found.shape[1]
        lies.nodes[owner] += 1


def _merged(parts: list[Partial]) -> Partial:
    whole, *others = parts
    for other in others:
        whole = merge(whole, other)
    return whole


class Lies(NamedTuple):
    """Where a sequence lies: how many positions each node has; the first of them stores the next."""

    sequence: int
    nodes: dict[RawCompute, int]


class Pair(NamedTuple):
    """A front at two memory nodes."""

    source: RawCompute
    target: RawCompute
    nodes: tuple[NodeConfig, NodeConfig]
    cluster: SimCluster

    async def free(self, name: str) -> int:
        return sum(tenant.kv_tokens_free for tenant in (await self.cluster.status(name)).tenants)

    async def used(self) -> tuple[int, int]:
        """Blocks in use on both nodes."""
        tenants = [(await self.cluster.status(node.name)).tenants[0] for node in self.nodes]
        first, second = ((tenant.kv_tokens_total - tenant.kv_tokens_free) // BLOCK for tenant in tenants)
        return first, second

    def send(self, transfer: int, sequence: int, first: int, blocks: int) -> None:
        self.source.send_blocks(transfer, sequence, first, blocks, self.nodes[1])


@asynccontextmanager
async def pair(cluster: SimCluster, *, back: dict[str, Any] | None = None, **told: Any) -> AsyncIterator[Pair]:
    """``back``: what the front says to the second node alone."""
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(raw_compute(cluster, LAYERS, **told))
        target = await stack.enter_async_context(raw_compute(cluster, LAYERS, node="m1", **{**told, **(back or {})}))
        yield Pair(source, target, (cluster.config.find("m0"), cluster.config.find("m1")), cluster)


async def fill(node: RawCompute, context: Context, positions: int, *, sequence: int = 1, tokens: int = 0) -> Lies:
    """Store the first positions of a sequence on one node, as a prompt."""
    assert isinstance(await node.reserve(sequence, tokens or positions + 1), Reserved)
    buffer = 0
    for layer in range(len(LAYERS)):
        for start in range(0, positions, 32):
            stop = min(positions, start + 32)
            node.chunk(buffer % 8, sequence, layer, start, context.k[layer][start:stop], context.v[layer][start:stop])
            buffer += 1
            if buffer % 8 == 0:
                await asyncio.sleep(5)  # until the buffers are free again; no time passes but virtual
    await asyncio.sleep(5)
    return Lies(sequence, {node: positions})


async def moved(both: Pair, transfer: int = T) -> None:
    """Both ends say that all is there."""
    for node in (both.source, both.target):
        assert await node.move() == Moved(transfer=transfer)


@pytest.mark.parametrize("link", [LINK, WINDOWS, SLOW], ids=["written", "windows", "slow"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_a_sequence_goes_on_while_its_blocks_move(link: LinkModel, kv_dtype: str) -> None:
    """Before, during and after a move its attention is right; the space is freed where the blocks were, and a second
    move brings others to the same node."""
    context, tolerance = Context(300), 1e-5 if kv_dtype == "float32" else 0.08

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster, kv_dtype=kv_dtype) as both:
            lies = await fill(both.source, context, 150, tokens=300)
            position = 150
            for number, (first, blocks) in enumerate([(2, 5), (0, 3)]):
                transfer, before = T + number, await both.used()
                assert await both.target.expect(transfer, blocks) == Expected(transfer=transfer)
                assert await both.used() == (before[0], before[1] + blocks)
                both.send(transfer, lies.sequence, first, blocks)
                while both.target.moves.empty() or both.source.moves.empty():
                    await context.decode(lies, position, tolerance)
                    position += 1
                await moved(both, transfer)
                new = Lies(lies.sequence + 1, {node: lies.nodes.get(node, 0) for node in (both.source, both.target)})
                new.nodes[both.source] -= blocks * BLOCK
                new.nodes[both.target] += blocks * BLOCK
                told: dict[str, Any] = {"parent": lies.sequence, "without": (first, blocks)}
                answer = await both.source.reserve(new.sequence, 300 - new.nodes[both.target], **told)
                assert answer == Reserved(sequence=new.sequence, shared=new.nodes[both.source])
                told = {"transfer": transfer, "parent": lies.sequence if number else None}
                answer = await both.target.reserve(new.sequence, new.nodes[both.target], **told)
                assert answer == Reserved(sequence=new.sequence, shared=new.nodes[both.target])
                for node in new.nodes:
                    node.release(lies.sequence)
                lies = new
                for _ in range(20):
                    await context.decode(lies, position, tolerance)
                    position += 1
            assert await both.used() == (19 - 8, 8)
            for node in lies.nodes:
                node.release(lies.sequence)
            assert await both.used() == (0, 0)

    simulate_memory(work, nodes=2, link=link, memory=MEMORY)


def test_one_move_after_another_goes_over_one_link() -> None:
    """In their order; the link is closed when there has been nothing to send for a while, and opened again."""
    context = Context(200)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            await fill(both.source, context, 160)

            def between() -> int:
                """Links between the two."""
                ends = [link.info for link in cluster.world.network._links]
                return sum(end.local.role == end.peer.role == "memory" for end in ends) // 2

            for transfer in range(5):
                await both.target.expect(transfer, 2)
            for transfer in range(5):
                both.send(transfer, 1, 2 * transfer, 2)
            assert [(await both.target.move()).transfer for _ in range(5)] == [0, 1, 2, 3, 4]
            assert [(await both.source.move()).transfer for _ in range(5)] == [0, 1, 2, 3, 4]
            assert between() == 1
            await asyncio.sleep(12)
            assert between() == 0
            await both.target.expect(T, 1)
            both.send(T, 1, 0, 1)
            await moved(both)
            assert between() == 1

    simulate_memory(work, nodes=2)


# -- what is refused


def test_without_space_nothing_moves() -> None:
    """The sequence goes on, and no block is lost."""
    context = Context(200)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            lies = await fill(both.source, context, 100, tokens=200)
            total = (await cluster.status("m1")).kv_tokens_total
            await both.target.reserve(9, total - 3 * BLOCK)
            before = await both.used()

            answer = await both.target.expect(T, 4)

            assert answer == MoveFailed(transfer=T, reason="transfer 7 needs 4 blocks of KV cache, 3 are free")
            assert await both.used() == before
            await both.target.expect(T, 3)
            both.send(T, 1, 0, 3)
            await moved(both)
            answer = await both.target.reserve(2, 3 * BLOCK + 1, transfer=T)
            assert isinstance(answer, Refused)
            assert "sequence 2 needs 49 tokens of KV cache, 0 of" in answer.reason
            assert await both.used() == (before[0], before[1] + 3)
            both.target.forget(T)
            for position in range(100, 110):
                await context.decode(lies, position)
            assert await both.used() == before

    simulate_memory(work, nodes=2)


ANOTHER = [LayerShape(q_heads=4, kv_heads=4, qk_dim=16, v_dim=16, scale=0.25)] * 3


async def _too_many(both: Pair) -> None:
    await both.target.expect(T, 5)
    both.send(T, 1, 2, 5)


async def _unknown(both: Pair) -> None:
    await both.target.expect(T, 1)
    both.send(T, 5, 0, 1)


async def _unexpected(both: Pair) -> None:
    both.send(T, 1, 0, 1)


async def _nobody(both: Pair) -> None:
    both.source.send_blocks(T, 1, 0, 1, replace(both.nodes[1], name="m5"))


async def _nowhere(both: Pair) -> None:
    both.source.send_blocks(T, 1, 0, 1, replace(both.nodes[1], address=Address("tcp", "127.0.0.1", 9)))


REFUSED: dict[str, tuple[Callable[[Pair], Any], str]] = {
    "blocks that are not full": (_too_many, "sequence 1 has 6 full blocks; expected 7 at least, from 2 on"),
    "an unknown sequence": (_unknown, "sequence 5 holds no reservation in this KV cache"),
    "what nobody expects": (_unexpected, "does not expect it any more"),
    "another node's name": (_nobody, "is memory node m1; expected memory node m5"),
    "an address where nobody is": (_nowhere, "no link within"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_sent_is_refused(what: str) -> None:
    """The source says why, and serves on; the next move succeeds."""
    context = Context(120)
    ask, words = REFUSED[what]

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            lies = await fill(both.source, context, 100, tokens=120)
            await ask(both)
            answer = await both.source.move()
            assert isinstance(answer, MoveFailed)
            assert words in answer.reason
            both.target.forget(T)
            await context.decode(lies, 100)
            assert await both.used() == (8, 0)
            assert (await both.target.expect(T + 1, 6)) == Expected(transfer=T + 1)
            both.send(T + 1, 1, 0, 6)
            await moved(both, T + 1)

    simulate_memory(work, nodes=2)


@pytest.mark.parametrize(
    ("back", "words"),
    [
        ({"token": b"that of somebody else"}, "no tenant t with this token is here"),
        ({"tenant": "u"}, "no tenant t with this token is here"),
        ({"model": "another"}, "blocks of tenant t hold something else here"),
        ({"kv_dtype": "int8"}, "blocks of tenant t hold something else here"),
        ({"first_heads": [4, 4, 4]}, "blocks of tenant t hold something else here"),
    ],
)
def test_another_tenant_gets_nothing(back: dict[str, Any], words: str) -> None:
    """Nor does one whose blocks mean something else."""
    context = Context(60)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster, back=back) as both:
            await fill(both.source, context, 50)
            await both.target.expect(T, 2)
            both.send(T, 1, 0, 2)
            answer = await both.source.move()
            assert isinstance(answer, MoveFailed)
            assert words in answer.reason
            assert both.target.moves.empty()

    simulate_memory(work, nodes=2)


def test_windows_do_not_move() -> None:
    layers = [SHAPE, LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25, window=20)]

    async def work(cluster: SimCluster) -> None:
        async with raw_compute(cluster, layers) as front:
            await front.reserve(1, 40)
            words = "blocks cannot be moved or derived, as attention depends on positions"
            assert await front.expect(T, 1) == MoveFailed(transfer=T, reason=words)
            assert await front.reserve(2, 40, parent=1) == Refused(reason=words, sequence=2)

    simulate_memory(work)


def test_a_sequence_is_made_only_of_what_is_wholly_there() -> None:
    context = Context(160)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            await fill(both.source, context, 150)
            await both.target.expect(T, 8)
            both.send(T, 1, 0, 8)
            await asyncio.sleep(0.05)
            answer = await both.target.reserve(2, 200, transfer=T)
            assert isinstance(answer, Refused)
            assert answer.reason == "sequence 2 is to have transfer 7, which is not wholly here yet"
            await moved(both)
            for told, words in (
                ({"parent": 5}, "sequence 5 holds no reservation"),
                ({"transfer": 8}, "transfer 8 is not expected"),
                ({"transfer": T, "tokens": 100}, "sequence 2 has 8 blocks of 16, but space for 100 tokens"),
            ):
                answer = await both.target.reserve(2, told.pop("tokens", 128), **told)
                assert isinstance(answer, Refused)
                assert words in answer.reason
            assert isinstance(await both.target.reserve(2, 128, transfer=T), Reserved)

    simulate_memory(work, nodes=2, link=SLOW)


# -- losses

MOMENTS = [0.0, 0.001, 0.004, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12]
"""Seconds after the transfer was asked for; it takes about a tenth of a second."""


BEGUN_S = 0.02
"""When some of it is there."""


async def _end_of(node: RawCompute) -> Moved | MoveFailed:
    answer = await node.move()
    assert isinstance(answer, Moved | MoveFailed)
    return answer


@pytest.mark.parametrize("after_s", MOMENTS)
@pytest.mark.parametrize("how", ["kill target", "kill source", "freeze target", "freeze source", "cut"])
def test_no_loss_costs_a_block(how: str, after_s: float) -> None:
    """Each end that lives says how the transfer ended, within the time in which a silent node is found, and has all
    blocks again when the front gives it up. A sequence that lives goes on."""
    context = Context(200)
    verb, *who = how.split()
    victim = {"source": "m0", "target": "m1"}[who[0]] if who else None

    async def work(cluster: SimCluster) -> None:
        network, loop = cluster.world.network, asyncio.get_running_loop()
        async with pair(cluster) as both:
            lies = await fill(both.source, context, 150, tokens=200)
            await both.target.expect(T, 8)
            both.send(T, 1, 1, 8)
            await asyncio.sleep(after_s)
            begun_s = loop.time()
            if verb == "kill":
                assert victim is not None
                cluster.kill(victim)
            elif verb == "freeze":
                assert victim is not None
                network.freeze(victim)
            else:
                network.cut("m0", "m1")
            if victim != "m0":
                await _end_of(both.source)
                for position in range(150, 155):
                    await context.decode(lies, position)
            if victim != "m1":
                if after_s >= BEGUN_S:  # the target knows from which link the blocks come
                    await _end_of(both.target)
                both.target.forget(T)
                await eventually(lambda: _has_used(both, "m1", 0))
            assert loop.time() - begun_s < PEER_TIMEOUT_S + 1.5
            if victim != "m0":
                assert await _has_used(both, "m0", 13)
                both.source.release(1)
                assert await _has_used(both, "m0", 0)
            if verb == "freeze":
                assert victim is not None
                await both.source.link.close() if victim == "m0" else await both.target.link.close()
                network.thaw(victim)
            elif verb == "cut":
                network.mend("m0", "m1")

    simulate_memory(work, nodes=2, link=SLOW)


async def _has_used(both: Pair, name: str, blocks: int) -> bool:
    (tenant,) = (await both.cluster.status(name)).tenants
    return tenant.kv_tokens_total - tenant.kv_tokens_free == blocks * BLOCK


@pytest.mark.parametrize("after_s", MOMENTS)
@pytest.mark.parametrize("how", ["forget", "release", "restart"])
def test_a_move_can_be_given_up_at_any_moment(how: str, after_s: float) -> None:
    """By the front at both ends, or because the sequence is over, or because the front leaves the target. No block is
    lost, and other moves go on over the same link."""
    context = Context(200)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster, lease=5.0) as both:
            lies = await fill(both.source, context, 150, tokens=200)
            await fill(both.source, context, 33, sequence=5, tokens=33)
            await both.target.expect(T, 8)
            both.send(T, 1, 1, 8)
            await asyncio.sleep(after_s)
            if how == "forget":
                for node in (both.source, both.target):
                    node.forget(T)
            elif how == "release":
                both.source.release(1)
                if isinstance(await _end_of(both.source), Moved):
                    assert await both.target.move() == Moved(transfer=T)
                both.target.forget(T)
            else:
                await both.target.link.close()
                await _end_of(both.source)
                await eventually(lambda: _has_used(both, "m1", 0))
                await context.decode(lies, 150)
                return
            await eventually(lambda: _has_used(both, "m1", 0))
            while not both.source.moves.empty():
                both.source.moves.get_nowait()
            while not both.target.moves.empty():
                both.target.moves.get_nowait()
            await both.target.expect(T + 1, 2)
            both.send(T + 1, 5, 0, 2)
            await moved(both, T + 1)
            assert isinstance(await both.target.reserve(6, 33, transfer=T + 1), Reserved)
            if how == "forget":
                await context.decode(lies, 150)
            await context.decode(Lies(6, {both.target: 32}), 32)

    simulate_memory(work, nodes=2, link=SLOW)


@pytest.mark.parametrize("operation", ["_stage", "_store"])
def test_a_node_that_stalls_ends_the_move(operation: str) -> None:
    """A device that stands still while its node sends heartbeats: the other end gives up after the time in which a
    silent node is found."""
    context, node = Context(200), {"_stage": "m0", "_store": "m1"}[operation]
    stalls = False

    def seconds(config: NodeConfig) -> Any:
        def of(name: str, at: Place | None) -> float:
            return 8.0 if stalls and name == operation and config.name == node else 1e-6

        return of

    async def work(cluster: SimCluster) -> None:
        nonlocal stalls
        async with pair(cluster) as both:
            await fill(both.source, context, 150, tokens=200)
            await both.target.expect(T, 8)
            both.send(T, 1, 1, 8)
            await asyncio.sleep(0.02)
            stalls = True
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            other = both.target if operation == "_stage" else both.source
            answer = await _end_of(other)
            assert isinstance(answer, MoveFailed)
            words = "has sent no block" if operation == "_stage" else "has stored no block"
            assert f"{words} within {PEER_TIMEOUT_S:g} s" in answer.reason
            assert loop.time() - begun_s < PEER_TIMEOUT_S + 1.5
            await eventually(
                lambda: _has_used(both, "m0" if other is both.source else "m1", 13 * (other is both.source))
            )

    simulate_memory(work, nodes=2, link=LinkModel(latency_s=1e-4, bytes_per_s=1e5), seconds=seconds)


# -- beside decode


def test_a_step_waits_for_one_chunk_at_most_in_each_operation() -> None:
    """However much moves at both ends, and whatever else the device has to do."""
    chunk_s, costs = 4e-4, {"_past": 1e-4, "_finish": 1e-5}
    context = Context(900)

    def seconds(config: NodeConfig) -> Any:
        return lambda name, at: chunk_s if name in ("_stage", "_store") else costs.get(name, 0.0)

    async def work(cluster: SimCluster) -> None:
        loop = asyncio.get_running_loop()
        async with pair(cluster) as both:
            lies = await fill(both.source, context, 800, tokens=900)
            other = await fill(both.target, context, 60, sequence=3, tokens=200)

            async def step_s(of: Lies, position: int) -> float:
                begun_s = loop.time()
                await context.decode(of, position)
                return loop.time() - begun_s

            alone = max([await step_s(lies, 800 + i) for i in range(5)])
            blocks, steps, position = 48, 0, 805
            for transfer in range(3):
                await both.target.expect(transfer, blocks)
                both.send(transfer, 1, 0, blocks)
            # Three operations a layer and plan: past, finish and the plan itself.
            worst = alone + (2 * len(LAYERS) + 1) * chunk_s
            while both.source.moves.qsize() < 3 and position < 890:
                assert await step_s(lies, position) <= worst * 1.001
                assert await step_s(other, 60 + steps) <= worst * 1.001
                steps, position = steps + 1, position + 1
            assert steps > 3

    simulate_memory(work, nodes=2, memory=16 << 20, seconds=seconds)


# -- a memory node that is none


class RawSender:
    """A link to m1 as of a memory node, which says what no real one would."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.credits: asyncio.Queue[int] = asyncio.Queue()
        self.lost = asyncio.Event()
        self.region = Region("credits", 64)
        link.deliver(
            on_message=self.answers.put_nowait,
            on_tag=lambda _, tag: self.credits.put_nowait(tag),
            on_lost=lambda _: self.lost.set(),
        )

    async def join(self, **told: Any) -> Joined:
        attach = _attach_of(**told)
        token = told.get("token", b"the tenant's own")
        self.link.send(
            encode(Join(tenant="t", token=token, layout=layout_digest(attach), credits=self.link.expose(self.region)))
        )
        answer = await asyncio.wait_for(self.answers.get(), 10)
        assert answer["type"] == "Joined", answer
        self.chunks = Joined(chunks=answer["chunks"]).chunks
        return Joined(chunks=answer["chunks"])

    def chunk(self, buffer: int, header: MoveHeader, nbytes: int = 0) -> None:
        g = MoveGeometry(tuple(LAYERS), "float32", BLOCK)
        source = header.pack().ljust(MOVE_HEADER, b"\0") + bytes(nbytes)
        self.link.write(Lane.BULK, self.chunks, buffer * g.chunk_bytes, [source], pack(Kind.CHUNK, 0, 0, buffer))


def _attach_of(**told: Any) -> Attach:
    return Attach(**asking(LAYERS, **told), outputs=(1, "outputs", 64))  # type: ignore[arg-type]


WRONG: dict[str, Callable[[RawSender], object]] = {
    "a piece too late": lambda sender: sender.chunk(0, MoveHeader(T, 1, 5)),
    "too many pieces": lambda sender: sender.chunk(0, MoveHeader(T, 0, 100)),
    "too few pieces": lambda sender: sender.chunk(0, MoveHeader(T, 0, 1)),
    "no such buffer": lambda sender: sender.link.write(Lane.BULK, sender.chunks, 0, [], pack(Kind.CHUNK, 0, 0, 8)),
    "a tag of a step": lambda sender: sender.link.write(Lane.DECODE, sender.chunks, 0, [], pack(Kind.QUERY, 0, 0, 0)),
    "a message": lambda sender: sender.link.send({"type": "Joined"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_memory_node_may_not_send_ends_its_link_alone(what: str) -> None:
    """The transfer that it may have begun is over, and its space free; the tenant serves on."""
    context = Context(40)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            lies = await fill(both.target, context, 30)
            await both.target.expect(T, 2)
            address = both.nodes[1].address
            async with await cluster.world.network.connect(
                address, Hello("memory", "m0"), Options(), deadline_s=5
            ) as link:
                sender = RawSender(link)
                await sender.join()
                WRONG[what](sender)
                await asyncio.wait_for(sender.lost.wait(), 10)
            both.target.forget(T)
            await context.decode(lies, 30)
            assert await _has_used(both, "m1", 2)

    simulate_memory(work, nodes=2)


def test_chunks_that_nobody_expects_are_dropped() -> None:
    """They get a credit that says so, and change nothing."""
    context = Context(40)

    async def work(cluster: SimCluster) -> None:
        async with pair(cluster) as both:
            lies = await fill(both.target, context, 30)
            async with await cluster.world.network.connect(
                both.nodes[1].address, Hello("memory", "m0"), Options(), deadline_s=5
            ) as link:
                sender = RawSender(link)
                await sender.join()
                for buffer in range(8):
                    sender.chunk(buffer, MoveHeader(99, 0, 3))
                assert [await sender.credits.get() for _ in range(8)] == [
                    pack(Kind.CREDIT, 1, 0, buffer) for buffer in range(8)
                ]
                await context.decode(lies, 30)

    simulate_memory(work, nodes=2)
