"""The dashboard beside a real Prometheus: every expression in it finds data of a running cluster."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lamina.config import write_cluster
from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.transport import Address
from tests import harness

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = shutil.which("prometheus")
SCRAPES = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (CONTRIBUTING.md)"),
]


def expressions() -> list[str]:
    """All expressions of the dashboard, with its variables filled in."""
    panels = json.loads((DEPLOY / "grafana" / "lamina.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [expr.replace("$job", "lamina").replace("$__rate_interval", "30s") for expr in found]


def test_every_expression_of_the_dashboard_finds_data(tmp_path: Path) -> None:
    """After a few scrapes of a cluster that answers, refuses and shares prompts; with the example's configuration."""
    plain = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(2))
    *ports, web = harness.free_ports(len(plain.node) + 1)
    wired = [
        replace(node, metrics=Address("tcp", "127.0.0.1", port)) for node, port in zip(plain.node, ports, strict=True)
    ]
    config = write_cluster(plain.file, plain.model, wired, transport=plain.transport)
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    with harness.running(*started.values()):
        asyncio.run(harness.ready(config, started["c0"]))
        example = (DEPLOY / "prometheus.yml").read_text().replace("scrape_interval: 5s", "scrape_interval: 1s")
        for old, port in zip((9100, 9101, 9102), ports, strict=True):
            assert f"127.0.0.1:{old}" in example
            example = example.replace(f"127.0.0.1:{old}", f"127.0.0.1:{port}")
        (tmp_path / "prometheus.yml").write_text(example)
        arguments = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]
        arguments += ["--web.listen-address", f"127.0.0.1:{web}", "--log.level", "error"]
        with subprocess.Popen([str(PROMETHEUS), *arguments], cwd=tmp_path) as prometheus:
            try:
                asyncio.run(_work(config))
                empty = {expr: found for expr in expressions() if (found := _query(web, expr)) in ([], ["NaN"])}
            finally:
                prometheus.terminate()
    assert len(expressions()) > 30
    assert empty == {}


async def _work(config: Any) -> None:
    """Have requests answered, and some refused, for the time of some scrapes."""
    deadline = time.monotonic() + SCRAPES + 2
    async with harness.client(config) as client:
        while time.monotonic() < deadline:
            await asyncio.gather(*(client.generate("Once upon a time", max_tokens=10) for _ in range(3)))
            with pytest.raises(RequestError):
                await client.generate("Once upon a time", max_tokens=10**6)


def _query(port: int, expr: str) -> list[str]:
    """The values of an expression now; an error of Prometheus fails the test."""
    query = urllib.parse.urlencode({"query": expr})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    return [sample["value"][1] for sample in found["data"]["result"]]


def test_the_dashboard_names_only_metrics_that_are_documented() -> None:
    """What the expressions name is in the tables of the page, or comes from the process."""
    told = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    named = {name for expr in expressions() for name in re.findall(r"lamina_[a-z_0-9]+", expr)}
    assert len(named) > 15
    assert {name for name in named if f"`{name.removesuffix('_bucket')}`" not in told} == set()
