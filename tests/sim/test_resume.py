"""The front is killed, or a link is lost: clients come back for the rest, and get what an undisturbed run gives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lamina.client import Completion
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import DeadlineError, NodeError, StorageError
from lamina.node.compute import ComputeNode
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Hello, Link
from lamina.wire.codec import decode, encode
from lamina.wire.requests import (
    Cancel,
    Finished,
    Generate,
    Generated,
    Request,
    Resume,
    Resumed,
    ToClient,
)
from tests.sim.asked import PIPELINE, Answer, ask_all, check, save_model
from tests.sim.clusters import JITTER, eventually, make_config, new_cluster, settled, simulate

SEEDS, SLOW_SEEDS = range(4), range(4, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, which can chat."""
    return save_model(tmp_path_factory.mktemp("demo"))


def config_of(model: Path, **recovery: Any) -> ClusterConfig:
    return make_config(model, memory=4 << 20, pipeline=PIPELINE, recovery=RecoveryConfig(**recovery))


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, list[Answer]]:
    """What a run without losses gives."""
    return simulate(config_of(model), lambda cluster: ask_all(cluster, Random(0)))


def run_with_kills(model: Path, seed: int) -> tuple[dict[str, list[Answer]], int]:
    """All answers of a run in which the front is killed at random moments, and how many requests were resumed."""
    chance = Random(f"resume {seed}")
    config = config_of(model, journal=chance.choice(("process", "machine")))
    kills = chance.choice((1, 1, 2, 3))
    resumed = 0

    async def main(world: World) -> dict[str, list[Answer]]:
        nonlocal resumed
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asking = asyncio.create_task(ask_all(cluster, chance))
            for _ in range(kills):
                await asyncio.sleep(0.12 * chance.random())
                cluster.kill("c0")
                await asyncio.sleep(chance.choice((0.0, 0.01, 2.0)))
                await cluster.start("c0")
                # Sometimes it is killed while it starts.
                if chance.random() < 0.7:
                    await cluster.ready()
            found = await asking
            await cluster.ready()
            resumed = (await cluster.status("c0")).requests_resumed
            await settled(cluster)
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended
            return found

    with World(seed, model=JITTER, tracing=False) as world:
        return world.run(main(world)), resumed


@pytest.mark.parametrize(
    "seeds", [SEEDS, pytest.param(SLOW_SEEDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_front_that_is_killed_at_any_moment_goes_on(
    seeds: range, model: Path, undisturbed: dict[str, list[Answer]]
) -> None:
    """Once or several times, also while it starts: each client gets every token once, and the same texts, scores and
    ends, for whatever it has asked."""
    resumed = 0
    for seed in seeds:
        found, count = run_with_kills(model, seed)
        check(found, undisturbed, f"seed {seed}")
        resumed += count
    assert resumed > 3 * len(seeds)


def front_of(cluster: SimCluster) -> ComputeNode:
    front = cluster.nodes["c0"]
    assert isinstance(front, ComputeNode)
    return front


async def restart(cluster: SimCluster) -> None:
    """Kill the front, and start it again."""
    cluster.kill("c0")
    await cluster.start("c0")
    await cluster.ready()


async def kept(cluster: SimCluster) -> int:
    """How many requests are in the journal."""
    journal = front_of(cluster)._journal
    return 0 if journal is None else len(journal.entries)


EMPTY = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24)


@pytest.mark.parametrize("journal", ["off", "process"])
def test_a_client_that_is_cut_off_for_a_while_goes_on(journal: Any) -> None:
    """The front lives, and keeps the answers, also those that end meanwhile; it needs no journal for that."""
    config = make_config(pipeline=EMPTY, recovery=RecoveryConfig(journal=journal, lease=30.0))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            lengths = [5, 100, 400]
            streams = [client.stream([1], max_tokens=n) for n in lengths]
            asked = [asyncio.create_task(stream.completion()) for stream in streams]
            await asyncio.sleep(0.03)
            assert asked[0].done()
            cluster.world.network.cut("client", "c0")
            await asyncio.sleep(15)
            cluster.world.network.mend("client", "c0")
            assert [len((await answer).tokens) for answer in asked] == lengths
            assert (await client.status()).requests_resumed == 2
            assert await kept(cluster) == 0

    simulate(config, work)


def test_a_client_that_does_not_come_back_is_given_up() -> None:
    """After the lease, neither earlier nor later: its requests are cancelled, and are in no later front either."""
    config = make_config(pipeline=EMPTY, recovery=RecoveryConfig(lease=0.05))

    async def work(cluster: SimCluster) -> None:
        loop = asyncio.get_running_loop()

        async def running() -> int:
            return (await cluster.status("c0")).requests_running

        for _ in range(2):
            async with cluster.client("gone") as client, cluster.client("watching"):
                asked = asyncio.create_task(client.generate([1], max_tokens=400))
                await asyncio.sleep(0.02)
                cluster.world.network.kill("gone")
                left_s = loop.time()
                while await running():  # noqa: ASYNC110 - the front has no event for it
                    await asyncio.sleep(0.001)
                assert 0.05 <= loop.time() - left_s < 0.06
                asked.cancel()
                await asyncio.wait((asked,))
            assert await kept(cluster) == 0
            await restart(cluster)
            assert await kept(cluster) == 0

    simulate(config, work)


def test_a_restored_request_waits_for_its_client_as_long() -> None:
    """What nobody comes back for is cancelled, and the space is free."""
    config = make_config(pipeline=EMPTY, recovery=RecoveryConfig(lease=5.0))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client("gone", reconnect_s=0) as client:
            asked = [asyncio.create_task(client.generate([1], max_tokens=n)) for n in (50, 400)]
            await asyncio.sleep(0.02)
            await restart(cluster)
            assert all(isinstance(e, NodeError) for e in await asyncio.gather(*asked, return_exceptions=True))
        assert await kept(cluster) == 2
        await asyncio.sleep(4.9)
        assert await kept(cluster) == 2
        await asyncio.sleep(0.2)
        assert await kept(cluster) == 0

    simulate(config, work)


def test_what_is_cancelled_while_the_front_is_away_is_cancelled_when_it_is_back() -> None:
    """At once, and not after the lease; and so are deadlines. The other streams go on."""
    config = make_config(pipeline=EMPTY, recovery=RecoveryConfig(lease=1000.0))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            streams = [client.stream([n], max_tokens=400) for n in range(3)]
            late = asyncio.create_task(client.generate([7], max_tokens=400, deadline_s=1.0))
            for stream in streams:
                await anext(stream)
            cluster.kill("c0")
            await asyncio.sleep(0.1)
            await streams[0].aclose()
            with pytest.raises(DeadlineError):
                await late
            await cluster.start("c0")
            await cluster.ready()
            await asyncio.sleep(0.001)
            await streams[1].aclose()
            await asyncio.sleep(0.01)
            assert (await cluster.status("c0")).requests_running == 1
            assert len([token async for token in streams[2]]) == 399
            await asyncio.sleep(0.01)
            assert await kept(cluster) == 0

    simulate(config, work)


def test_a_front_that_does_not_come_back_is_told() -> None:
    """With the error of the loss, after the time that the client allows; and what it asks later fails at once."""

    async def work(cluster: SimCluster) -> None:
        loop = asyncio.get_running_loop()
        async with cluster.client(reconnect_s=7.0) as client:
            streams = [client.stream([n], max_tokens=400) for n in range(3)]
            for stream in streams:
                await anext(stream)
            cluster.kill("c0")
            lost_s = loop.time()
            for stream in streams:
                with pytest.raises(NodeError, match=r"^compute node c0 was lost: .*; it has not come back within 7 s"):
                    await stream.completion()
            assert loop.time() - lost_s == pytest.approx(7.0, abs=0.01)
            await cluster.start("c0")
            await cluster.ready()
            assert len((await client.generate([1], max_tokens=3)).tokens) == 3
        await asyncio.sleep(120)

    simulate(make_config(pipeline=EMPTY), work)


def test_the_start_of_the_front_may_take_its_time() -> None:
    """While it is there and starts, clients wait: here for a memory node that comes back after a minute."""
    config = make_config(memory_nodes=1, pipeline=EMPTY, start_timeout=500.0)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client(reconnect_s=5.0) as client:
            asked = asyncio.create_task(client.generate([1], max_tokens=400))
            await asyncio.sleep(0.02)
            cluster.kill("c0")
            cluster.kill("m0")
            await cluster.start("c0")
            await asyncio.sleep(60)
            await cluster.start("m0")
            assert len((await asked).tokens) == 400

    simulate(config, work)


def test_without_a_journal_a_lost_front_loses_what_has_begun() -> None:
    """At once, with an error; what has not begun is asked again."""
    pipeline = PipelineConfig(batches=1, max_batch=2)
    config = make_config(pipeline=pipeline, recovery=RecoveryConfig(journal="off"))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            asked = [asyncio.create_task(client.generate([n], max_tokens=100)) for n in range(6)]
            await asyncio.sleep(0.02)
            cluster.kill("c0")
            await asyncio.sleep(0.001)
            broken = [task.exception() for task in asked if task.done()]
            assert len(broken) == 2
            for error in broken:
                assert isinstance(error, NodeError)
                assert "compute node c0 was lost: " in str(error)
                assert "; it keeps no journal (recovery.journal), so what it had begun is lost" in str(error)
            await asyncio.sleep(20)
            assert [task.done() for task in asked].count(True) == 2
            await cluster.start("c0")
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert [len(end.tokens) for end in ends if isinstance(end, Completion)] == [100] * 4

    simulate(config, work)


def test_a_full_disk_refuses_new_requests_and_ends_none() -> None:
    """The error and the status say why. When there is room again, requests are taken, and what ran meanwhile survives
    the front as if nothing had been."""

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            streams = [client.stream([n], max_tokens=400) for n in range(3)]
            for stream in streams:
                await anext(stream)
            cluster.disk.is_full = True
            for _ in range(20):
                await anext(streams[0])
            for _ in range(2):
                with pytest.raises(
                    StorageError, match=r"no request is taken, as it could not be kept: .* No space left"
                ):
                    await client.generate([1])
            status = await client.status()
            assert (status.journal, status.requests_running) == ("process", 3)
            assert "No space left on device" in status.journal_failure
            cluster.disk.is_full = False
            await asyncio.sleep(1.1)  # in which one of them may end
            status = await client.status()
            assert status.journal_failure == ""
            assert len((await client.generate([1], max_tokens=3)).tokens) == 3

            running = client.stream([9], max_tokens=400)
            await anext(running)
            cluster.disk.is_full = True  # the front goes on undurable, and is lost: the beginning is computed again
            for _ in range(20):
                await anext(running)
            cluster.kill("c0")
            cluster.disk.is_full = False
            await cluster.start("c0")
            assert len([token async for token in running]) == 379
            assert [len([token async for token in stream]) for stream in streams] == [379, 399, 399]

    simulate(make_config(pipeline=EMPTY), work)


def test_another_start_finds_the_place_of_its_journal_taken() -> None:
    """The second front says so, and touches nothing."""
    config = make_config(pipeline=EMPTY)

    async def work(cluster: SimCluster) -> None:
        (path,) = cluster.disk.files
        assert path.name == "requests.journal"
        with pytest.raises(StorageError, match=r"is in use by another process"):
            cluster.disk.open(path)

    simulate(config, work)


def test_a_client_that_comes_back_twice_gets_every_token_once() -> None:
    """Its second link overtakes the first one, while that is still being served."""
    config = make_config(pipeline=PipelineConfig(batches=1, max_batch=1))

    async def work(cluster: SimCluster) -> None:
        network, ticket = cluster.world.network, "0123456789abcdef" * 2

        async def connect(told: list[Any]) -> Link:
            link = await network.connect(config.front.address, Hello("client", "raw"), config.options(), deadline_s=1)
            link.deliver(on_message=lambda plain: told.append(decode(plain, ToClient)))
            return link

        def tokens(told: list[Any]) -> int:
            return sum(len(message.pieces) for message in told if isinstance(message, Generated))

        first: list[Any] = []
        second: list[Any] = []
        third: list[Any] = []
        links = [await connect(told) for told in (first, second, third)]
        links[0].send(encode(Generate(id=1, request=Request([1], 400), ticket=ticket)))
        await asyncio.sleep(0.02)
        links[1].send(encode(Resume(id=5, ticket=ticket, tokens=3)))
        links[2].send(encode(Resume(id=9, ticket=ticket, tokens=7)))
        await eventually(lambda: asyncio.sleep(0, any(isinstance(m, Finished) for m in third)))
        assert third[0] == Resumed(id=9)
        assert tokens(third) == 400 - 7
        assert tokens(first) < 40
        assert tokens(second) < 40
        assert not any(isinstance(m, Finished) for m in first + second)

        links[0].send(encode(Resume(id=2, ticket=ticket, tokens=400)))  # the end is still kept
        links[1].send(encode(Resume(id=6, ticket="f" * 32, tokens=0)))
        await asyncio.sleep(0.01)
        assert [m.id for m in first if isinstance(m, Finished)] == [2]
        assert second[-1] == Resumed(id=6, known=False)
        links[0].send(encode(Cancel(id=2)))
        await asyncio.sleep(0.01)
        assert await kept(cluster) == 0
        links[0].send(encode(Resume(id=3, ticket=ticket, tokens=400)))
        await asyncio.sleep(0.01)
        assert first[-1] == Resumed(id=3, known=False)
        for link in links:
            await link.close()

    simulate(config, work)
