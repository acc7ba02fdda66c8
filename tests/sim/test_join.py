"""Nodes join a cluster that serves, and leave it again: every request has the tokens that it would have had."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    MemoryNodeConfig,
    PipelineConfig,
    RecoveryConfig,
    write_cluster,
)
from lamina.errors import LaminaError
from lamina.node.compute import ComputeNode
from lamina.node.joining import Joining
from lamina.ops.drain import drained
from lamina.sim.cluster import SimCluster
from lamina.sim.empty import EmptyModel
from lamina.sim.world import World
from lamina.transport import Address
from lamina.watch import ClusterWatch
from tests.families import VOCABULARY
from tests.sim.clusters import LINK, eventually, generate, has_no_tenant, is_idle, make_config, new_cluster, simulate

CONTEXT = 256
_random = random.Random(7)
PROMPTS = [[_random.randrange(VOCABULARY) for _ in range(_random.randint(1, 60))] for _ in range(8)]

M9 = MemoryNodeConfig(name="m9", address=Address("tcp", "127.0.0.1", 8900), memory=8 << 20)
R1 = ComputeNodeConfig(name="r1", address=Address("tcp", "127.0.0.1", 7900))


async def answers(cluster: SimCluster, count: int = len(PROMPTS)) -> list[list[int]]:
    async with cluster.client() as client:
        found = await asyncio.gather(
            *(
                client.generate(p, max_tokens=60, temperature=0.7 * (i % 2), seed=i, ignore_eos=True)
                for i, p in enumerate(PROMPTS[:count])
            )
        )
    return [answer.tokens for answer in found]


async def state(cluster: SimCluster, name: str) -> str | None:
    """The state of a member, as the front says; None if it is none."""
    return {m.name: m.state for m in (await cluster.status("c0")).members}.get(name)


async def serving(cluster: SimCluster, *names: str) -> None:
    """Wait until these members serve, and fail with the error of a node that ends before."""

    async def serve() -> bool:
        cluster.check()
        return [await state(cluster, name) for name in names] == ["serving"] * len(names)

    await eventually(serve)


def run(config: ClusterConfig, work: Callable[[SimCluster], Awaitable[None]], **model: int) -> None:
    """Do ``work`` with a cluster that is ready; an empty model is as ``model`` says."""

    async def main(world: World) -> None:
        async with new_cluster(world, config, **model) as cluster:
            await cluster.ready()
            await work(cluster)

    with World(1, model=LINK, tracing=False, limit_s=300) as world:
        world.run(main(world))


def config_of(model: Path, partition: str, *, compute: int = 1, tokens: int = 640) -> ClusterConfig:
    """Two memory nodes that hold about so many tokens each, where they hold whole tokens."""
    pipeline = PipelineConfig(batches=2, max_batch=8, partition=partition)
    return make_config(model, memory=tokens * 1024, compute=(None,) * compute, context=CONTEXT, pipeline=pipeline)


@pytest.mark.parametrize("compute", [1, 2])
@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
def test_a_memory_node_joins(partition: str, compute: int, llama: Path) -> None:
    """While requests run, and more than fit; some of them lie there afterwards. A drain lets it leave for good, and
    when it is started again it is a member again, under its id."""
    config = config_of(llama, partition, compute=compute)
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        before = (await cluster.status("c0")).kv_tokens_total
        await cluster.join(M9)
        await serving(cluster, "m9", "m0", "m1")
        assert not asking.done()
        assert await asking == expected
        total = (await cluster.status("c0")).kv_tokens_total
        assert total == before if partition == "heads" else total > before  # the first node still has two heads of four
        again = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        assert (await cluster.status("m9")).sequences > 0
        await drained(config, "m9", 60.0, lambda text: None, network=cluster.world.network)
        assert await again == expected
        await eventually(lambda: has_no_tenant(cluster, "m9"))
        assert await state(cluster, "m9") is None
        await cluster.stop("m9")
        await cluster.start("m9")
        await serving(cluster, "m9")
        assert await answers(cluster) == expected
        await eventually(lambda: is_idle(cluster))
        assert set((await cluster.stop_all()).values()) == {None}

    run(config, work)


@pytest.mark.parametrize("partition", ["heads", "requests", "tokens"])
def test_a_memory_node_that_has_joined_is_lost(partition: str, llama: Path) -> None:
    """It is lost like any other, and taken in again when it is back, at another address too."""
    config = replace(config_of(llama, partition, compute=2), recovery=RecoveryConfig(grace=0.1))
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await serving(cluster, "m9")
        for node in (M9, replace(M9, address=Address("tcp", "127.0.0.1", 8901))):
            asking = asyncio.ensure_future(answers(cluster))
            await asyncio.sleep(0.03)
            cluster.kill("m9")
            assert await asking == expected
            assert await state(cluster, "m9") == "lost"
            await cluster.join(node)
            await serving(cluster, "m9")
        assert await answers(cluster) == expected
        await eventually(lambda: is_idle(cluster))
        assert set((await cluster.stop_all()).values()) == {None}

    run(config, work)


def test_a_node_that_has_joined_and_stays_away_is_forgotten() -> None:
    """After the lease, but not one of the file. It comes back under its id."""
    pipeline = PipelineConfig(batches=2, partition="requests")
    config = make_config(compute=(None, None), pipeline=pipeline, recovery=RecoveryConfig(grace=1.0, lease=20.0))

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await cluster.join(R1)
        await serving(cluster, "m9", "r1")
        ids = [cluster.nodes["c0"]._members.id_of(name) for name in ("m9", "r1")]
        for name in ("m9", "r1", "m1"):
            cluster.kill(name)
        await asyncio.sleep(19)
        assert [await state(cluster, name) for name in ("m9", "r1", "m1")] == ["lost"] * 3
        await asyncio.sleep(2)
        assert [await state(cluster, name) for name in ("m9", "r1", "m1")] == [None, None, "lost"]
        assert {e.name for e in cluster.nodes["c1"]._members.entries} == {"c0", "c1", "m0", "m1"}
        for name in ("m9", "r1", "m1"):
            await cluster.start(name)
        await serving(cluster, "m9", "r1", "m1")
        assert [cluster.nodes["c0"]._members.id_of(name) for name in ("m9", "r1")] == ids

    run(config, work)


@pytest.mark.parametrize("partition", ["heads", "requests"])
def test_the_front_starts_again(partition: str, llama: Path) -> None:
    """Nodes that have joined introduce themselves to it, and what they keep is found."""
    config = config_of(llama, partition, compute=2)
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await serving(cluster, "m9")
        await cluster.join(R1)
        await serving(cluster, "r1")
        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.03)
        cluster.kill("c0")
        await asyncio.sleep(0.5)
        await cluster.start("c0")
        await cluster.ready()
        await serving(cluster, "m9", "r1")
        assert await asking == expected
        assert await answers(cluster) == expected
        await eventually(lambda: is_idle(cluster))
        assert set((await cluster.stop_all()).values()) == {None}

    run(config, work)


def test_nodes_that_have_joined_follow_another_front(caplog: pytest.LogCaptureFixture) -> None:
    """They introduce themselves to the compute node that takes the front's part, so that it can tell them when they
    have left. Later they find it from the address of the first one, which is not the front any more."""
    pipeline = PipelineConfig(batches=2, partition="requests")
    config = make_config(compute=(None, None), pipeline=pipeline, recovery=RecoveryConfig(grace=1.0))

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await cluster.join(R1)
        await serving(cluster, "m9", "r1")
        cluster.kill("c0")

        async def serve() -> bool:
            told = {m.name: m.state for m in (await cluster.status("c1")).members}
            return [told.get(name) for name in ("c1", "m9", "r1")] == ["serving"] * 3

        async def all_serve() -> bool:
            return await serve() and (await cluster.status("c1")).state == "ready"

        await eventually(all_serve, 30)
        await asyncio.sleep(15)
        asked = [r.getMessage() for r in caplog.records if r.getMessage().startswith("event=member_of peer=c1")]
        assert len(asked) == 2  # and they ask no more
        await cluster.start("c0")
        await drained(config, "m9", 60.0, lambda text: None, network=cluster.world.network)
        await asyncio.sleep(1)
        assert "event=left peer=tcp://127.0.0.1:7001" in caplog.text
        assert "m9" not in {m.name for m in (await cluster.status("c1")).members}
        for name in ("m9", "r1"):
            await cluster.stop(name)
            await cluster.start(name)
        await eventually(all_serve, 30)
        assert (await cluster.status("c1")).front == "c1"

    with caplog.at_level("INFO", "lamina"):
        run(config, work)


@pytest.mark.parametrize("compute", [1, 2])
def test_a_replica_joins(compute: int, llama: Path) -> None:
    """It runs steps, and when it is lost, the others go on; it is taken in again when it is back."""
    config = config_of(llama, "requests", compute=compute, tokens=2048)
    config = replace(config, pipeline=replace(config.pipeline, batches=4, max_batch=2))
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        await cluster.join(R1)
        await serving(cluster, "r1")
        assert await asking == expected
        for _ in range(2):
            asking = asyncio.ensure_future(answers(cluster))
            await asyncio.sleep(0.05)
            status = await cluster.status("r1")
            assert (status.state, status.steps > 0) == ("ready", True)
            cluster.kill("r1")
            assert await asking == expected
            await cluster.start("r1")
            await serving(cluster, "r1")
        await cluster.join(replace(R1, name="r2", address=Address("tcp", "127.0.0.1", 7901)))
        await serving(cluster, "r1", "r2")
        assert await answers(cluster) == expected
        await eventually(lambda: is_idle(cluster))
        assert set((await cluster.stop_all()).values()) == {None}

    run(config, work)


def test_the_status_has_nodes_that_have_joined(llama: Path) -> None:
    """Behind those of the file, with what they say and what the front says of them."""
    config = config_of(llama, "requests")

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await cluster.join(R1)
        await serving(cluster, "m9", "r1")
        async with ClusterWatch(config, name="watch", network=cluster.world.network) as watch:
            views = await watch.look()
        assert [(view.node.name, view.node.role, view.is_ready) for view in views[:3]] == [
            ("c0", "compute", True),
            ("m0", "memory", True),
            ("m1", "memory", True),
        ]
        joined = {(view.node.name, view.node.role, view.is_ready) for view in views[3:]}
        assert joined == {("m9", "memory", True), ("r1", "compute", True)}

    run(config, work)


OTHER = replace(M9, name="m8", address=Address("tcp", "127.0.0.1", 8901))
REFUSED = {
    "the name of a file's node": (
        replace(OTHER, name="m0"),
        "m0 has the address tcp://127.0.0.1:8000 in cluster.toml, not tcp://127.0.0.1:8901",
    ),
    "the name of a compute node": (replace(OTHER, name="c0"), "c0 is already the name of a compute node"),
    "the address of another": (
        replace(OTHER, address=M9.address, listen=OTHER.address),
        "tcp://127.0.0.1:8900 is already the address of m9; choose another --listen",
    ),
    "the name of a living member": (
        replace(OTHER, name="m9"),
        "m9 is the name of a member that is serving at tcp://127.0.0.1:8900; choose another --name",
    ),
    "too little memory": (
        replace(OTHER, memory=64 << 10),
        "m8 has 64KiB, which holds 64 tokens of 1024 bytes; expected at least 256KiB for 256 tokens",
    ),
    "an address where nobody listens": (
        replace(OTHER, listen=Address("tcp", "127.0.0.1", 8902)),
        "m8 cannot be reached at tcp://127.0.0.1:8901: .*; say with --address where other nodes reach it",
    ),
    "an address where another node listens": (
        replace(OTHER, address=Address("tcp", "127.0.0.1", 6000), listen=OTHER.address),
        "at tcp://127.0.0.1:6000 answers memory node other, not memory node m8; say with --address where",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_node_that_cannot_join_is_told_why(kind: str, llama: Path) -> None:
    """It ends with the reason, and the cluster is as before."""
    node, reason = REFUSED[kind]

    async def work(cluster: SimCluster) -> None:
        await cluster.join(M9)
        await serving(cluster, "m9")
        other = replace(M9, name="other", address=Address("tcp", "127.0.0.1", 6000))
        cluster.config.node.append(other)
        await cluster.start("other")
        before = (await cluster.status("c0")).epoch
        name = node.name if node.name not in ("m0", "c0", "m9") else "again"
        await cluster.join(node, under=name)
        await eventually(lambda: _has_ended(cluster, name))
        with pytest.raises(LaminaError, match=f"^--join: c0 at .* does not take in {node.name}: {reason}"):
            raise cluster.ended[name] or AssertionError
        status = await cluster.status("c0")
        assert status.epoch == before
        assert {m.state for m in status.members} == {"serving"}

    run(config_of(llama, "requests"), work)


async def _has_ended(cluster: SimCluster, name: str) -> bool:
    return name in cluster.ended


@dataclass(frozen=True)
class Refusal:
    """What a cluster of empty models, made with ``config``, says to ``node``."""

    node: MemoryNodeConfig | ComputeNodeConfig
    reason: str
    front: str = "c0"
    config: dict[str, Any] = field(default_factory=dict)


def _partition(partition: str) -> dict[str, Any]:
    return {"pipeline": PipelineConfig(partition=partition)}  # type: ignore[arg-type]


UNSUITABLE = {
    "more memory nodes than heads": Refusal(
        M9, "c0 at .*: the model has 2 KV heads in a layer, which cannot be split over 3 memory nodes", config={}
    ),
    "a smaller node than stripes need": Refusal(
        replace(M9, memory=150 * 1024),
        "c0 at .*: with m9, which holds 288 tokens, the memory nodes could hold 800 tokens of one request, fewer than "
        "the context of 1024",
        config=_partition("tokens") | {"memory": 600 * 1024, "context": 1024},
    ),
    "a replica beside layers": Refusal(
        R1,
        "c0 at .*: the compute nodes of this cluster have layers of their own, so that no other one can join them",
        config={"compute": (range(2), range(2, 4))},
    ),
    "a memory node for the front": Refusal(
        M9, "at tcp://127.0.0.1:8000 answers a memory node, m0; expected the front of a cluster", front="m0"
    ),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_a_node_that_does_not_suit_is_told_why(kind: str) -> None:
    """By the front, or by the node that it takes for the front."""
    refusal = UNSUITABLE[kind]

    async def work(cluster: SimCluster) -> None:
        address, options = cluster.find(refusal.front).address, cluster.config.options()
        joining = Joining(address, refusal.node, cluster.world.network, options)
        with pytest.raises(LaminaError, match=f"^--join: {refusal.reason}".replace(" at .*: ", " at .* take in .*: ")):
            await joining.run(asyncio.Event())

    run(make_config(**refusal.config), work, context=1024)


def test_a_replica_of_another_model_ends() -> None:
    """What lies at the path of the model has to be the model of the front; and the cluster goes on."""

    async def work(cluster: SimCluster) -> None:
        open_model = cluster._open_model

        def open_other(config: ClusterConfig) -> EmptyModel:
            facts = open_model(config).facts
            return EmptyModel(dataclasses.replace(facts, fingerprint="other"), rows=1024)

        cluster._open_model = open_other
        await cluster.join(R1)
        await eventually(lambda: _has_ended(cluster, "r1"))
        with pytest.raises(LaminaError, match=r"^the cluster of c0: model: other here, but empty on c0"):
            raise cluster.ended["r1"] or AssertionError
        async with cluster.client() as client:
            assert await generate(client, [[1] * 20] * 2, max_tokens=10) == [[0] * 10] * 2

    run(make_config(pipeline=PipelineConfig(partition="requests")), work)


def test_a_front_that_is_starting_is_waited_for() -> None:
    """A node can be started before the cluster that it joins."""
    config = make_config(pipeline=PipelineConfig(partition="requests"))

    async def main(world: World) -> None:
        cluster = new_cluster(world, config)
        await cluster.join(M9)
        await asyncio.sleep(1)
        await cluster.start("c0")
        await asyncio.sleep(3)
        for name in ("m0", "m1"):
            await cluster.start(name)
        await serving(cluster, "m9")
        assert set((await cluster.stop_all()).values()) == {None}

    with World(1, model=LINK, tracing=False, limit_s=300) as world:
        world.run(main(world))


# -- the file is read again


def reloadable(model: Path, folder: Path, memory: int = 2, **more: object) -> ClusterConfig:
    """As `config_of`, in a file."""
    config = config_of(model, "requests", compute=2)
    nodes = [*config.compute_nodes, *(memory_node(i) for i in range(memory))]
    pipeline = replace(config.pipeline, **more)
    return write_cluster(folder / "cluster.toml", config.model, nodes, pipeline=pipeline, transport=config.transport)


def memory_node(number: int) -> MemoryNodeConfig:
    return MemoryNodeConfig(name=f"m{number}", address=Address("tcp", "127.0.0.1", 8000 + number), memory=640 * 1024)


def reload(cluster: SimCluster, name: str = "c0") -> None:
    node = cluster.nodes[name]
    assert isinstance(node, ComputeNode)
    node.reload()


def test_memory_nodes_come_and_go_with_the_file(llama: Path, tmp_path: Path) -> None:
    """Requests go on meanwhile. The front that starts again has the file as it is, and finds what memory nodes keep."""
    config = reloadable(llama, tmp_path)
    expected = simulate(config, answers)

    async def work(cluster: SimCluster) -> None:
        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        cluster.config = reloadable(llama, tmp_path, memory=3)
        await cluster.start("m2")
        reload(cluster)
        await serving(cluster, "m0", "m1", "m2")
        assert await asking == expected

        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.02)
        reloadable(llama, tmp_path, memory=1)
        reload(cluster)
        await eventually(lambda: has_no_tenant(cluster, "m2"))
        await eventually(lambda: has_no_tenant(cluster, "m1"))
        assert await asking == expected
        assert [await state(cluster, name) for name in ("m0", "m1", "m2")] == ["serving", None, None]

        cluster.config = reloadable(llama, tmp_path, memory=3)
        reload(cluster)
        await serving(cluster, "m0", "m1", "m2")
        asking = asyncio.ensure_future(answers(cluster))
        await asyncio.sleep(0.03)
        cluster.kill("c0")
        await cluster.start("c0")
        await serving(cluster, "m0", "m1", "m2")
        assert await asking == expected
        await eventually(lambda: is_idle(cluster))
        assert set((await cluster.stop_all()).values()) == {None}

    run(config, work)


def test_a_lost_node_is_taken_out_with_the_file(llama: Path, tmp_path: Path) -> None:
    """It is not sought any more, and nothing waits for it."""
    config = reloadable(llama, tmp_path)

    async def work(cluster: SimCluster) -> None:
        cluster.kill("m1")
        await eventually(lambda: _is_lost(cluster, "m1"))
        reloadable(llama, tmp_path, memory=1)
        reload(cluster)
        await asyncio.sleep(0.1)
        assert await state(cluster, "m1") is None
        await answers(cluster, 2)

    run(config, work)


async def _is_lost(cluster: SimCluster, name: str) -> bool:
    return await state(cluster, name) == "lost"


def test_what_needs_a_restart_is_named(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And stays as it was, while new memory nodes are taken in."""
    config = reloadable(llama, tmp_path)

    async def work(cluster: SimCluster) -> None:
        cluster.config = reloadable(llama, tmp_path, memory=3, max_batch=4)
        await cluster.start("m2")
        reload(cluster)
        await serving(cluster, "m2")
        reload(cluster, "c1")
        await asyncio.sleep(0.1)

    with caplog.at_level("INFO", "lamina.compute"):
        run(config, work)
    assert "event=restart_needed keys=pipeline.max_batch" in caplog.text
    assert f"event=reloaded file={config.file} added=m2 removed=" in caplog.text
    assert "event=not_reloaded reason='only the front reads the file again'" in caplog.text


def test_a_file_with_a_fault_changes_nothing(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the fault."""
    config = reloadable(llama, tmp_path)

    async def work(cluster: SimCluster) -> None:
        before = (await cluster.status("c0")).epoch
        config.file.write_text(config.file.read_text().replace("max_batch = 8", "max_batch = 0"))
        reload(cluster)
        await asyncio.sleep(0.1)
        assert (await cluster.status("c0")).epoch == before
        assert len(await answers(cluster, 2)) == 2

    run(config, work)
    assert re.search(r"event=not_reloaded reason=.*pipeline.max_batch: expected", caplog.text)


def test_nodes_that_the_cluster_needs_stay(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A memory node that is too small to be of use is not taken in, and the last one does not leave."""
    config = reloadable(llama, tmp_path, memory=1)

    async def work(cluster: SimCluster) -> None:
        small = replace(memory_node(1), memory=64 << 10)
        write_cluster(
            config.file, config.model, [*config.compute_nodes, small], pipeline=config.pipeline,
            transport=config.transport,
        )  # fmt: skip
        reload(cluster)
        await asyncio.sleep(0.1)
        assert [await state(cluster, name) for name in ("m0", "m1")] == ["serving", None]

    run(config, work)
    assert re.search(r"event=not_accepted peer=m1 address=\S+ reason='m1 has 64KiB, which holds 64 tokens", caplog.text)
    assert "event=not_removed peer=m0 reason='m0 is the only memory node" in caplog.text
