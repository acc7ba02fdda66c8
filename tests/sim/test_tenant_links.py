"""What a memory node answers to the links of its tenants, in order and out of it, without a model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lamina.attention import LayerShape, Run, attend
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.link import LinkModel
from lamina.wire.plan import StepPlan
from lamina.wire.tags import Kind
from lamina.wire.tenants import Publish, Refused, Reserved
from tests.sim.clusters import LINK, WINDOWS, eventually, simulate_memory
from tests.sim.raw import RawCompute, raw_compute

SHAPE = LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25)
LAYERS = [SHAPE, LayerShape(q_heads=4, kv_heads=2, qk_dim=16, v_dim=16, scale=0.25, window=5), SHAPE]
MEMORY = 1 << 20


def step_of(position: int, answers: tuple[int, ...] = ()) -> StepPlan:
    """A step with one row, of sequence 1."""
    return StepPlan((Run(1, position, 1),), (), 1, answers)


class Rows:
    """q, k and v of one row of every layer and position, and the attention that they must give."""

    def __init__(self, positions: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(len(LAYERS), positions, 1, 4, 16, generator=generator)
        self.k, self.v = torch.randn(2, len(LAYERS), positions, 1, 2, 16, generator=generator)

    def ask(self, compute: RawCompute, layer: int, position: int, *, slot: int = 0) -> None:
        compute.query(layer, position, self.q[layer, position], slot=slot)
        compute.key_value(layer, position, self.k[layer, position], self.v[layer, position], slot=slot)

    def check(self, compute: RawCompute, layer: int, position: int, *, slot: int = 0) -> None:
        k, v = (x[layer, : position + 1, 0] for x in (self.k, self.v))
        expected = attend(self.q[layer, position], k, v, shape=LAYERS[layer], q_start=position).o
        torch.testing.assert_close(compute.output(step_of(position), layer, slot=slot), expected)

    async def decode(self, compute: RawCompute, position: int, *, slot: int = 0) -> None:
        """A whole step over one link, whose answers have to be right."""
        compute.plan(position, step_of(position), slot=slot)
        for layer in range(len(LAYERS)):
            self.ask(compute, layer, position, slot=slot)
            answer = await compute.answer()
            assert (answer.kind, answer.slot, answer.layer, answer.step) == (Kind.OUTPUT, slot, layer, position)
            self.check(compute, layer, position, slot=slot)


@pytest.mark.parametrize("link", [LINK, WINDOWS], ids=["written", "windows"])
@pytest.mark.parametrize(
    "layers_of_front", [(0,), (0, 1), (0, 2), (1,)], ids=["first", "range", "every other", "middle"]
)
def test_answers_go_where_the_next_layer_runs(link: LinkModel, layers_of_front: tuple[int, ...]) -> None:
    """Two links of one tenant run different layers, over one cache; each reads what the other asked for."""
    rows, runs = Rows(20), [int(layer not in layers_of_front) for layer in range(3)]
    answers = (*runs[1:], runs[0])

    async def work(memory: SimCluster) -> None:
        async with (
            raw_compute(memory, LAYERS, slots=2) as front,
            raw_compute(memory, LAYERS, slots=2, member=1) as other,
        ):
            nodes = [front, other]
            assert isinstance(await front.reserve(1, 20), Reserved)
            for position in range(20):
                for node in nodes:
                    node.plan(position, step_of(position, answers), slot=1)
                for layer in range(3):
                    rows.ask(nodes[runs[layer]], layer, position, slot=1)
                    receiver = nodes[answers[layer]]
                    answer = await receiver.answer()
                    assert (answer.slot, answer.layer, answer.step) == (1, layer, position)
                    rows.check(receiver, layer, position, slot=1)
            assert all(node._answers.empty() for node in nodes)
            (tenant,) = (await memory.status("m0")).tenants
            assert (tenant.compute_nodes, tenant.sequences) == (["t0", "t1"], 1)
            front.release(1)

    simulate_memory(work, link=link)


async def refusal(memory: SimCluster, layers: list[LayerShape] = LAYERS, **told: Any) -> str:
    """Why a compute node is not taken."""
    with pytest.raises(AssertionError) as refused:
        async with raw_compute(memory, layers, **told):
            pass
    return str(refused.value)


def test_a_compute_node_that_does_not_fit_its_tenant_is_refused() -> None:
    """With both values; the tenant goes on."""
    one, rows = {"member": 1}, Rows(2)

    async def work(memory: SimCluster) -> None:
        assert "wants to join tenant t, which is not here (tenants: none)" in await refusal(memory, **one)
        async with raw_compute(memory, LAYERS) as front, raw_compute(memory, LAYERS, member=2):
            assert "compute node 2 of tenant t is attached already, as t2" in await refusal(memory, member=2)
            assert "which is not here (tenants: t)" in await refusal(memory, tenant="u", **one)
            differing = {
                "model": ("n", "model n, its front asked for m"),
                "dtype": ("bfloat16", "dtype bfloat16, its front asked for float32"),
                "slots": (3, "slots 3, its front asked for 1"),
                "max_rows": (9, "max_rows 9, its front asked for 8"),
                "block_tokens": (32, "block_tokens 32, its front asked for 16"),
                "quota": (4096, "quota 4096, its front asked for None"),
            }
            for key, (value, message) in differing.items():
                assert f"compute node 1 of tenant t asks for {message}" in await refusal(memory, **one, **{key: value})
            assert "a number of layers of 2, its front asked for 3" in await refusal(memory, LAYERS[:2], **one)
            assert "asks for layer 1 LayerShape(" in await refusal(memory, [SHAPE] * 3, **one)
            await front.reserve(1, 2)
            for position in range(2):
                await rows.decode(front, position)

    simulate_memory(work)


@pytest.mark.parametrize("message", [Publish(sequence=1, keys=b""), "reserve", "release"])
def test_only_the_front_says_what_is_kept(message: Any) -> None:
    rows = Rows(2)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front:
            await front.reserve(1, 2)
            async with raw_compute(memory, LAYERS, member=1) as other:
                await rows.decode(other, 0)
                if message == "reserve":
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(other.reserve(2, 2), 0.1)
                elif message == "release":
                    other.release(1)
                else:
                    other.send(message)
                await other.end()
            await rows.decode(front, 1)
            assert (await memory.status("m0")).sequences == 1

    simulate_memory(work)


def test_without_a_lease_a_tenant_ends_with_its_front() -> None:
    """The others are told why, and the next has all of the memory."""

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front:
            assert (await memory.status("m0")).tenants[0].quota == MEMORY
            async with raw_compute(memory, LAYERS, member=1) as one, raw_compute(memory, LAYERS, member=7) as seven:
                await front.link.close()
                for other in (one, seven):
                    assert "tenant t has ended, as its front t0 is gone: " in await other.end()
        async with raw_compute(memory, LAYERS, tenant="u"):
            assert (await memory.status("m0")).tenants[0].quota == MEMORY

    simulate_memory(work)


def test_what_a_lost_link_should_get_is_dropped() -> None:
    """The step's other links go on, and what was stored is there for whoever attaches next under that number."""
    rows = Rows(3)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front:
            await front.reserve(1, 3)
            async with raw_compute(memory, LAYERS, member=1):
                await rows.decode(front, 0)
            before = (await memory.status("m0")).layers
            front.plan(1, step_of(1, (1, 0, 0)))
            rows.ask(front, 0, 1)

            async def stored() -> bool:
                return (await memory.status("m0")).layers == before + 1

            await eventually(stored)
            for layer in (1, 2):
                rows.ask(front, layer, 1)
                assert (await front.answer()).layer == layer
                rows.check(front, layer, 1)
            async with raw_compute(memory, LAYERS, member=1) as again:
                await rows.decode(again, 2)

    simulate_memory(work)


def test_answers_to_nobody_are_refused() -> None:
    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front, raw_compute(memory, LAYERS, member=3) as other:
            await front.reserve(1, 2)
            other.plan(0, step_of(0, (3, 2, 0)))
            assert await other.end() == "step plan sends answers to compute node 2; tenant t has compute nodes [0, 3]"
            await Rows(1).decode(front, 0)

    simulate_memory(work)


def test_quotas_are_what_a_tenant_gets() -> None:
    """Exactly that, next to each other; what is refused says who has how much, and whoever leaves makes room."""
    quarter = MEMORY // 4

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, tenant="a", quota=quarter) as first:
            async with (
                raw_compute(memory, LAYERS, tenant="b", quota=quarter),
                raw_compute(memory, LAYERS, tenant="c") as rest,
            ):
                tenants = {t.name: t for t in (await memory.status("m0")).tenants}
                assert {t.name: t.quota for t in tenants.values()} == {"a": quarter, "b": quarter, "c": 2 * quarter}
                assert tenants["a"].kv_tokens_total == tenants["b"].kv_tokens_total < tenants["c"].kv_tokens_total
                total = await memory.status("m0")
                assert total.kv_tokens_total == sum(t.kv_tokens_total for t in tenants.values())
                have = f"(a has {quarter}, b has {quarter}, c has {2 * quarter})"
                assert f"none of the {MEMORY} bytes of memory is free {have}" in await refusal(memory, tenant="d")
                refused = await refusal(memory, tenant="d", quota=4096)
                assert f"a quota of 4096 bytes cannot be had: of {MEMORY} bytes 0 are free" in refused
                assert have in refused
                # A tenant's own space ends at its quota, whatever others have.
                tokens = tenants["a"].kv_tokens_total
                assert isinstance(await first.reserve(1, tokens), Reserved)
                assert isinstance(await first.reserve(2, 1), Refused)
                assert isinstance(await rest.reserve(1, tokens), Reserved)

            async def alone() -> bool:
                return len((await memory.status("m0")).tenants) == 1

            await eventually(alone)
            refused = await refusal(memory, tenant="d", quota=MEMORY)
            assert f"{3 * quarter} are free, {3 * quarter} of them in one piece (a has {quarter})" in refused
            assert "cannot hold one block" in await refusal(memory, tenant="d", quota=64)
            async with raw_compute(memory, LAYERS, tenant="d"):
                assert [t.quota for t in (await memory.status("m0")).tenants] == [quarter, 3 * quarter]

    simulate_memory(work)


def test_nothing_of_a_tenant_is_seen_by_the_next() -> None:
    """Whatever the one has left in the memory, NaN above all, the other's attention is right."""

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, tenant="sick") as sick:
            rows, tokens = Rows(1), (await memory.status("m0")).kv_tokens_total
            rows.k.fill_(torch.nan)
            rows.v.fill_(torch.nan)
            for sequence in range(tokens // 16):
                await sick.reserve(sequence, 16)
                for layer in range(len(LAYERS)):
                    sick.plan(layer, StepPlan((Run(sequence, 0, 8),), (), 0))
                    sick.query(layer, layer, rows.q[0, 0].expand(8, -1, -1))
                    sick.key_value(layer, layer, *(x[0, 0].expand(8, -1, -1) for x in (rows.k, rows.v)))
                    await sick.answer()
        async with raw_compute(memory, LAYERS) as well:
            await well.reserve(1, 20)
            rows = Rows(20)
            for position in range(20):
                await rows.decode(well, position)

    simulate_memory(work)


READ = StepPlan((), (Run(1, 5, 1),), 0)
BAD: dict[str, tuple[StepPlan, Callable[[RawCompute, Rows], object], str]] = {
    "two queries at once": (
        step_of(5),
        lambda node, rows: (node.query(0, 5, rows.q[0, 5]), node.query(1, 5, rows.q[1, 5])),
        "a query of layer 1 in step 5 of batch slot 0, after one of layer 0 that is not answered",
    ),
    "a query of no layer": (
        step_of(5),
        lambda node, rows: node.query(3, 5, rows.q[0, 5]),
        "a query of layer 3 in step 5 of batch slot 0, after one of layer -1; expected increasing layers below 3",
    ),
    "k and v before q": (
        step_of(5),
        lambda node, rows: node.key_value(0, 5, rows.k[0, 5], rows.v[0, 5]),
        "keys and values of layer 0 in step 5 of batch slot 0",
    ),
    "k and v of another layer": (
        step_of(5),
        lambda node, rows: (node.query(1, 5, rows.q[1, 5]), node.key_value(0, 5, rows.k[0, 5], rows.v[0, 5])),
        "keys and values of layer 0 in step 5 of batch slot 0",
    ),
    "k and v twice": (
        step_of(5),
        lambda node, rows: (rows.ask(node, 0, 5), node.key_value(0, 5, rows.k[0, 5], rows.v[0, 5])),
        "keys and values of layer 0 in step 5 of batch slot 0",
    ),
    "k and v of rows that are not stored": (
        READ,
        lambda node, rows: rows.ask(node, 0, 5),
        "keys and values of layer 0 in step 5",
    ),
    "no such slot": (
        step_of(5),
        lambda node, rows: node.tag(Kind.QUERY, slot=1, step=5),
        "tag for batch slot 1; this link has 1",
    ),
    "no such buffer": (
        step_of(5),
        lambda node, rows: node.tag(Kind.CHUNK, step=8),
        "bulk chunk in buffer 8; there are 8",
    ),
    "no such kind": (step_of(5), lambda node, rows: node.tag(7), "unknown kind 7"),
    "no such position": (
        StepPlan((Run(1, 17, 1),), (), 1),
        lambda node, rows: None,
        "step plan names position 17 of sequence 1, which has space for 10",
    ),
}


@pytest.mark.parametrize("when", ["planned", "asked", "attended"])
def test_a_step_whose_sequence_is_gone_is_given_up(when: str) -> None:
    """At whichever point the sequence is released: the compute node is told, and its next step is served."""
    rows = Rows(10)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as node:
            for sequence in (1, 2):
                await node.reserve(sequence, 10)
            if when == "planned":
                node.release(1)
                await asyncio.sleep(0.1)
            node.plan(0, step_of(0))
            if when == "asked":
                await asyncio.sleep(0.1)
                node.release(1)
                await asyncio.sleep(0.1)
            node.query(0, 0, rows.q[0, 0])
            if when == "attended":
                await asyncio.sleep(0.1)
                node.release(1)
                await asyncio.sleep(0.1)
            node.key_value(0, 0, rows.k[0, 0], rows.v[0, 0])
            await asyncio.sleep(0.1)
            (void,) = node.voids
            assert (void.slot, void.step, void.sequences) == (0, 0, [1])
            node.plan(1, StepPlan((Run(2, 0, 1),), (), 1))
            node.query(0, 1, rows.q[0, 0])
            node.key_value(0, 1, rows.k[0, 0], rows.v[0, 0])
            assert (await node.answer()).step == 1

    simulate_memory(work)


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("number", [0, 1])
def test_what_may_not_arrive_ends_its_link_alone(what: str, number: int, caplog: pytest.LogCaptureFixture) -> None:
    """The log says what it was. The front's link takes its tenant along; another tenant is not disturbed."""
    told, send, message = BAD[what]
    rows = Rows(10)

    async def work(memory: SimCluster) -> None:
        async with (
            raw_compute(memory, LAYERS, quota=MEMORY // 2) as front,
            raw_compute(memory, LAYERS, quota=MEMORY // 2, member=1) as other,
            raw_compute(memory, LAYERS, tenant="innocent", quota=MEMORY // 2) as innocent,
        ):
            odd = (front, other)[number]
            for each in (front, innocent):
                await each.reserve(1, 10)
            for position in range(5):
                await rows.decode(innocent, position)
                await rows.decode(odd, position)
            odd.plan(5, told)
            send(odd, rows)
            await odd.end()
            assert message in caplog.text
            for position in range(5, 10):
                await rows.decode(innocent, position)
            if number:
                for position in range(5, 10):
                    await rows.decode(front, position)
            else:
                assert "has ended" in await other.end()

    simulate_memory(work)


def test_what_comes_too_late_is_counted() -> None:
    """Tags of other steps, and kinds that only the other end sends, change nothing."""
    rows = Rows(5)

    async def work(memory: SimCluster) -> None:
        before = (await memory.status("m0")).stale_tags
        async with raw_compute(memory, LAYERS) as node:
            await node.reserve(1, 5)
            for position in range(5):
                await rows.decode(node, position)
                node.tag(Kind.QUERY, layer=0, step=position + 1)
                node.tag(Kind.KEY_VALUE, layer=0, step=1000)
                node.tag(Kind.OUTPUT, step=position)
                node.tag(Kind.CREDIT)
            assert node._answers.empty()
            assert (await memory.status("m0")).stale_tags == before + 20

    simulate_memory(work)


@pytest.mark.parametrize("seed", range(12))
def test_random_tags_do_no_harm(seed: int) -> None:
    """Links that send nothing but nonsense end or are ignored; nobody else notices."""
    chance, rows = random.Random(seed), Rows(20)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, tenant="innocent", quota=MEMORY // 2) as innocent:
            await innocent.reserve(1, 20)
            for position in range(20):
                async with raw_compute(memory, LAYERS, tenant=f"odd{position}", quota=MEMORY // 2, slots=2) as odd:
                    await odd.reserve(1, 20)
                    odd.plan(0, step_of(0))
                    for _ in range(chance.randrange(1, 40)):
                        kind, slot = chance.choice([0, 1, 1, 2, 2, 2, 3, 4, 5]), chance.randrange(2)
                        if not odd.link.state.closed:
                            odd.tag(kind, slot, chance.randrange(4), chance.randrange(2))
                        if chance.random() < 0.3:
                            await asyncio.sleep(0)
                    await rows.decode(innocent, position)
                await eventually(lambda: only_innocent(memory))

    simulate_memory(work)


async def only_innocent(memory: SimCluster) -> bool:
    return [tenant.name for tenant in (await memory.status("m0")).tenants] == ["innocent"]


def test_long_contexts_take_nothing_from_others() -> None:
    """Many expensive operations wait beside a few cheap ones all the time: both tenants get the device for as long."""
    costs = {"heavy": 8e-4, "light": 1e-4}
    layers = {"heavy": 1, "light": 2}
    rows, slots, virtual_s = Rows(2), 16, 2.0

    def seconds(name: str, at: Place | None) -> float:
        return sum(costs[tenant] for tenant in costs if name == "_past" and at and at.layer == layers[tenant])

    async def fill(raw: RawCompute) -> None:
        await raw.reserve(1, 2)
        await rows.decode(raw, 0)

    async def ask(raw: RawCompute, layer: int, waiting: int, done: asyncio.Event) -> None:
        """Keep so many steps waiting."""
        told = StepPlan((), (Run(1, 1, 1),), 0)
        for slot in range(waiting):
            raw.plan(1, told, slot=slot)
            raw.query(layer, 1, rows.q[0, 1], slot=slot)
        while not done.is_set():
            answer = await raw.answer()
            raw.plan(answer.step % 1000 + 1, told, slot=answer.slot)
            raw.query(layer, answer.step % 1000 + 1, rows.q[0, 1], slot=answer.slot)

    async def work(memory: SimCluster) -> None:
        given: dict[str, Any] = {"slots": slots, "quota": MEMORY // 2}
        async with (
            raw_compute(memory, LAYERS, tenant="heavy", **given) as heavy,
            raw_compute(memory, LAYERS, tenant="light", **given) as light,
        ):
            for raw in (heavy, light):
                await fill(raw)
            done = asyncio.Event()
            asked = [asyncio.ensure_future(ask(*one, done)) for one in ((heavy, 1, 16), (light, 2, 6))]

            async def busy_s() -> list[float]:
                return [tenant.busy_s for tenant in (await memory.status("m0")).tenants]

            await asyncio.sleep(0.1)
            before = await busy_s()
            await asyncio.sleep(virtual_s)
            spent = [after - then for then, after in zip(before, await busy_s(), strict=True)]
            done.set()
            await asyncio.gather(*asked)
            assert sum(spent) == pytest.approx(virtual_s, rel=0.01), "the device was busy all the time"
            # Neither gets ahead by more than one operation of each.
            assert abs(spent[0] - spent[1]) <= sum(costs.values()) * 1.001, spent

    simulate_memory(work, seconds=lambda node: seconds)


def test_a_node_that_drains_takes_no_compute_node() -> None:
    """Not even another compute node of a tenant that it still serves."""

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front:
            await front.reserve(1, 3)
            stopping = asyncio.ensure_future(memory.stop("m0"))
            rows = Rows(2)
            await rows.decode(front, 0)
            assert (await memory.status("m0")).state == "draining"
            for told in ({"member": 1}, {"tenant": "u"}):
                assert "is draining and takes no compute node" in await refusal(memory, **told)
            await rows.decode(front, 1)
        await stopping

    simulate_memory(work)
