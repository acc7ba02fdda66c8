"""Several clusters, each with a file of its own, on one memory node."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from lamina.client import Completion
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import LaminaError, NodeError
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Address
from lamina.wire.admin import Status
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import LINK, eventually, generate, make_config, new_cluster, settled

TOKENS = 64
MODELS = ("llama", "gemma2")
MEMORY = 16 << 20
MEASURED_S = 0.2
PROMPTS = [[(7 * i + length) % VOCABULARY for i in range(length)] for length in (1, 9, 33, 70, 300)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: FAMILIES[name].save(tmp_path_factory.mktemp(name) / "checkpoint") for name in MODELS}


def file_of(name: str, model: Path | str, quota: int | None, **more: object) -> ClusterConfig:
    """The file of a cluster whose compute node is called ``name``, and whose memory node m0 is everyone's."""
    config = make_config(model, memory_nodes=1, memory=MEMORY, quota=quota, **more)
    compute, memory = config.node
    port = 7000 + sum(name.encode())
    own = msgspec.structs.replace(compute, name=name, address=Address("tcp", "127.0.0.1", port))
    return msgspec.structs.replace(config, node=[own, memory])


async def add(world: World, config: ClusterConfig, **more: int) -> SimCluster:
    """Start the compute node of a file; the memory node is there."""
    cluster = new_cluster(world, config, **more)
    await cluster.start(config.front.name)
    await cluster.ready()
    return cluster


async def answers(cluster: SimCluster, times: int = 1) -> list[list[int]]:
    """Answers to all prompts, ``times`` times one after the other."""
    async with cluster.client() as client:
        for _ in range(times):
            found = await generate(client, PROMPTS, max_tokens=TOKENS)
    return found


def check(agreement: Agreement, oracle: Oracle, found: list[list[int]], what: str) -> None:
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert len(answer) == TOKENS
        agreement.check(oracle, prompt, answer, f"{what}, prompt of {len(prompt)}")


def run(work: Callable[[World, SimCluster], Awaitable[None]], model: str = "empty") -> None:
    """Start the memory node that everyone shares, and do ``work``. It attends unless ``model`` is "empty"."""

    async def main(world: World) -> None:
        memory = new_cluster(world, file_of("none", model, None))
        await memory.start("m0")
        await work(world, memory)
        assert await memory.stop_all() == {"m0": None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


def test_two_models_share_a_memory_node(checkpoints: dict[str, Path], agreement: Agreement) -> None:
    """Both at the same time, with quotas of their own. One is killed in the middle of its answers: the other goes on,
    and a third has what the dead one had."""
    oracles = {name: Oracle(path) for name, path in checkpoints.items()}
    one, other = MODELS

    async def work(world: World, memory: SimCluster) -> None:
        clusters = {
            name: await add(world, file_of(name, checkpoints[name], 6 << 20, recovery=RecoveryConfig(lease=0)))
            for name in MODELS
        }
        found = await asyncio.gather(*(answers(clusters[name]) for name in MODELS))
        for name, own in zip(MODELS, found, strict=True):
            check(agreement, oracles[name], own, f"{name} beside another")
        seen = await memory.status("m0")
        assert {tenant.quota for tenant in seen.tenants} == {6 << 20}
        assert len({tenant.model for tenant in seen.tenants}) == 2
        assert all(tenant.busy_s > 0 and len(tenant.compute_nodes) == 1 for tenant in seen.tenants)
        assert seen.kv_tokens_free == seen.kv_tokens_total == sum(t.kv_tokens_total for t in seen.tenants)

        dying = asyncio.ensure_future(answers(clusters[other], 100))
        living = asyncio.ensure_future(answers(clusters[one], 3))
        await asyncio.sleep(0.02)
        clusters[other].kill(other)
        with pytest.raises(NodeError, match=f"compute node {other} was lost"):
            await dying
        check(agreement, oracles[one], await living, f"{one} beside one that was killed")
        assert [tenant.compute_nodes for tenant in (await memory.status("m0")).tenants] == [[one]]

        third = await add(world, file_of("third", checkpoints[other], 6 << 20))
        check(agreement, oracles[other], await answers(third), f"{other} after one that was killed")
        await settled(clusters[one])
        for cluster in (third, clusters[one]):
            assert None in (await cluster.stop_all()).values()
            cluster.check()

    run(work, "/nonexistent")


def test_a_quota_that_cannot_be_had_is_refused_with_the_numbers() -> None:
    """The one that is there goes on; when it has left, the other can have what it asked for."""

    async def work(world: World, memory: SimCluster) -> None:
        first = await add(world, file_of("first", "empty", 12 << 20), context=64)
        refused = new_cluster(world, file_of("second", "empty", 6 << 20), context=64)
        await refused.start("second")
        with pytest.raises(LaminaError) as caught:
            await refused.ready()
        numbers = rf"a quota of {6 << 20} bytes cannot be had: of {16 << 20} bytes {4 << 20} are free"
        told = rf"memory node m0: {numbers}, {4 << 20} of them in one piece \(first-\w+ has {12 << 20}\)"
        assert re.search(told, str(caught.value))
        # Without a quota it gets what is left.
        content = await add(world, file_of("greedy", "empty", None), context=64)
        assert sorted(t.quota for t in (await memory.status("m0")).tenants) == [4 << 20, 12 << 20]
        async with first.client() as client:
            assert len((await client.generate([1], max_tokens=3)).tokens) == 3
        for leaving in (content, first):
            assert set((await leaving.stop_all()).values()) == {None}
        again = await add(world, file_of("third", "empty", 6 << 20), context=64)
        assert [t.quota for t in (await memory.status("m0")).tenants] == [6 << 20]
        assert set((await again.stop_all()).values()) == {None}

    run(work)


@pytest.mark.parametrize("tenants", [2, 3, 5])
def test_clusters_that_always_have_work_get_the_memory_node_for_as_long(tenants: int) -> None:
    """However different their operations are, neither gets ahead of another by more than an operation of each."""
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=8)

    def seconds(name: str, at: Place | None) -> float:
        # The deeper a layer, the longer its attention; and tenants differ in their layers.
        return 1e-4 * (1 + at.layer) if name == "_past" and at else 0.0

    async def work(world: World, memory: SimCluster) -> None:
        names = [f"tenant{i}" for i in range(tenants)]
        clusters = [
            await add(world, file_of(name, "empty", 2 << 20, pipeline=pipeline), layers=2 + 2 * i)
            for i, name in enumerate(names)
        ]

        async def use(cluster: SimCluster) -> list[Completion]:
            async with cluster.client() as client:
                return list(await asyncio.gather(*(client.generate([1], max_tokens=500) for _ in range(8))))

        asking = [asyncio.ensure_future(use(cluster)) for cluster in clusters]
        await asyncio.sleep(0.02)
        before = await shares(memory)
        await asyncio.sleep(MEASURED_S)
        after = await shares(memory)
        assert not any(task.done() for task in asking)
        spent = [after[name] - before[name] for name in after]
        assert len(spent) == tenants
        assert sum(spent) == pytest.approx(MEASURED_S, rel=0.02), "the device was busy all the time"
        longest = seconds("_past", Place(0, 2 * tenants - 1))
        assert max(spent) - min(spent) < 2.001 * longest, spent
        await asyncio.gather(*asking)
        for cluster in clusters:
            await settled(cluster)
            assert set((await cluster.stop_all()).values()) == {None}

    async def shares(memory: SimCluster) -> dict[str, float]:
        status: Status = await memory.status("m0")
        return {tenant.name: tenant.busy_s for tenant in status.tenants}

    run(work)


async def has_tenants(memory: SimCluster, count: int) -> bool:
    return len((await memory.status("m0")).tenants) == count


def test_a_tenant_that_comes_and_goes_leaves_nothing() -> None:
    """Twenty times, killed or told to stop, beside one that stays and is answered all the time."""

    async def work(world: World, memory: SimCluster) -> None:
        staying = await add(world, file_of("staying", "empty", 1 << 20), context=64)

        async def use() -> int:
            async with staying.client() as client:
                count = 0
                while not leaving.is_set():
                    await generate(client, [[1, 2], [3]], max_tokens=20)
                    count += 1
                return count

        leaving = asyncio.Event()
        using = asyncio.ensure_future(use())
        for i in range(20):
            guest = await add(world, file_of("guest", "empty", None, recovery=RecoveryConfig(lease=0)), context=64)
            async with guest.client(reconnect_s=0) as client:
                asked = asyncio.ensure_future(client.generate([1], max_tokens=50))
                await asyncio.sleep(0.001 * (i + 1))
                if i % 2:
                    guest.kill("guest")
                    await asyncio.gather(asked, return_exceptions=True)
                else:
                    assert set((await guest.stop_all()).values()) == {None}
                    assert len((await asked).tokens) == 50
            await eventually(lambda: has_tenants(memory, 1))
        leaving.set()
        assert await using > 20
        await settled(staying)
        assert set((await staying.stop_all()).values()) == {None}

    run(work)
