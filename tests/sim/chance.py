"""Random runs of simulated clusters: random files, clients that come and change their minds."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from lamina.client import AsyncClient
from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import LaminaError
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from tests.sim.clusters import (
    BLOCK_TOKENS,
    EMPTY_VOCABULARY,
    JITTER,
    LINK,
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


def digest(trace: list[str]) -> str:
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()


if __name__ == "__main__":
    for model in sys.argv[1:]:
        print(digest(run_traffic(5, model, requests=8, tracing=True).trace))  # noqa: T201
