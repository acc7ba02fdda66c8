"""The front is lost and does not come back: the next compute node takes its part, and clients go on there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lamina.client import AsyncClient
from lamina.client.finder import FrontFinder
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import NodeError, SupersededError
from lamina.node import succession
from lamina.node.compute import ComputeNode
from lamina.ops.drain import drained
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Hello
from lamina.watch import ClusterWatch
from lamina.wire.admin import Status
from tests.sim.asked import PIPELINE, Answer, ask_all, check, save_model
from tests.sim.clusters import JITTER, LINK, eventually, make_config, new_cluster, simulate

GRACE_S = 1.0
EMPTY = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24)
LAYOUTS: dict[str, tuple[range | None, ...]] = {
    "two": (None, None),
    "three": (None, None, None),
    "ranges": (range(2), range(2, 4)),
}
SEEDS, SLOW_SEEDS = range(12), range(12, 200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, which can chat."""
    return save_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, list[Answer]]:
    """What a run without losses gives."""
    return simulate(make_config(model, memory=4 << 20, pipeline=PIPELINE), lambda cluster: ask_all(cluster, Random(0)))


async def fronts(cluster: SimCluster) -> list[str]:
    """The compute nodes that answer clients now."""
    found = []
    for node in cluster.config.compute_nodes:
        serving = cluster.nodes.get(node.name)
        if not (cluster.is_running(node.name) and isinstance(serving, ComputeNode)):
            continue
        if serving._leads and serving._front is not None and not serving._superseded.done():
            found.append(node.name)
    return found


async def front_of(cluster: SimCluster, timeout_s: float = 60.0) -> str:
    """Wait until one node is the front; its name."""

    async def there_is_one() -> bool:
        return len(await fronts(cluster)) == 1

    await eventually(there_is_one, timeout_s)
    return (await fronts(cluster))[0]


async def settled(cluster: SimCluster) -> None:
    """Wait until no block is in use on any node, nor any request kept."""

    async def is_idle() -> bool:
        names = [await front_of(cluster), *(n.name for n in cluster.config.memory_nodes)]
        told = [await cluster.status(name) for name in names]
        return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in told)

    await eventually(is_idle)


async def stop(cluster: SimCluster) -> None:
    """Stop all nodes; none may have ended with an error, but for a front that another one has superseded."""
    for name, error in (await cluster.stop_all()).items():
        assert error is None or isinstance(error, SupersededError | asyncio.CancelledError), (name, error)


# -- at any moment


def run_with_losses(model: Path, seed: int) -> tuple[dict[str, list[Answer]], bool]:
    """All answers of a run in which fronts are killed at random moments, and whether requests may be missing."""
    chance = Random(f"failover {seed}")
    layout = chance.choice(list(LAYOUTS))
    journal: Any = chance.choice(("off", "process", "machine"))
    partition: Any = chance.choice(("heads", "requests", "tokens"))
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=64, partition=partition)
    config = make_config(
        model,
        compute=LAYOUTS[layout],
        memory=4 << 20,
        pipeline=pipeline,
        recovery=RecoveryConfig(journal=journal, grace=GRACE_S),
    )
    losses = chance.choice((1, 1, 2))

    async def main(world: World) -> dict[str, list[Answer]]:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asking = asyncio.create_task(ask_all(cluster, chance, is_lossy=journal == "off"))
            for _ in range(losses):
                await asyncio.sleep(0.12 * chance.random())
                lost = await front_of(cluster)
                cluster.kill(lost)
                # Before its standby acts, while that begins, or when it has.
                await asyncio.sleep(chance.choice((0.0, 0.5, 1.0, 1.001, 1.1, 1.3, 3.0)) * GRACE_S)
                is_alone = not any(cluster.is_running(node.name) for node in config.compute_nodes)
                if layout == "ranges" or is_alone or chance.random() < 0.6:
                    await cluster.start(lost)
                if is_alone and journal == "off" and lost != "c0":
                    await cluster.start("c0")  # the other does not know that it was the front
                if chance.random() < 0.7:
                    await front_of(cluster)
            found = await asking
            await settled(cluster)
            await stop(cluster)
            return found

    with World(seed, model=JITTER, tracing=False) as world:
        return world.run(main(world)), journal == "off"


@pytest.mark.parametrize(
    "seeds", [SEEDS, pytest.param(SLOW_SEEDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_front_that_is_lost_at_any_moment_loses_no_token(
    seeds: range, model: Path, undisturbed: dict[str, list[Answer]]
) -> None:
    """Whether it comes back or not, and when: each client gets every token once, and the same texts, scores and ends.
    Without a journal, a request that has begun may be lost, with an error."""
    for seed in seeds:
        found, is_lossy = run_with_losses(model, seed)
        expected = {name: undisturbed[name] for name in found} if is_lossy else undisturbed
        check(found, expected, f"seed {seed}")


# -- who becomes the front


async def ask_many(cluster: SimCluster, count: int = 6, tokens: int = 300) -> list[asyncio.Task[Any]]:
    """Begin with answers of so many tokens, each on a client of its own, and wait until all have a few."""

    async def ask(number: int) -> list[int]:
        async with cluster.client(f"client{number}") as client:
            got = []
            async for token in client.stream([number], max_tokens=tokens):
                got.append(token.id)
                begun.add(number)
            return got

    begun: set[int] = set()
    asked = [asyncio.create_task(ask(number)) for number in range(count)]
    await eventually(lambda: asyncio.sleep(0, len(begun) >= 4))
    return asked


async def lengths(asked: list[asyncio.Task[Any]]) -> list[int]:
    return [len(tokens) for tokens in await asyncio.gather(*asked)]


def run(config: ClusterConfig, work: Any, *, seed: int = 1, link: Any = LINK) -> None:
    """Do ``work`` with a cluster that is ready; then no block may be in use, and all nodes stop in order."""

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            await work(cluster)
            await settled(cluster)
            await stop(cluster)

    with World(seed, model=link, tracing=False) as world:
        world.run(main(world))


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("ends", [("c0", "c1"), ("c1", "c0")])
def test_a_front_that_only_its_standby_has_lost_stays_the_front(ends: tuple[str, str], one_way: bool) -> None:
    """However long that lasts: the memory nodes still have it, and nothing changes for clients."""
    config = make_config(compute=(None, None), pipeline=EMPTY, recovery=RecoveryConfig(grace=GRACE_S))

    async def work(cluster: SimCluster) -> None:
        asked = await ask_many(cluster)
        cluster.world.network.cut(*ends, one_way=one_way)
        for _ in range(60):
            await asyncio.sleep(0.5)
            assert await fronts(cluster) == ["c0"]
        assert await lengths(asked) == [300] * 6
        cluster.world.network.mend(*ends)
        await cluster.ready("c1")
        assert cluster.ended == {}

    run(config, work)


@pytest.mark.parametrize("keeps_clients", [True, False])
def test_a_front_that_is_cut_off_ends(keeps_clients: bool) -> None:
    """Its clients go on at the other one, also those that it did not lose: it ends, as it may be the front no more."""
    config = make_config(compute=(None, None), pipeline=EMPTY, recovery=RecoveryConfig(grace=GRACE_S))
    far = ["c1", "m0", "m1", *([] if keeps_clients else [f"client{i}" for i in range(6)])]

    async def work(cluster: SimCluster) -> None:
        asked = await ask_many(cluster)
        for name in far:
            cluster.world.network.cut("c0", name)
        assert await lengths(asked) == [300] * 6
        await eventually(lambda: asyncio.sleep(0, "c0" in cluster.ended), 20)
        assert "no other node was reached for 1 s" in str(cluster.ended["c0"])
        assert await fronts(cluster) == ["c1"]
        for name in far:
            cluster.world.network.mend("c0", name)
        await cluster.start("c0")
        await cluster.ready("c0")
        assert await fronts(cluster) == ["c1"]

    run(config, work)


def test_a_front_that_comes_back_to_another_one_ends() -> None:
    """It has been cut off from all but one compute node, which has not heard of the other front either."""
    config = make_config(compute=(None, None, None), pipeline=EMPTY, recovery=RecoveryConfig(grace=GRACE_S))

    async def work(cluster: SimCluster) -> None:
        asked = await ask_many(cluster)
        clients = [f"client{i}" for i in range(6)]
        for name in ("c1", "m0", "m1", *clients):
            cluster.world.network.cut("c0", name)
        cluster.world.network.cut("c1", "c2")
        assert await lengths(asked) == [300] * 6
        assert set(await fronts(cluster)) == {"c0", "c1"}
        for name in ("c1", "m0", "m1", *clients):
            cluster.world.network.mend("c0", name)
        cluster.world.network.mend("c1", "c2")
        await eventually(lambda: asyncio.sleep(0, "c0" in cluster.ended), 20)
        assert isinstance(cluster.ended["c0"], SupersededError)
        await cluster.ready("c2")
        assert await fronts(cluster) == ["c1"]

    run(config, work)


@pytest.mark.parametrize("seed", range(8))
def test_of_two_candidates_one_wins(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not reach each other, and begin at the same moment. If it is not the standby, it knows no requests."""
    monkeypatch.setattr(succession, "OTHERS_S", 0.0)
    config = make_config(compute=(None, None, None), pipeline=EMPTY, recovery=RecoveryConfig(grace=0.0))

    async def work(cluster: SimCluster) -> None:
        asked = await ask_many(cluster)
        cluster.world.network.cut("c1", "c2")
        cluster.kill("c0")
        won = await front_of(cluster)
        for end in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(end, NodeError):
                assert won == "c2"
                assert "it has come back without this request" in str(end)
            else:
                assert len(end) == 300
        for _ in range(20):
            await asyncio.sleep(0.5)
            assert await fronts(cluster) == [won]
        cluster.world.network.mend("c1", "c2")
        await asyncio.sleep(5)

    run(config, work, seed=seed, link=JITTER)


def test_a_standby_that_joins_late_gets_what_was_before() -> None:
    """Also one that was told of another front's requests in between."""
    config = make_config(compute=(None, None), pipeline=EMPTY, recovery=RecoveryConfig(grace=GRACE_S))

    async def work(cluster: SimCluster) -> None:
        asked = await ask_many(cluster, tokens=400)
        cluster.kill("c1")
        await asyncio.sleep(0.01)
        await cluster.start("c1")
        await cluster.ready("c1")
        await asyncio.sleep(0.005)
        cluster.kill("c0")
        assert await front_of(cluster) == "c1"
        assert await lengths(asked) == [400] * 6

    run(config, work)


# -- clients and operators


def test_clients_and_operators_find_the_front() -> None:
    """From any compute node's address, and after another one has become the front."""
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, partition="requests")
    config = make_config(compute=(None, None), pipeline=pipeline, recovery=RecoveryConfig(grace=GRACE_S))

    async def status_by(cluster: SimCluster, name: str) -> Status:
        finder = FrontFinder(
            [config.find(name).address],
            Hello("client", "astray"),
            config.options(),
            connect=cluster.world.network.connect,
        )
        client = AsyncClient(await finder.find(20.0))
        status = await client.status()
        await client.close()
        return status

    async def work(cluster: SimCluster) -> None:
        network, said = cluster.world.network, list[str]()
        assert (await status_by(cluster, "c1")).name == "c0"
        async with await cluster.admin("c1") as other:
            drained_by = await other.drain("m0", 1.0)
            assert drained_by.error == f"c1 is not the front; clients talk to c0 at {config.front.address}"
        cluster.kill("c0")
        await front_of(cluster)
        assert (await status_by(cluster, "c1")).name == "c1"
        await drained(config, "m0", 1.0, said.append, network=network)
        assert said[-1].startswith("m0 has left the cluster")
        await cluster.start("c0")
        await cluster.ready("c0")
        assert (await status_by(cluster, "c0")).name == "c1"
        async with ClusterWatch(config, name="watch", network=network) as watch:
            views = await watch.look()
        assert {view.node.name: view.member.state for view in views if view.member} == {
            "c0": "serving", "c1": "serving", "m0": "gone", "m1": "serving",
        }  # fmt: skip
        cluster.kill("m0")
        await cluster.start("m0")
        await asyncio.sleep(2)

    run(config, work)
