"""``lamina serve`` and ``lamina batch`` with a checkpoint start their nodes again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lamina.demo.run import CHECKPOINT
from tests import harness
from tests.cluster.test_failures import alive
from tests.serve.conftest import Server

LAMINA = [sys.executable, "-P", "-m", "lamina"]
SIZES = ("--context", "512", "--memory", "64MiB")
WAIT_S = 300.0


def node_of(process: subprocess.Popen[bytes], name: str) -> int:
    """The process id of a node that a command has started."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--name" in words and words[words.index(b"--name") + 1].decode() == name:
            return int(pid)
    raise AssertionError(f"no node {name}")


def until(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_goes_on_when_its_memory_node_is_back(tmp_path: Path) -> None:
    """Without a restart of the endpoint, with the same answers."""
    (port,) = harness.free_ports(1)
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        command = [*LAMINA, "serve", str(CHECKPOINT), "--port", str(port), *SIZES]
        process: Any = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(process, port, tmp_path / "out")
    try:
        until(process, server.log, "ready; next: curl")
        server.ready()
        text = server.complete(prompt="Once", max_tokens=8).json["choices"][0]["text"]
        os.kill(node_of(process, "m0"), signal.SIGKILL)
        until(process, server.log, "memory node m0 is ready again")
        server.ready()
        assert server.complete(prompt="Once", max_tokens=8).json["choices"][0]["text"] == text
        pids = {name: node_of(process, name) for name in ("c0", "m0")}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not alive(pids)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert "; starting it again (1 of 5)" in server.log.read_text()


def answered(partial: Path) -> int:
    """How many answers a batch has kept so far."""
    return partial.read_bytes().count(b'"choices"') if partial.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_batch_goes_on_when_its_nodes_are_back(tmp_path: Path) -> None:
    """Each line has one answer."""
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": "checkpoint", "prompt": f"Once {i}", "max_tokens": 60, "temperature": 0}}
        for i in range(1000)
    ]  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    with log.open("wb") as out:
        command = [*LAMINA, "batch", str(CHECKPOINT), str(source), "-o", str(output), *SIZES]
        process: Any = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    partial = output.with_name("out.jsonl.partial")
    try:
        for victim in ("m0", "c0"):
            before = answered(partial)
            deadline = time.monotonic() + WAIT_S
            while answered(partial) == before:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            os.kill(node_of(process, victim), signal.SIGKILL)
            until(process, log, f"node {victim} is ready again")
        assert process.wait(WAIT_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
