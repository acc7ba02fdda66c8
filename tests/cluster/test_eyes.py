"""Watching a running cluster: metrics for Prometheus, `lamina top`, logs as JSON, and the view of the page."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lamina.config import ClusterConfig, write_cluster
from lamina.demo.run import CHECKPOINT
from lamina.serve import page
from lamina.serve.cluster_view import ClusterView
from lamina.transport import Address
from tests import harness

LAMINA = [sys.executable, "-P", "-m", "lamina"]
PROMPT = "Once upon a time"
ALTERNATE = 1049
"""The number of the terminal's other screen."""
STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterConfig, dict[str, harness.Node]]]:
    """A running cluster of one compute and one memory node that have metrics and write their logs as JSON."""
    folder = tmp_path_factory.mktemp("eyes")
    plain = harness.write_config(folder, CHECKPOINT, harness.free_ports(1))
    wired = [
        replace(node, metrics=Address("tcp", "127.0.0.1", port))
        for node, port in zip(plain.node, harness.free_ports(2), strict=True)
    ]
    config = write_cluster(plain.file, plain.model, wired, transport=plain.transport)
    with config.file.open("a") as file:
        file.write('\n[log]\nformat = "json"\n')
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    with harness.running(*started.values()):
        asyncio.run(harness.ready(config, started["c0"]))
        yield config, started


@pytest.fixture(scope="module")
def config(nodes: tuple[ClusterConfig, dict[str, harness.Node]]) -> ClusterConfig:
    return nodes[0]


@contextmanager
def answering(config: ClusterConfig) -> Iterator[None]:
    """The cluster answers requests meanwhile."""
    ended = threading.Event()

    async def ask() -> None:
        async with harness.client(config) as client:
            while not ended.is_set():
                await client.generate(PROMPT, max_tokens=20)

    thread = threading.Thread(target=lambda: asyncio.run(ask()))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def scrape(config: ClusterConfig, name: str) -> dict[str, float]:
    """What a node tells Prometheus: the sums of the samples of each name."""
    address = config.find(name).metrics
    assert address
    with urllib.request.urlopen(f"http://{address.host}:{address.port}/metrics", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_metrics_count_what_a_client_gets(config: ClusterConfig) -> None:
    """Tokens, requests and durations of the front; bytes of both ends; and the process itself."""
    before = scrape(config, "c0")

    async def ask() -> int:
        async with harness.client(config) as client:
            return len((await client.generate(PROMPT, max_tokens=10)).tokens)

    tokens = asyncio.run(ask())
    front, memory = scrape(config, "c0"), scrape(config, "m0")

    assert front["lamina_generation_tokens_total"] - before["lamina_generation_tokens_total"] == tokens == 10
    assert front["lamina_inter_token_latency_seconds_count"] - before["lamina_inter_token_latency_seconds_count"] == 9
    assert front["lamina_e2e_request_latency_seconds_count"] - before["lamina_e2e_request_latency_seconds_count"] == 1
    assert front["lamina_link_bytes_total"] == memory["lamina_link_bytes_total"] > 0
    assert front["process_resident_memory_bytes"] > memory["process_resident_memory_bytes"] > 1e7


def test_top_in_a_pipe_is_one_snapshot(config: ClusterConfig) -> None:
    """Of one second of work, in 80 columns without styles."""
    with answering(config):
        done = subprocess.run(
            [*LAMINA, "top", str(config.file)], capture_output=True, text=True, timeout=60, check=False
        )

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Lamina  cluster.toml  2 of 2 nodes ready")
    assert re.match(r"1 running +0 waiting +0 preempted +[1-9][\d.,]* tokens/s", lines[1])
    assert [line.split()[:3] for line in lines[1:] if "ready " in line] == [
        ["c0", "compute", "ready"],
        ["m0", "memory", "ready"],
    ]
    assert any(re.match(r"c0 – m0 +\w+ +[\d.]+ MB/s +[\d.]+ MB/s +\d+%", line) for line in lines)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("options", [("top",), ("status", "--watch")], ids=["top", "status"])
@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_what_is_kept_up_to_date_on_a_terminal_ends_quietly(
    config: ClusterConfig, key: str, options: tuple[str, ...]
) -> None:
    """It is drawn on the other screen, which is left again, and the terminal is as it was."""
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [*LAMINA, options[0], str(config.file), *options[1:]]
    with subprocess.Popen(
        command, stdin=far, stdout=far, stderr=far, env=environment, start_new_session=True, preexec_fn=_take_terminal
    ) as top:
        shown = b""
        while b"m0" not in shown or b"q quits" not in shown:
            shown += os.read(near, 1 << 16)
        os.write(near, key.encode())
        drain = threading.Thread(target=_read_all, args=(near,), daemon=True)
        drain.start()
        assert top.wait(20) == 0
    os.close(far)
    drain.join(5)
    os.close(near)
    text = STYLES.sub("", shown.decode(errors="replace"))
    assert "2 of 2 nodes ready" in text
    assert f"\x1b[?{ALTERNATE}h" in shown.decode(errors="replace")


def test_top_where_nothing_can_be_drawn(config: ClusterConfig) -> None:
    """A terminal without any abilities gets the snapshot, in the characters that it has."""
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*LAMINA, "top", str(config.file)], stdin=far, stdout=far, stderr=far, env=environment, timeout=60, check=False
    )
    shown = os.read(near, 1 << 16)
    os.close(far)
    os.close(near)

    assert done.returncode == 0
    assert shown.startswith(b"Lamina  cluster.toml  2 of 2 nodes ready")
    assert b"c0 \\u2013 m0" in shown


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_all(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1 << 16):
            pass
    except OSError:
        pass


def test_top_of_a_cluster_that_does_not_run(tmp_path: Path) -> None:
    """Each node is shown as not running, and nothing is known of requests."""
    away = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1))
    done = subprocess.run([*LAMINA, "top", str(away.file)], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 2 nodes ready" in done.stdout
    assert done.stdout.count("not running") == 2
    assert "the front does not answer" in done.stdout


def test_the_page_is_self_contained() -> None:
    """Every file that the page names is served with a policy that allows nothing else."""
    client = TestClient(Starlette(routes=page.routes()))
    html = client.get("/").text
    named = re.findall(r'(?:src|href)="([^"]+)"', html)

    assert {"page/app.js", "page/style.css", "page/icon.svg"} <= set(named)
    for path in ["", *named, "page/cluster.js"]:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(
            r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", answer.text
        )
    assert not re.search(r"<script[^>]*>[^<]|\son\w+=|\sstyle=", html)  # the policy forbids them


def test_the_view_of_the_cluster(config: ClusterConfig) -> None:
    """All nodes with their loads, then one step: every device with its operations within the step's time."""
    view = ClusterView(config)
    with TestClient(Starlette(routes=view.routes())) as client, answering(config):
        first: dict[str, Any] = client.get("/cluster").json()
        time.sleep(1)
        cluster = client.get("/cluster").json()
        step = client.post("/cluster/timeline", json={}).json()
        client.portal.call(view.close)  # type: ignore[union-attr]

    assert first["tokens_per_s"] is None
    assert (cluster["object"], cluster["ready"]) == ("cluster", True)
    assert cluster["requests"] == {"running": 1, "waiting": 0, "preemptions": 0}
    assert cluster["tokens_per_s"] > 0
    front, memory = cluster["nodes"]
    assert (front["name"], front["role"], front["state"]) == ("c0", "compute", "ready")
    assert 0 < front["busy"] <= 1
    assert 0 < memory["kv_tokens_used"] < memory["kv_tokens_total"]
    (link,) = front["links"]
    assert link["sent"] > link["received"] > 0
    names = {node["name"]: {span["name"] for span in node["spans"] if not span["other"]} for node in step["nodes"]}
    assert {"head", "tail", "sample"} <= names["c0"]
    assert {"past", "finish"} <= names["m0"]
    assert step["requests"] == 1
    for node in step["nodes"]:
        for span in node["spans"]:
            assert 0 <= span["start_us"] <= span["start_us"] + span["duration_us"] <= step["duration_us"] + 0.2


def test_a_log_is_json_from_the_first_line_to_the_last(nodes: tuple[ClusterConfig, dict[str, harness.Node]]) -> None:
    """Where the cluster file says so. The nodes stop, so this is the last test of the module."""
    config, started = nodes
    for node in started.values():
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
    for name, node in started.items():
        lines = [json.loads(line) for line in node.log.read_text().splitlines()]
        assert lines[-1]["event"] == "stopped"
        assert {line["node"] for line in lines} == {name}
        assert [line["address"] for line in lines if line["event"] == "metrics"] == [
            f"http://{str(config.find(name).metrics).removeprefix('tcp://')}/metrics"
        ]
