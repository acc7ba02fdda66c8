"""Memory nodes are one pool: what does not fit on one goes to another, and every answer stays the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, NodeConfig, PipelineConfig
from lamina.errors import NodeError
from lamina.ops.drain import drained
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.wire.admin import Status
from tests.families import VOCABULARY
from tests.sim.clusters import (
    LINK,
    eventually,
    has_no_tenant,
    is_idle,
    make_config,
    new_cluster,
    seconds,
    simulate,
)

CONTEXT = 256


def requests(count: int, seed: int = 1) -> list[tuple[list[int], int]]:
    """Prompts with the length of their answers. Prompts are short, answers of all lengths: sequences outgrow what was
    seen of them when they were placed."""
    chosen = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = [chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 48))]
        found.append((prompt, chosen.randint(40, CONTEXT - len(prompt))))
    return found


async def answers(cluster: SimCluster, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    """The answers to all of them, asked at once, greedy and seeded in turns."""
    async with cluster.client() as client:
        found = await asyncio.gather(
            *(
                client.generate(prompt, max_tokens=most, temperature=0.7 * (i % 2), seed=i, ignore_eos=True)
                for i, (prompt, most) in enumerate(asked)
            )
        )
    return [answer.tokens for answer in found]


def config_of(
    model: Path | str, partition: str, *, moves: bool = True, tokens: int = 320, **more: int
) -> ClusterConfig:
    """A cluster whose three memory nodes hold about so many tokens each."""
    pipeline = PipelineConfig(max_batch=16, partition=partition, moves=moves, batches=more.get("batches", 1))
    compute = (None,) * more.get("compute", 1)
    return make_config(model, memory_nodes=3, memory=tokens * 2048, compute=compute, context=CONTEXT, pipeline=pipeline)


@pytest.mark.parametrize(
    ("partition", "batches"),
    [
        ("requests", 2),
        ("tokens", 1),
        pytest.param("requests", 1, marks=pytest.mark.slow),
        pytest.param("tokens", 2, marks=pytest.mark.slow),
    ],
)
def test_requests_outgrow_their_nodes(partition: str, batches: int, llama: Path) -> None:
    """With moves fewer are preempted, and the tokens are the same; in the end every block is free."""
    asked = requests(16)

    async def work(cluster: SimCluster) -> tuple[list[list[int]], Status]:
        return await answers(cluster, asked), await cluster.status("c0")

    found, status = simulate(config_of(llama, partition, batches=batches), work)
    expected, before = simulate(config_of(llama, partition, moves=False, batches=batches), work)

    assert found == expected
    assert status.preemptions < before.preemptions
    assert status.redirections > 0
    assert before.redirections == before.moves == 0


# -- nodes that leave


def slowly(node: NodeConfig) -> Callable[[str, Place | None], float]:
    """So that answers take seconds, and are far from over when a node has left."""
    usual = seconds(node)
    return lambda name, at: 10 * usual(name, at)


DRAINED = {
    "requests": ("requests", 1, 1),
    "requests, replicas": ("requests", 2, 2),
    "tokens": ("tokens", 1, 2),
    "heads": ("heads", 2, 1),
}


@pytest.mark.parametrize("kind", DRAINED)
def test_a_memory_node_leaves_under_load(kind: str, llama: Path) -> None:
    """No request fails, the tokens are the same, and the node has no tenant; started again, it serves again."""
    partition, compute, batches = DRAINED[kind]
    config = config_of(llama, partition, tokens=1200, compute=compute, batches=batches)
    asked = requests(12)
    expected = simulate(config, lambda cluster: answers(cluster, asked))
    said: list[str] = []

    async def main(world: World) -> list[list[int]]:
        async with new_cluster(world, config, seconds=slowly) as cluster:
            await cluster.ready()
            asking = asyncio.ensure_future(answers(cluster, asked))
            await asyncio.sleep(0.2)
            await drained(config, "m0", 60.0, said.append, network=world.network)
            assert not asking.done()
            await eventually(lambda: has_no_tenant(cluster))
            await asyncio.sleep(5.0)
            assert await has_no_tenant(cluster)
            await drained(config, "m0", 60.0, said.append, network=world.network)
            states = {m.name: m.state for m in (await cluster.status("c0")).members}
            assert states["m0"] == "gone"
            found = await asking
            status = await cluster.status("c0")
            assert status.preemptions == 0
            assert bool(status.moves) == (partition != "heads")

            await cluster.stop("m0")
            await asyncio.sleep(1.0)
            await cluster.start("m0")
            await eventually(lambda: is_idle(cluster))
            assert await answers(cluster, asked[:3]) == expected[:3]
            cluster.check()
            return found

    with World(1, model=LINK, tracing=False, limit_s=200) as world:
        assert world.run(main(world)) == expected
    assert said[-1] == "m0 has left the cluster and may be stopped; it comes back when it is started again"
    assert ("divided anew" in said[0]) == (partition == "heads")


def test_what_finds_no_room_is_computed_anew(llama: Path) -> None:
    """When the patience is over; no request fails."""
    config = config_of(llama, "requests", tokens=272)
    asked = [(prompt, 100) for prompt, _ in requests(6, seed=3)]
    expected = simulate(config, lambda cluster: answers(cluster, asked))

    async def work(cluster: SimCluster) -> list[list[int]]:
        asking = asyncio.ensure_future(answers(cluster, asked))
        await asyncio.sleep(0.02)
        await drained(config, "m1", 0.005, lambda text: None, network=cluster.world.network)
        return await asking

    async def main(world: World) -> list[list[int]]:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            return await work(cluster)

    with World(1, model=LINK, tracing=False, limit_s=200) as world:
        assert world.run(main(world)) == expected


REFUSED = {
    "the last": (1, "m0", "m0 is the only memory node; the cluster cannot serve without it"),
    "a compute node": (2, "c0", "c0 is a compute node, which holds no keys and values"),
    "a node that is needed": (
        2,
        "m0",
        "the other memory nodes can hold 32 tokens of one request, fewer than the context of 64",
    ),
    "an unknown one": (2, "m7", "no node called 'm7'; known: c0, m0, m1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_node_that_cannot_leave_stays(kind: str, llama: Path) -> None:
    """The reason is said, and nothing changes."""
    nodes, name, reason = REFUSED[kind]
    pipeline = PipelineConfig(partition="requests")
    config = make_config(llama, memory=(1 << 20, 64 << 10)[:nodes], pipeline=pipeline, memory_nodes=nodes, context=64)

    async def work(cluster: SimCluster) -> None:
        with pytest.raises(Exception, match=reason) as caught:
            await drained(config, name, 60.0, lambda text: None, network=cluster.world.network)
        assert isinstance(caught.value, NodeError)
        assert {m.state for m in (await cluster.status("c0")).members} == {"serving"}

    simulate(config, work)
