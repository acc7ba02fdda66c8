"""A front takes over what the one before it has left on memory nodes, at any moment."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lamina.attention import Run
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import LaminaError, SupersededError
from lamina.node.assemble import TenantKey
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Address, Options
from lamina.wire.geometry import CHUNKS
from lamina.wire.plan import StepPlan
from lamina.wire.tags import Tag
from lamina.wire.tenants import Detach, Publish, Reserved
from tests.families import VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import (
    BLOCK_TOKENS,
    JITTER,
    LINK,
    generate,
    make_config,
    new_cluster,
    settled,
    simulate_memory,
    statuses,
)
from tests.sim.raw import RawCompute, raw_compute
from tests.sim.test_leases import KEYS, LEASE_S, OTHER, PUBLISHED, lose, only_tenant, shared
from tests.sim.test_tenant_links import LAYERS, Rows

# -- a takeover in the midst of work


async def storm(old: RawCompute, sequence: int, rows: Rows, chance: random.Random) -> None:
    """Use two batch slots and the bulk lane until the link ends: for steps that store, steps that read, and prompts.
    The front, whose sequence is 1, publishes it in the midst of this."""
    answers: list[asyncio.Queue[Tag]] = [asyncio.Queue(), asyncio.Queue()]

    async def receive() -> None:
        while True:
            tag = await old.answer()
            answers[tag.slot].put_nowait(tag)

    async def decode() -> None:
        for position in range(PUBLISHED):
            old.plan(position, StepPlan((Run(sequence, position, 1),), (), 1))
            for layer in range(len(LAYERS)):
                rows.ask(old, layer, position)
                await answers[0].get()
        if sequence == 1:
            old.send(Publish(sequence=1, keys=KEYS))
        for step in range(1000):
            old.plan(step, StepPlan((), (Run(sequence, PUBLISHED, 1),), 0), slot=1)
            old.query(step % len(LAYERS), step, rows.q[0, 0], slot=1)
            await answers[1].get()

    async def write_prompts() -> None:
        for i in range(10_000):
            layer = i % len(LAYERS)
            old.chunk(i % CHUNKS, 2, layer, 0, rows.k[layer, :BLOCK_TOKENS, 0], rows.v[layer, :BLOCK_TOKENS, 0])
            await asyncio.sleep(chance.uniform(0, 2e-3))

    tasks = [asyncio.ensure_future(work()) for work in (receive, decode, write_prompts)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    assert old.ended.done() or old.link.state.closed
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(30))
def test_a_takeover_in_the_midst_of_steps_corrupts_nothing(seed: int) -> None:
    """At whatever moment, while the front before and another compute node go on as if nothing had happened: the new
    front gets the answers to its own steps, over its own keys and values and what was published, and no others."""
    chance = random.Random(seed)
    before, rows = Rows(PUBLISHED + 1, seed=1), Rows(60, seed=2)
    takes = {name: chance.choice([0.0, 1e-5, 3e-4]) for name in ("past", "finish", "plan", "append", "take_over")}

    async def work(memory: SimCluster) -> None:
        given: dict[str, Any] = {"slots": 3, "lease": LEASE_S}
        async with (
            raw_compute(memory, LAYERS, **given) as front,
            raw_compute(memory, LAYERS, **given, member=1) as other,
        ):
            await front.reserve(1, PUBLISHED + BLOCK_TOKENS)
            await front.reserve(2, BLOCK_TOKENS)
            await front.reserve(3, PUBLISHED + BLOCK_TOKENS)
            storms = [
                asyncio.ensure_future(storm(end, sequence, before, chance))
                for sequence, end in ((1, front), (3, other))
            ]
            await asyncio.sleep(chance.uniform(0, 0.1))
            assert not any(each.done() for each in storms)
            if chance.random() < 0.3:
                await lose(front)
                await asyncio.sleep(chance.uniform(0, 1e-3))
            async with raw_compute(memory, LAYERS, **given, term=2) as new:
                found = await shared(new)
                rows.k[:, :found], rows.v[:, :found] = before.k[:, :found], before.v[:, :found]
                await new.reserve(2, 20)
                for position in range(found, PUBLISHED + BLOCK_TOKENS):
                    await rows.decode(new, position, slot=chance.randrange(3))
                assert "superseded" in await other.end()
                await asyncio.gather(*storms)
                assert new._answers.empty()
                tenant = await only_tenant(memory)
                assert (tenant.sequences, tenant.compute_nodes) == (2, ["t0"])
                for sequence in (1, 2):
                    new.release(sequence)
                assert isinstance(await new.reserve(3, tenant.kv_tokens_total), Reserved)
                new.send(Detach())
                await new.end()

    simulate_memory(work, link=JITTER, seconds=lambda node: lambda name, at: takes.get(name.lstrip("_"), 0.0))


def same_front_elsewhere(config: ClusterConfig) -> ClusterConfig:
    """A front of the same cluster that listens at another address, so that both can live at the same time."""
    front = msgspec.structs.replace(config.node[0], listen=Address("tcp", "127.0.0.1", 7900))
    return msgspec.structs.replace(config, node=[front, *config.node[1:]])


@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_two_fronts_of_a_cluster_do_not_mix(
    seed: int, partition: str, llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """A second one takes over while the first answers requests: that one ends, and says why; the answers of the second
    are right."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.choice([3, 40, 90]))] for _ in range(6)]
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, partition=partition)
    config = make_config(llama, pipeline=pipeline)
    moment_s = chance.uniform(0, 0.05)

    async def main(world: World) -> None:
        first = new_cluster(world, same_front_elsewhere(config))
        for node in first.config.node:
            await first.start(node.name)
        # Clients find it where it listens.
        front = first.config.node[0]
        reached = msgspec.structs.replace(front, address=front.bind)
        first.config = msgspec.structs.replace(first.config, node=[reached, *first.config.node[1:]])
        await first.ready()
        async with first.client() as client:
            asked = [asyncio.ensure_future(client.generate(prompt, max_tokens=60)) for prompt in prompts]
            await asyncio.sleep(moment_s)
            second = new_cluster(world, config)
            await second.start("c0")
            await second.ready()
            async with second.client() as other:
                answers = await generate(other, prompts, max_tokens=40)
            results = await asyncio.gather(*asked, return_exceptions=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            agreement.check(oracle, prompt, answer, f"second front, prompt of {len(prompt)}")
        for prompt, result in zip(prompts, results, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, LaminaError), result
            else:
                agreement.check(oracle, prompt, result.tokens, f"first front, prompt of {len(prompt)}")
        error = first.ended["c0"]
        assert isinstance(error, SupersededError)
        assert "superseded by c0, the front of tenant c0-" in str(error)
        await settled(second)
        assert await second.stop_all() == {"c0": None}
        assert all(not status.tenants for status in await statuses(second, ["m0", "m1"]))
        assert (await first.stop_all())["m0"] is None

    with World(seed, model=JITTER, tracing=False) as world:
        world.run(main(world))


# -- whole clusters


ONE, TWO = (None,), (range(2), range(2, 4))
"""The layers of each compute node."""


@pytest.mark.parametrize(
    ("compute", "partition"),
    [
        pytest.param(compute, partition, marks=marks, id=f"{len(compute)}-{partition}")
        for compute, partition, marks in (
            (ONE, "heads", ()),
            (ONE, "requests", pytest.mark.slow),
            (ONE, "tokens", pytest.mark.slow),
            (TWO, "heads", pytest.mark.slow),
            (TWO, "requests", pytest.mark.slow),
            (TWO, "tokens", ()),
        )
    ],
)
def test_a_front_that_was_killed_finds_its_prompts_again(
    compute: tuple[range | None, ...], partition: str, llama: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """Three times, in the midst of other answers, which go on; and nothing of the earlier front takes space."""
    prompt = [(11 * i) % VOCABULARY for i in range(100)]
    pipeline = PipelineConfig(batches=2, prefill_tokens=24, partition=partition)
    config = make_config(llama, compute=compute, pipeline=pipeline)
    names = [node.name for node in config.compute_nodes]

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            async with cluster.client() as client:
                first = await client.generate(prompt, max_tokens=20)
                agreement.check(oracle, prompt, first.tokens, "the first front")
                for i in range(3):
                    others = [asyncio.ensure_future(client.generate([i, t], max_tokens=100)) for t in range(8)]
                    await asyncio.sleep(0.05)
                    for name in names:
                        cluster.kill(name)
                    for name in names:
                        await cluster.start(name)
                    await cluster.ready()
                    await asyncio.gather(*others)
                    await settled(cluster)
                    before = (await client.status()).shared_tokens
                    again = await client.generate(prompt, max_tokens=20)
                    agreement.check(oracle, prompt, again.tokens, f"front {i + 2}")
                    assert (await client.status()).shared_tokens - before >= 5 * BLOCK_TOKENS
            await settled(cluster)
            assert set((await cluster.stop_all()).values()) == {None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


def test_without_a_new_front_everything_is_free_after_the_lease() -> None:
    """And not before."""
    config = make_config(memory_nodes=2, recovery=RecoveryConfig(lease=20))

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            cluster.kill("c0")
            await asyncio.sleep(19.9)
            assert [len(status.tenants) for status in await statuses(cluster, ["m0", "m1"])] == [1, 1]
            await asyncio.sleep(0.2)
            assert [len(status.tenants) for status in await statuses(cluster, ["m0", "m1"])] == [0, 0]
            await cluster.start("c0")
            await cluster.ready()
            assert set((await cluster.stop_all()).values()) == {None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


def test_a_front_that_is_told_to_stop_leaves_nothing() -> None:
    """Also one that leads other compute nodes, which end with it."""
    config = make_config(compute=(None, None), memory_nodes=2, recovery=RecoveryConfig(lease=1000))

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            await asyncio.gather(*(cluster.stop(name) for name in ("c0", "c1")))
            assert [len(status.tenants) for status in await statuses(cluster, ["m0", "m1"])] == [0, 0]

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


# -- the name and the token


def test_the_key_of_a_cluster_is_stable_and_its_own(tmp_path: Path) -> None:
    """It depends on the secret, the model and the compute nodes of the file, and on nothing else."""
    config = make_config()
    key = TenantKey.of(config, "model")

    assert (
        TenantKey.of(make_config(pipeline=PipelineConfig(batches=3), recovery=RecoveryConfig(lease=1)), "model") == key
    )
    assert TenantKey.of(make_config(memory_nodes=3), "model") == key
    links = msgspec.structs.replace(config, links=Options(secret=b"a secret of 32 bytes, or of more"))
    others = [
        TenantKey.of(config, "other"),
        TenantKey.of(links, "model"),
        TenantKey.of(make_config(compute=(None, None)), "model"),
    ]
    assert len({key.name, *(other.name for other in others)}) == 4
    assert len({key.token, *(other.token for other in others)}) == 4


def test_neither_token_nor_whole_name_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happens; the status has the short name as well."""
    config = make_config(compute=(None, None))
    key = TenantKey.of(config, "empty")

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            with pytest.raises(AssertionError, match="does not have its token"):
                async with raw_compute(cluster, LAYERS, tenant=key.name, token=OTHER):
                    pass
            with pytest.raises(AssertionError, match="in term 1 already"):
                async with raw_compute(cluster, LAYERS, tenant=key.name, token=key.token, term=0):
                    pass
            for told in ({"term": 0}, {"term": 1, "model": "n"}):
                with pytest.raises(AssertionError, match=r"compute node 9 .* tenant c0-"):
                    async with raw_compute(cluster, LAYERS, tenant=key.name, token=key.token, member=9, **told):
                        pass
            status = await cluster.status("m0")
            assert [tenant.name for tenant in status.tenants] == [key.name[: len("c0-") + 8]]
            cluster.kill("c0")
            await asyncio.sleep(100)

    with caplog.at_level("INFO"), World(1, model=LINK, tracing=False) as world:
        world.run(main(world))
    assert "event=leased" in caplog.text
    assert "event=tenant_ended" in caplog.text
    for hidden in (key.name, key.token.hex(), repr(key.token)[2:-1]):
        assert hidden not in caplog.text
