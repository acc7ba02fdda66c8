"""Real processes: the front is killed and starts again, and its clients' streams go on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lamina
from lamina.config import PipelineConfig, RecoveryConfig
from tests import harness
from tests.cluster.streams import Streams
from tests.families import FAMILIES
from tests.oracle import Agreement, Oracle

TOKENS = 300
STREAMS = 8


@pytest.mark.parametrize("journal", [pytest.param("process", marks=pytest.mark.slow), "machine"])
def test_streams_go_on_when_the_front_is_back(
    journal: str, memory_ports: list[int], tmp_path: Path, agreement: Agreement
) -> None:
    """Killed by signal 9 in mid-answer, also twice: 8 streams, half of them without asyncio, get each token once,
    and as `transformers` chooses them."""
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint")
    oracle = Oracle(checkpoint)
    config = harness.write_config(
        tmp_path,
        checkpoint,
        memory_ports[:2],
        pipeline=PipelineConfig(batches=2, max_batch=4, prefill_tokens=24),
        recovery=RecoveryConfig(journal=journal, journal_dir=str(tmp_path / "journal")),  # type: ignore[arg-type]
    )
    streams = Streams(STREAMS, TOKENS)
    fronts = [harness.start_node(config, "c0")]

    async def kill_when(tokens: int) -> None:
        async def all_have() -> bool:
            return min(streams.counts) >= tokens

        await harness.eventually(all_have, 60)
        assert max(streams.counts) < TOKENS
        fronts[-1].signal(signal.SIGKILL)
        fronts[-1].wait()
        fronts.append(harness.start_node(config, "c0"))

    async def main() -> None:
        await harness.ready(config, fronts[0])
        loop = asyncio.get_running_loop()
        plain = {"secret": config.links.secret, "tls": config.links.tls, "peer_timeout": config.links.peer_timeout}
        with ThreadPoolExecutor(STREAMS) as pool:
            blocking = await loop.run_in_executor(pool, lambda: lamina.Client(config.front.address, **plain))
            async with harness.client(config) as client:
                half = STREAMS // 2
                reading = [asyncio.ensure_future(streams.read(client, number)) for number in range(half)]
                reading += [
                    loop.run_in_executor(pool, streams.read_without_loop, blocking, number)
                    for number in range(half, STREAMS)
                ]
                await kill_when(5)
                if journal == "process":
                    await kill_when(40)
                answers = await asyncio.gather(*reading)
                status = await client.status()
            await loop.run_in_executor(pool, blocking.close)
        assert (status.journal, status.requests_resumed) == (journal, STREAMS)
        for number, answer in enumerate(answers):
            assert len(answer) == TOKENS
            agreement.check(oracle, streams.asked[number], answer, f"stream {number}")
        assert fronts[-1].stop() == 0

    try:
        asyncio.run(main())
        assert "event=restored requests=8" in fronts[1].log.read_text()
    finally:
        for front in fronts:
            if front.process.is_alive():
                front.kill()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("partition", ["requests", "heads"])
def test_streams_go_on_without_a_memory_node_that_stays_away(
    partition: str, tmp_path: Path, agreement: Agreement
) -> None:
    """The front and a memory node are killed by signal 9 in mid-answer, and only the front starts again: 8 streams get
    each token once, as `transformers` chooses them. `lamina status` says which node is missing."""
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint")
    oracle = Oracle(checkpoint)
    config = harness.write_config(
        tmp_path,
        checkpoint,
        harness.free_ports(2),
        pipeline=PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, partition=partition),  # type: ignore[arg-type]
        recovery=RecoveryConfig(grace=1.0, journal_dir=str(tmp_path / "journal")),
    )
    streams = Streams(STREAMS, TOKENS)
    nodes = {node.name: harness.start_node(config, node.name) for node in config.node}

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        async with harness.client(config) as client:
            reading = [asyncio.ensure_future(streams.read(client, number)) for number in range(STREAMS)]
            await harness.eventually(streams.have_begun, 60)
            assert max(streams.counts) < TOKENS
            for name in ("c0", "m1"):
                nodes[name].signal(signal.SIGKILL)
            for name in ("c0", "m1"):
                nodes.pop(name).wait()
            nodes["c0"] = harness.start_node(config, "c0")
            answers = await asyncio.gather(*reading)
            status = await client.status()
        assert (status.state, status.requests_resumed) == ("ready", STREAMS)
        assert {member.name: member.state for member in status.members} == {
            "c0": "serving", "m0": "serving", "m1": "lost",
        }  # fmt: skip
        for number, answer in enumerate(answers):
            assert len(answer) == TOKENS
            agreement.check(oracle, streams.asked[number], answer, f"stream {number}")

    try:
        asyncio.run(main())
        said = subprocess.run(
            [sys.executable, "-m", "lamina", "status", str(config.file)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert said.returncode == 1
        assert "2 of 3 nodes ready" in said.stdout
        assert [line.split()[2] for line in said.stdout.splitlines() if line.startswith("m1 ")] == ["lost"]
        assert "event=starting_without missing=m1" in nodes["c0"].log.read_text()
    finally:
        for node in nodes.values():
            node.kill()
