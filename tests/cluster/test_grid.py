"""Whatever the wiring and whoever comes and goes: tokens are those of ``transformers``, and all space comes back."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lamina.client import Client
from lamina.config import PipelineConfig
from tests import harness
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle

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

GRID = [
    # batches, partition, transport, memory nodes, compute nodes
    (1, "heads", "tcp", 2, "one"),
    (2, "tokens", "shm", 2, "one"),
    (2, "heads", "shm", 1, "two replicas"),
    (3, "tokens", "shm", 3, "two replicas"),
    (4, "requests", "tcp", 2, "three replicas"),
    (2, "requests", "tcp", 3, "two ranges"),
    (4, "heads", "shm", 2, "three ranges"),
]
MORE = [
    chosen
    for chosen in itertools.product(
        (1, 2, 3, 4), ("heads", "requests", "tokens"), ("tcp", "shm"), (1, 2, 3), tuple(COMPUTE)
    )
    if chosen not in GRID
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")
    return path, Oracle(path)


@pytest.mark.parametrize(
    ("batches", "partition", "transport_kind", "nodes", "compute"),
    [*GRID, *(pytest.param(*one, marks=pytest.mark.slow) for one in _random.sample(MORE, 36))],
)
def test_tokens_are_right_and_space_comes_back(
    batches: int,
    partition: str,
    transport_kind: str,
    nodes: int,
    compute: str,
    llama: tuple[Path, Oracle],
    agreement: Agreement,
    tmp_path: Path,
) -> None:
    """Requests come at random times, begin alike or not, are cancelled, and preempt each other where space is short."""
    path, oracle = llama
    what = f"{batches} batches, {partition}, {transport_kind}, {nodes} memory nodes, compute: {compute}"
    random_ = random.Random(what)
    ports = harness.free_ports(nodes)
    wiring = replace(harness.default, kind=transport_kind)
    memory = [harness.start_memory(tmp_path, port, memory="1MiB", wiring=wiring) for port in ports]
    pipeline = PipelineConfig(batches=batches, max_batch=4, prefill_tokens=64, partition=partition)
    config = harness.write_config(tmp_path, path, ports, pipeline=pipeline, wiring=wiring, compute=COMPUTE[compute])
    node, *others = [harness.start_node(config, one.name) for one in config.compute_nodes]
    prompts = [
        COMMON[: random_.choice((0, 48, 200, 256))]
        + [random_.randrange(VOCABULARY) for _ in range(random_.choice((1, 17, 60)))]
        for _ in range(REQUESTS)
    ]

    async def ask(client: Client, prompt: list[int]) -> list[int]:
        """An answer, or as much of it as comes before the client changes its mind."""
        await asyncio.sleep(random_.random())
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

    async def main() -> list[list[int]]:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

            async def idle() -> bool:
                everybody = [await client.status(), *[await harness.status_of(config, n) for n in config.memory_nodes]]
                return all(s.sequences == 0 and s.kv_tokens_free == s.kv_tokens_total > 0 for s in everybody)

            await harness.eventually(idle)
            return answers

    with harness.running(node, *others, *memory):
        answers = asyncio.run(main())
        for one in (node, *others):
            one.signal(signal.SIGTERM)
        assert [one.wait() for one in (node, *others)] == [0] * len(COMPUTE[compute])
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer:
            agreement.check(oracle, prompt, answer, f"{what}, prompt of {len(prompt)}")
