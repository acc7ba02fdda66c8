"""Several compute nodes: who may talk to whom, what they must agree on, and what happens when one is lost."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import NodeError, RequestError
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
    ("compute", "batches"),
    [(RANGES, 2), (REPLICAS, 3), (REPLICAS, 4)],
    ids=["ranges", "replicas in rotation", "replicas"],
)
def test_each_node_runs_its_part(
    compute: tuple[range | None, ...], batches: int, checkpoint: Path, agreement: Agreement, tmp_path: Path
) -> None:
    """Which their counters show; seeded answers are those of a single node, and greedy ones of ``transformers``."""
    prompts = [[token, *range(10, 80)] for token in range(8)]

    async def ask(config: ClusterConfig, nodes: dict[str, harness.Node], temperature: float) -> list[list[int]]:
        await harness.ready(config, nodes["c0"])
        async with harness.client(config) as client:
            answers = await asyncio.gather(
                *(client.generate(p, max_tokens=12, temperature=temperature, seed=5) for p in prompts)
            )
        return [answer.tokens for answer in answers]

    def run(folder: str, compute: tuple[range | None, ...], temperature: float) -> tuple[list[list[int]], list[int]]:
        (tmp_path / folder).mkdir()
        config = write_config(tmp_path / folder, checkpoint, compute, batches=batches)
        nodes = start(config)

        async def main() -> tuple[list[list[int]], list[int]]:
            answers = await ask(config, nodes, temperature)
            statuses = [await harness.status_of(config, n) for n in config.compute_nodes]
            names = {n.name for n in config.node}
            assert all({peer.name for peer in status.peers} == names - {status.name} for status in statuses)
            return answers, [status.layers for status in statuses]

        with harness.running(*nodes.values()):
            return asyncio.run(main())

    greedy, layers = run("greedy", compute, 0.0)
    drawn, _ = run("drawn", compute, 1.0)
    alone, _ = run("alone", (None,), 1.0)

    oracle = Oracle(checkpoint)
    for prompt, answer in zip(prompts, greedy, strict=True):
        agreement.check(oracle, prompt, answer, f"compute nodes {compute}")
    assert drawn == alone
    assert drawn != greedy
    assert all(layers)
    if compute == RANGES:
        assert layers[0] == layers[1]  # of each step half of its layers
    assert sum(layers) % LAYERS == 0


def test_clients_are_told_where_the_front_is(checkpoint: Path, tmp_path: Path) -> None:
    """By any other compute node."""
    config = write_config(tmp_path, checkpoint, RANGES)
    nodes = start(config)

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        other = config.compute_nodes[1]
        async with harness.lamina.connect(other.address) as client:
            with pytest.raises(
                RequestError, match=f"c1 is not the front; clients talk to c0 at {config.front.address}"
            ):
                await client.generate([1], max_tokens=1)

    with harness.running(*nodes.values()):
        asyncio.run(main())


@pytest.mark.parametrize("compute", [RANGES, REPLICAS], ids=["ranges", "replicas"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
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


def test_a_lost_front_ends_the_others(checkpoint: Path, tmp_path: Path) -> None:
    """With a word about it."""
    config = write_config(tmp_path, checkpoint, RANGES)
    nodes = start(config)

    with harness.running(*nodes.values()):
        asyncio.run(harness.ready(config, nodes["c0"]))
        nodes["c0"].kill()
        assert nodes["c1"].wait() == 1
        # Whoever hears of it first tells it.
        assert re.search("compute node c0 was lost|its front c0 is gone", nodes["c1"].log.read_text())


def test_files_that_differ_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """With the key and both values, on either node."""
    config = write_config(tmp_path, checkpoint, RANGES)
    other = tmp_path / "other.toml"
    other.write_text(config.file.read_text().replace("max_batch = 4", "max_batch = 5"))
    nodes = [harness.start_node(config, name) for name in ("m0", "c0")]
    log = tmp_path / "other.log"
    nodes.append(harness.start(log, "node", "--role", "compute", "--config", str(other), "--name", "c1"))

    with harness.running(*nodes):
        assert [node.wait() for node in nodes[1:]] == [2, 2]
        assert "pipeline.max_batch: 4 here, but 5 on c1" in nodes[1].log.read_text()
        assert "pipeline.max_batch: 5 here, but 4 on c0" in log.read_text()


def test_layers_that_the_model_has_not_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Or that nobody would run."""
    for ranges, end in (((range(2), range(2, 5)), 4), ((range(2), range(2, 3)), 2)):
        config = write_config(tmp_path, checkpoint, ranges)
        nodes = start(config)
        with harness.running(*nodes.values()):
            assert nodes["c0"].wait() == 2
            assert f"c1: layers: the last compute node ends with layer {end}, the model with layer 3" in (
                nodes["c0"].log.read_text()
            )


def test_a_compute_node_that_does_not_come_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """After ``start_timeout``; meanwhile the status says who is waited for."""
    for missing, there in (("c1", "c0"), ("c0", "c1")):
        config = harness.write_config(tmp_path, checkpoint, harness.free_ports(1), compute=REPLICAS, start_timeout=2.0)
        nodes = [harness.start_node(config, "m0"), harness.start_node(config, there)]

        async def waiting_for(config: ClusterConfig = config, there: str = there, missing: str = missing) -> None:
            async def waits() -> bool:
                return missing in (await harness.status_of(config, config.find(there))).waiting_for

            await harness.eventually(waits)

        with harness.running(*nodes):
            asyncio.run(waiting_for())
            assert nodes[1].wait() == 1
            assert f"compute node {missing}" in nodes[1].log.read_text()
