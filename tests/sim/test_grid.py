"""Whatever the wiring, and whichever clients come and go: tokens are those of ``transformers``, and all space comes
back."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from lamina.client import AsyncClient
from lamina.config import PipelineConfig
from lamina.sim.cluster import SimCluster
from tests.families import VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import JITTER, LINK, WINDOWS, make_config, simulate

_random = random.Random(3)
COMMON = [_random.randrange(VOCABULARY) for _ in range(300)]
MOST_TOKENS = 40
REQUESTS = 14

COMPUTE: dict[str, tuple[range | None, ...]] = {
    "one": (None,),
    "two replicas": (None, None),
    "three replicas": (None, None, None),
    "two ranges": (range(2), range(2, 4)),
    "three ranges": (range(1), range(1, 3), range(3, 4)),
}
"""By name, the layers of each compute node."""
LINKS = {"even": LINK, "jitter": JITTER, "windows": WINDOWS}

GRID = [
    # batches, partition, links, memory nodes, compute nodes
    (1, "heads", "even", 2, "one"),
    (2, "tokens", "windows", 2, "one"),
    (2, "heads", "windows", 1, "two replicas"),
    (3, "tokens", "jitter", 3, "two replicas"),
    (4, "requests", "even", 2, "three replicas"),
    (2, "requests", "jitter", 3, "two ranges"),
    (4, "heads", "windows", 2, "three ranges"),
]
MORE = [
    chosen
    for chosen in itertools.product(
        (1, 2, 3, 4), ("heads", "requests", "tokens"), tuple(LINKS), (1, 2, 3), tuple(COMPUTE)
    )
    if chosen not in GRID
]


@pytest.mark.parametrize(
    ("batches", "partition", "links", "nodes", "compute"),
    [*GRID, *(pytest.param(*one, marks=pytest.mark.slow) for one in _random.sample(MORE, 100))],
)
def test_tokens_are_right_and_space_comes_back(
    batches: int,
    partition: str,
    links: str,
    nodes: int,
    compute: str,
    llama: Path,
    oracle: Oracle,
    agreement: Agreement,
) -> None:
    """Requests come at random times, begin alike or not, are cancelled, and preempt each other where space is short."""
    what = f"{batches} batches, {partition}, {links}, {nodes} memory nodes, compute: {compute}"
    random_ = random.Random(what)
    pipeline = PipelineConfig(batches=batches, max_batch=4, prefill_tokens=64, partition=partition)
    config = make_config(llama, compute=COMPUTE[compute], memory_nodes=nodes, memory=1 << 20, pipeline=pipeline)
    prompts = [
        COMMON[: random_.choice((0, 48, 200, 256))]
        + [random_.randrange(VOCABULARY) for _ in range(random_.choice((1, 17, 60)))]
        for _ in range(REQUESTS)
    ]

    async def ask(client: AsyncClient, prompt: list[int]) -> list[int]:
        """An answer, or as much of it as comes before the client changes its mind."""
        await asyncio.sleep(0.05 * random_.random())
        most = random_.choice((5, 20, MOST_TOKENS))
        share, stop = random_.random() < 0.8, random_.choice((None, None, None, 0, 3))
        tokens: list[int] = []
        stream = client.stream(prompt, max_tokens=most, share_prefix=share, priority=random_.choice((0, 0, 5)))
        async with stream:
            async for token in stream:
                if len(tokens) == stop:
                    return tokens
                tokens.append(token.id)
        assert len(tokens) == most
        return tokens

    async def work(cluster: SimCluster) -> list[list[int]]:
        async with cluster.client() as client:
            return list(await asyncio.gather(*(ask(client, prompt) for prompt in prompts)))

    answers = simulate(config, work, link=LINKS[links])
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer:
            agreement.check(oracle, prompt, answer, f"{what}, prompt of {len(prompt)}")
