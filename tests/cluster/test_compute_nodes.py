"""Several compute nodes in real processes: what happens when one is lost."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import NodeError
from tests import harness
from tests.cluster.test_failures import strike
from tests.families import FAMILIES

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
    [(RANGES, signal.SIGKILL), (REPLICAS, signal.SIGSTOP)],
    ids=["ranges-killed", "replicas-stopped"],
)
def test_a_lost_compute_node_is_named(
    compute: tuple[range | None, ...], number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    """To the clients of the front, which ends. The memory node takes the next cluster."""
    config = write_config(tmp_path, checkpoint, compute, batches=3)  # of which each needs both nodes
    nodes = start(config)

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        async with harness.client(config) as client:

            async def ask(token: int) -> None:
                async for _ in client.stream([token, 2, 3], max_tokens=500):
                    answering.set()

            answering = asyncio.Event()
            asked = [asyncio.ensure_future(ask(token)) for token in range(4)]
            await answering.wait()
            strike(nodes["c1"], number)
            for one in asked:
                with pytest.raises(NodeError, match="c1") as caught:
                    await asyncio.wait_for(one, 20)
                assert caught.value.node == "c1"

    with harness.running(*nodes.values()):
        asyncio.run(main())
        assert nodes["c0"].wait() == 1
        nodes["c1"].kill()
        again = [harness.start_node(config, name) for name in ("c0", "c1")]
        with harness.running(*again):
            asyncio.run(harness.ready(config, again[0]))
