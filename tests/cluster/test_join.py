"""Real nodes join a running cluster, and the front reads its file again at SIGHUP."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.config import ClusterConfig, MemoryNodeConfig, PipelineConfig, load, write_cluster, write_secret
from lamina.demo.run import CHECKPOINT
from tests import harness

LAMINA = [sys.executable, "-P", "-m", "lamina"]
WAIT_S = 40.0


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """One compute and one memory node, of which requests can lie on either."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    pipeline = PipelineConfig(partition="requests", batches=2)
    return harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1), pipeline=pipeline)


@pytest.fixture
def nodes(config: ClusterConfig) -> Iterator[dict[str, harness.Node]]:
    """Its nodes, which are ready; those that a test adds end with them."""
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    try:
        with harness.running(*started.values()):
            asyncio.run(harness.ready(config, started["c0"]))
            yield started
    finally:
        for node in started.values():
            if node.process.is_alive():
                node.kill()


def lamina(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAMINA, *arguments], capture_output=True, text=True, timeout=60, check=False)


def join(config: ClusterConfig, name: str, role: str, *more: str, front: str | None = None) -> harness.Node:
    """Start a node that joins the cluster of a file."""
    (port,) = harness.free_ports(1)
    wiring = harness.default
    own = ["--role", role, "--name", name, "--join", front or str(config.front.address).removeprefix("tcp://")]
    own += ["--listen", f"{wiring.memory}:{port}", "--threads", "1", "--transport", wiring.kind]
    own += ["--peer-timeout", str(wiring.peer_timeout)]
    own += [word for key, value in wiring.keys().items() for word in (f"--{key.replace('_', '-')}", value)]
    return harness.start(config.file.parent / f"{name}.log", "node", *own, *more)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)


def states(config: ClusterConfig) -> dict[str, str]:
    """The state of each member, as the front says."""
    status = asyncio.run(harness.status_of(config, config.front))
    return {member.name: member.state for member in status.members}


def test_nodes_join_and_leave(config: ClusterConfig, nodes: dict[str, harness.Node]) -> None:
    """A memory node and a replica, by the command alone; the status has them, and texts stay the same."""
    ask = ("generate", str(config.file), "Once upon a time", "--max-tokens", "24")
    expected = lamina(*ask).stdout
    nodes["m9"] = join(config, "m9", "memory", "--memory", "16MiB")
    until(lambda: states(config).get("m9") == "serving", "m9 serves")
    nodes["r1"] = join(config, "r1", "compute")
    until(lambda: states(config).get("r1") == "serving", "r1 serves")

    shown = json.loads(lamina("status", str(config.file), "--json").stdout)
    assert (shown["ready"], [node["name"] for node in shown["nodes"]]) == (True, ["c0", "m0", "m9", "r1"])
    assert lamina(*ask).stdout == expected

    drained = lamina("drain", str(config.file), "m0")
    assert drained.returncode == 0, drained.stderr
    assert lamina(*ask).stdout == expected
    nodes["r1"].kill()
    until(lambda: states(config).get("r1") == "lost", "r1 is lost")
    assert lamina(*ask).stdout == expected

    nodes["m0"].kill()
    nodes["m0"] = harness.start_node(config, "m0")
    until(lambda: states(config).get("m0") == "serving", "m0 is back")
    drained = lamina("drain", str(config.file), "m9")
    assert drained.returncode == 0, drained.stderr
    assert "m9" not in states(config)
    until(lambda: "event=left" in nodes["m9"].log.read_text(), "m9 is told that it has left")
    assert nodes["m9"].stop() == 0
    assert lamina(*ask).stdout == expected


def test_the_file_is_read_again(config: ClusterConfig, nodes: dict[str, harness.Node]) -> None:
    """At SIGHUP; a fault in it is logged, and changes nothing."""
    text = config.file.read_text()
    config.file.write_text(text + "\n[[node]]\n")
    nodes["c0"].signal(signal.SIGHUP)
    until(lambda: "event=not_reloaded" in nodes["c0"].log.read_text(), "the fault is logged")
    assert re.search(r"level=error .*event=not_reloaded reason=.*node\[2\]", nodes["c0"].log.read_text())

    config.file.write_text(text)
    (port,) = harness.free_ports(1)
    address = harness.default.memory_address(port)
    new = MemoryNodeConfig(name="m1", address=address, memory=16 << 20, threads=1)
    changed = write_cluster(
        config.file, config.model, [*config.node, new], pipeline=config.pipeline, transport=config.transport
    )
    nodes["m1"] = harness.start_node(changed, "m1")
    nodes["c0"].signal(signal.SIGHUP)
    until(lambda: states(config).get("m1") == "serving", "m1 serves")

    config.file.write_text(text)
    nodes["c0"].signal(signal.SIGHUP)
    until(lambda: "m1" not in states(config), "m1 has left")
    assert load(config.file).memory_nodes == config.memory_nodes
    assert lamina("generate", str(config.file), "Once", "--max-tokens", "8").returncode == 0


def test_a_front_whose_terminal_is_gone_ends(config: ClusterConfig) -> None:
    """As SIGHUP ends other programs then."""
    near, far = pty.openpty()
    command = [*LAMINA, "node", str(config.file), "--name", "c0"]
    front = subprocess.Popen(command, stdin=far, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert front.stderr is not None
        while "event=listening" not in (line := front.stderr.readline()):
            assert line
        os.close(far)
        os.close(near)
        front.send_signal(signal.SIGHUP)

        assert front.wait(20) == 0
        assert "event=stopping" in front.stderr.read()
    finally:
        front.kill()
        front.communicate()


WRONG = {
    "a memory node": ("{m0}", 1, r"--join: at tcp://\S+ answers a memory node, m0; expected the front of a cluster"),
    "nobody": ("{free}", 1, r"--join: no front could be reached at tcp://\S+ within 1 s"),
    "another secret": ("{c0}", 1, r"--join: tcp://\S+ is no front that this node can join: .*secret"),
    "too little": ("{c0}", 2, r"--join: c0 at tcp://\S+ does not take in m9: m9 has 64KiB, which holds \d+ tokens"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_joined(
    kind: str, config: ClusterConfig, nodes: dict[str, harness.Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node ends, and says what is wrong where."""
    front, status, reason = WRONG[kind]
    (free,) = harness.free_ports(1)
    known = {node.name: str(node.address).removeprefix("tcp://") for node in config.node}
    front = front.format(free=f"127.0.0.1:{free}", **known)
    more = ["--memory", "64KiB" if kind == "too little" else "16MiB"]
    if kind == "another secret":
        write_secret(tmp_path / "other.key")
        more += ["--secret-file", str(tmp_path / "other.key")]
    if kind == "nobody":
        code = "import lamina.node.joining, lamina.cli; lamina.node.joining.REACH_S = 1.0; lamina.cli.main()"
        (port,) = harness.free_ports(1)
        command = [sys.executable, "-P", "-c", code, "node", "--role", "memory", "--join", front]
        done = subprocess.run(
            [*command, "--listen", f"127.0.0.1:{port}", *more], capture_output=True, text=True, timeout=60, check=False
        )
        code_, log = done.returncode, done.stderr
    else:
        node = join(config, "m9", "memory", *more, front=front)
        code_, log = node.wait(30), node.log.read_text()

    assert code_ == status, log
    assert re.search(reason, log), log
    assert "Traceback" not in log
