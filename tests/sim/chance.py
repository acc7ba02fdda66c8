"""Random runs of simulated clusters: random files, clients that come and change their minds, nodes that are lost."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from lamina.client import AsyncClient
from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import ConnectError, LaminaError
from lamina.sim.cluster import SimCluster
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from tests.sim.clusters import (
    BLOCK_TOKENS,
    EMPTY_VOCABULARY,
    JITTER,
    LINK,
    PEER_TIMEOUT_S,
    make_config,
    new_cluster,
    settled,
    statuses,
)

LAYERS = 3
CONTEXT = 192
COMPUTE: tuple[tuple[range | None, ...], ...] = (
    (None,),
    (None, None),
    (None, None, None),
    (range(1), range(1, 3)),
    (range(1), range(1, 2), range(2, 3)),
)
READY_S = 0.06
"""Virtual seconds until a random cluster is ready, or a little more."""
NEVER_S = 600.0
"""Longer than any run of a random cluster takes after its last event, in virtual seconds."""


def random_config(
    chance: Random, model: Path | str = "empty", *, node_tokens: int = CONTEXT + BLOCK_TOKENS
) -> ClusterConfig:
    """A small cluster of any kind; a memory node of the empty model holds ``node_tokens`` or somewhat more."""
    compute = chance.choice(COMPUTE)
    pipeline = PipelineConfig(
        batches=chance.randint(1, 3),
        max_batch=chance.choice((1, 4, 8)),
        prefill_tokens=chance.choice((1, 8, 32)),
        prefill_kv=chance.choice((2**30, 2**12)),
        partition=chance.choice(("heads", "requests", "tokens")),
    )
    # A block of the empty backend takes 64 bytes a layer.
    blocks = node_tokens // BLOCK_TOKENS * chance.choice((1, 1, 2))
    memory = 64 * LAYERS * (blocks + 1) if model == "empty" else 1 << 20
    return make_config(model, compute=compute, memory_nodes=chance.randint(1, 3), memory=memory, pipeline=pipeline)


@dataclass
class Asked:
    """A request of a random client, and how it ended."""

    at_s: float
    """When it was asked."""
    prompt: list[int]
    most: int
    tokens: list[int] = field(default_factory=list)
    error: LaminaError | None = None
    cancelled: bool = False

    @property
    def is_answered(self) -> bool:
        return len(self.tokens) == self.most


async def ask(client: AsyncClient, chance: Random, vocabulary: int, within_s: float) -> Asked:
    """A random request within so many seconds, which its client may give up."""
    await asyncio.sleep(within_s * chance.random())
    shared = [i % vocabulary for i in range(chance.choice((0, 0, 20, 40)))]
    prompt = shared + [chance.randrange(vocabulary) for _ in range(chance.choice((1, 1, 7, 30)))]
    asked = Asked(
        asyncio.get_running_loop().time(), prompt, chance.choice((5, CONTEXT - len(prompt), CONTEXT - len(prompt)))
    )
    stop = chance.choice((None, None, None, 0, 3))
    sharing, priority = chance.random() < 0.8, chance.choice((0, 0, 5))
    temperature = chance.choice((0.0, 1.0))
    settings = {"share_prefix": sharing, "priority": priority, "temperature": temperature}
    try:
        async with client.stream(prompt, max_tokens=asked.most, **settings) as stream:
            async for token in stream:
                if len(asked.tokens) == stop:
                    asked.cancelled = True
                    return asked
                asked.tokens.append(token.id)
    except LaminaError as error:
        asked.error = error
    return asked


async def ask_all(
    cluster: SimCluster, count: int, *, vocabulary: int = EMPTY_VOCABULARY, within_s: float = 0.05, clients: int = 2
) -> list[Asked]:
    """Random requests of several clients; when all of one client have ended, it leaves."""
    chance = cluster.world.random

    async def one_client() -> list[Asked]:
        async with cluster.client() as client:
            own = Random(chance.getrandbits(64))
            return list(
                await asyncio.gather(*(ask(client, own, vocabulary, within_s) for _ in range(count // clients)))
            )

    return [asked for client in await asyncio.gather(*(one_client() for _ in range(clients))) for asked in client]


@dataclass
class Traffic:
    """What came of a random run without losses."""

    config: ClusterConfig
    asked: list[Asked]
    steps: int
    kv_tokens: int
    preemptions: int
    trace: list[str]


def run_traffic(seed: int, model: Path | str = "empty", *, requests: int = 12, tracing: bool = False) -> Traffic:
    """Random requests on a random cluster; in the end every block is free on every node, and every node stops."""
    chance = Random(f"traffic {seed}")
    config = random_config(chance, model)
    vocabulary = EMPTY_VOCABULARY if model == "empty" else 300

    async def main(world: World) -> Traffic:
        async with new_cluster(world, config, layers=LAYERS, context=CONTEXT) as cluster:
            await cluster.ready()
            asked = await ask_all(cluster, requests, vocabulary=vocabulary)
            cluster.check()
            await settled(cluster)
            front = (await statuses(cluster))[0]
            assert front.requests_waiting == front.requests_running == 0
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended
            return Traffic(config, asked, front.steps, front.kv_tokens_total, front.preemptions, world.trace)

    with World(seed, model=chance.choice((LINK, JITTER)), tracing=tracing) as world:
        return world.run(main(world))


# -- losses

EVENTS = ("kill", "freeze", "cut")


@dataclass
class Loss:
    """A run in which a node is lost, and what came of it."""

    seed: int
    what: str
    victim: str
    at_s: float
    asked: list[Asked]
    ended: dict[str, BaseException | None]
    ready: bool

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.what} {self.victim} at {self.at_s:.4f} s"


def run_loss(seed: int, *, requests: int = 8) -> Loss:
    """A node is killed, frozen or cut off from its neighbour at a random moment of a random run.

    Nothing hangs, every compute node ends by itself, and the memory nodes that are left have given all back.
    """
    chance = Random(f"loss {seed}")
    config = random_config(chance)
    what = chance.choice(EVENTS)
    at_s = chance.choice((READY_S, 0.2, 0.6)) * chance.random()
    victim = chance.choice([node.name for node in config.node])
    front = config.front.name
    # What is cut off loses the front; the front itself loses a node that it needs.
    other = front if victim != front else chance.choice([node.name for node in config.node if node.name != front])
    link: LinkModel = chance.choice((LINK, JITTER))

    async def main(world: World) -> Loss:
        async with new_cluster(world, config, layers=LAYERS, context=CONTEXT) as cluster:
            lost = other if what == "cut" and victim == front else victim
            result = Loss(seed, what, lost, at_s, [], cluster.ended, ready=False)

            async def use() -> None:
                await cluster.ready()
                result.ready = True
                result.asked = await ask_all(cluster, requests)

            def strike() -> None:
                if what == "kill":
                    cluster.kill(victim)
                elif what == "freeze":
                    world.network.freeze(victim)
                else:
                    world.network.cut(victim, other)

            using = asyncio.ensure_future(use())
            world.loop.call_at(at_s, strike)
            try:
                await using
            except ConnectError:
                assert not result.ready or world.loop.time() > at_s, "a client may come when the front has left"
            except LaminaError:
                assert not result.ready, "clients are told what became of their requests"
            await asyncio.sleep(max(0.0, at_s - world.loop.time()))
            # A stopped process is killed in the end; what waits for a node to start gives up, and leases end.
            await asyncio.sleep(max(config.transport.start_timeout, config.recovery.lease) + 3 * PEER_TIMEOUT_S)
            if what == "freeze" and victim not in cluster.ended:
                cluster.kill(victim)
                await asyncio.sleep(2 * PEER_TIMEOUT_S)
            for node in config.compute_nodes:
                assert node.name in cluster.ended, f"{result}: {node.name} goes on"
            for node in config.memory_nodes:
                if node.name not in cluster.ended and what != "cut":
                    assert (await cluster.status(node.name)).tenants == [], f"{result}: {node.name} holds a tenant"
            await cluster.stop_all()
            assert set(cluster.ended) == {node.name for node in config.node}, f"{result}: {cluster.ended}"
            return result

    with World(seed, model=link, tracing=False, limit_s=NEVER_S) as world:
        return world.run(main(world))


def digest(trace: list[str]) -> str:
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()


if __name__ == "__main__":
    for model in sys.argv[1:]:
        print(digest(run_traffic(5, model, requests=8, tracing=True).trace))  # noqa: T201
