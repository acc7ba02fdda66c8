"""Real processes: the front is killed and does not start again, and its clients' streams go on at its standby."""

from __future__ import annotations

import asyncio
import json
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


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``lamina`` to its end."""
    command = [sys.executable, "-m", "lamina", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(120)
def test_streams_go_on_at_the_standby(tmp_path: Path, agreement: Agreement) -> None:
    """Killed by signal 9 in mid-answer, without a new start: 8 streams, half of them without asyncio, get each token
    once, and as `transformers` chooses them. Commands find the new front; and the old one, when it starts, follows."""
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint")
    oracle = Oracle(checkpoint)
    config = harness.write_config(
        tmp_path,
        checkpoint,
        harness.free_ports(2),
        pipeline=PipelineConfig(batches=2, max_batch=4, prefill_tokens=24),
        compute=(None, None),
        recovery=RecoveryConfig(grace=1.0, journal_dir=str(tmp_path / "journal")),
    )
    streams = Streams(STREAMS, TOKENS)
    nodes = {node.name: harness.start_node(config, node.name) for node in config.node}

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(STREAMS) as pool:
            blocking = await loop.run_in_executor(pool, lambda: lamina.Client(config))
            async with lamina.connect(config) as client:
                half = STREAMS // 2
                reading = [asyncio.ensure_future(streams.read(client, number)) for number in range(half)]
                reading += [
                    loop.run_in_executor(pool, streams.read_without_loop, blocking, number)
                    for number in range(half, STREAMS)
                ]
                await harness.eventually(streams.have_begun, 60)
                assert max(streams.counts) < TOKENS
                nodes["c0"].signal(signal.SIGKILL)
                nodes["c0"].wait()
                answers = await asyncio.gather(*reading)
                status = await client.status()
            await loop.run_in_executor(pool, blocking.close)
        assert (status.name, status.front, status.requests_resumed) == ("c1", "c1", STREAMS)
        for number, answer in enumerate(answers):
            assert len(answer) == TOKENS
            agreement.check(oracle, streams.asked[number], answer, f"stream {number}")

    with harness.running(*nodes.values()):
        asyncio.run(main())
        assert "event=took_over" in nodes["c1"].log.read_text()

        said = run_command("generate", str(config.file), "--prompt-ids", "1 2 3", "--max-tokens", "4", "--json")
        assert len(json.loads(said.stdout)["tokens"]) == 4, said.stderr
        told = {
            node["name"]: node for node in json.loads(run_command("status", str(config.file), "--json").stdout)["nodes"]
        }
        assert (told["c0"]["state"], told["c1"]["member"]["state"]) == ("lost", "serving")

        nodes["again"] = harness.start_node(config, "c0")
        try:

            async def follows() -> bool:
                return (await harness.status_of(config, config.front)).state == "ready"

            asyncio.run(harness.eventually(follows, 60))
            assert asyncio.run(harness.status_of(config, config.front)).front == "c1"
        finally:
            nodes["again"].kill()
