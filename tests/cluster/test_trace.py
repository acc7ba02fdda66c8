"""`lamina trace`: what every node computed, by batch and layer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, PipelineConfig
from lamina.errors import NodeError
from lamina.recording import record
from tests import harness
from tests.families import FAMILIES


def test_trace(memory_ports: list[int], tmp_path: Path) -> None:
    """While requests are answered, every layer of every batch is in the trace: computed here and attended there."""
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint")
    pipeline = PipelineConfig(batches=2, max_batch=1)
    config = harness.write_config(tmp_path, checkpoint, memory_ports[:1], pipeline=pipeline, memory=2 << 20)
    node = harness.start_node(config, "c0")
    with harness.running(node):
        asyncio.run(_trace(config, node, tmp_path / "trace.json"))
        assert node.stop() == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    seen = {(names[e["pid"]], e["args"].get("batch"), e["name"], e["args"].get("layer")) for e in spans}
    operations = (("c0", "head"), ("c0", "tail"), ("m0", "past"), ("m0", "finish"))
    assert seen >= {(node, batch, name, layer) for node, name in operations for batch in (0, 1) for layer in (0, 1)}
    assert {e["name"] for e in spans} >= {"begin", "plan", "sample", "query", "answer", "prefill", "decode"}
    assert {e["ph"] for e in events} == set("MXstf")


async def _trace(config: ClusterConfig, node: harness.Node, out: Path) -> None:
    await harness.ready(config, node)
    async with harness.client(config) as client:

        async def ask_on() -> None:
            while True:
                await client.generate([1, 2, 3], max_tokens=20)

        asking = [asyncio.create_task(ask_on()) for _ in range(2)]
        tracing = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lamina", "trace", "--seconds", "1"),
            *(str(config.file), "--out", str(out)),
            stderr=subprocess.PIPE,
        )
        _, told = await tracing.communicate()
        for task in asking:
            task.cancel()
    assert tracing.returncode == 0, told.decode()
    assert f"{out}: " in told.decode()
    assert "requests; open it in ui.perfetto.dev" in told.decode()


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that does not answer is named."""
    monkeypatch.setattr("lamina.recording.REACH_S", 0.2)
    config = harness.write_config(tmp_path, tmp_path, harness.free_ports(1))
    with pytest.raises(NodeError, match="node c0 cannot be reached"):
        asyncio.run(record(config, 0.1))
