"""Several compute nodes in real processes: what happens when one is lost."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, PipelineConfig
from tests import harness
from tests.cluster.test_failures import strike
from tests.families import FAMILIES
from tests.oracle import Agreement, Oracle

LAYERS = 4
RANGES = (range(2), range(2, 4))
REPLICAS = (None, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


def start(config: ClusterConfig) -> dict[str, harness.Node]:
    return {n.name: harness.start_node(config, n.name) for n in config.node}


def write_config(
    folder: Path, checkpoint: Path, compute: tuple[range | None, ...], *, batches: int = 2, memory_nodes: int = 1
) -> ClusterConfig:
    pipeline = PipelineConfig(batches=batches, max_batch=4, prefill_tokens=32)
    ports = harness.free_ports(memory_nodes)
    return harness.write_config(folder, checkpoint, ports, pipeline=pipeline, compute=compute)


@pytest.mark.parametrize(
    ("compute", "number"),
    [
        pytest.param(RANGES, signal.SIGKILL, id="ranges-killed"),
        pytest.param(REPLICAS, signal.SIGSTOP, id="replicas-stopped", marks=pytest.mark.slow),
    ],
)
def test_a_lost_compute_node_costs_no_request(
    compute: tuple[range | None, ...], number: signal.Signals, checkpoint: Path, tmp_path: Path, agreement: Agreement
) -> None:
    """A replica does its work alone from then on. Where both have layers, requests wait until the other is back."""
    config = write_config(tmp_path, checkpoint, compute, batches=3)  # of which each needs both nodes
    nodes = start(config)

    async def main() -> list[list[int]]:
        await harness.ready(config, nodes["c0"])
        async with harness.client(config) as client:

            async def ask(token: int) -> list[int]:
                tokens = []
                async for piece in client.stream([token, 2, 3], max_tokens=200):
                    tokens.append(piece.id)
                    answering.set()
                return tokens

            answering = asyncio.Event()
            asked = [asyncio.ensure_future(ask(token)) for token in range(4)]
            await answering.wait()
            strike(nodes["c1"], number)
            if number == signal.SIGKILL:
                nodes["c1"].wait()
                nodes["c1"] = harness.start_node(config, "c1")
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    try:
        answers = asyncio.run(main())
    finally:
        for node in nodes.values():
            node.kill()
    oracle = Oracle(checkpoint)
    for token, answer in enumerate(answers):
        assert len(answer) == 200
        agreement.check(oracle, [token, 2, 3], answer, f"{compute}")
