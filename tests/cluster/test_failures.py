"""Nodes that are killed or stopped in mid-generation: the client is told in time which one, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lamina.cluster.local import Cluster
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import LaminaError
from tests import harness
from tests.families import FAMILIES
from tests.oracle import Agreement, Oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


def write_config(folder: Path, checkpoint: Path, pipeline: PipelineConfig | None = None) -> ClusterConfig:
    """One compute and two memory nodes."""
    return harness.write_config(folder, checkpoint, harness.free_ports(2), pipeline=pipeline)


def strike(victim: harness.Node, number: signal.Signals) -> float:
    """Kill or stop a node; the time of the monotonic clock at which it has happened."""
    assert victim.process.pid
    victim.signal(number)
    while process_state(victim.process.pid) not in "TZX":
        time.sleep(0.001)
    return time.monotonic()


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param("c0", signal.SIGKILL, id="c0-killed"),
        pytest.param("m1", signal.SIGSTOP, id="m1-stopped"),
        pytest.param("c0", signal.SIGSTOP, id="c0-stopped", marks=pytest.mark.slow),
        pytest.param("m1", signal.SIGKILL, id="m1-killed", marks=pytest.mark.slow),
    ],
)
def test_an_answer_survives_a_lost_node(
    victim: str, number: signal.Signals, checkpoint: Path, tmp_path: Path, agreement: Agreement
) -> None:
    """The front is started again, the memory node is not: its heads go to the other one, after the grace."""
    recovery = RecoveryConfig(grace=0.5)
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2), recovery=recovery)
    nodes = {n.name: harness.start_node(config, n.name) for n in config.node}
    tokens: list[int] = []

    async def main() -> float:
        await harness.ready(config, nodes["c0"])
        struck = gap = 0.0
        async with harness.client(config) as client:
            async for piece in client.stream([1, 2, 3], max_tokens=200):
                gap = max(gap, time.monotonic() - struck if struck and len(tokens) < 25 else 0.0)
                tokens.append(piece.id)
                if len(tokens) == 20:
                    struck = strike(nodes[victim], number)
                    if victim == "c0":
                        nodes[victim].kill()
                        nodes[victim] = harness.start_node(config, victim)
        return gap

    try:
        gap = asyncio.run(main())
    finally:
        for node in nodes.values():
            node.kill()
    assert len(tokens) == 200
    agreement.check(Oracle(checkpoint), [1, 2, 3], tokens, f"{victim} {number.name}")
    if victim == "m1":  # silence is looked at four times in peer_timeout
        noticed_s = 1.3 * harness.default.peer_timeout if number == signal.SIGSTOP else 0.0
        assert gap < noticed_s + recovery.grace + 5
        assert "memory node m1 was lost" in nodes["c0"].log.read_text()


@pytest.mark.parametrize("victim", ["m0", pytest.param("c0", marks=pytest.mark.slow)])
def test_up_ends_when_a_node_dies(victim: str, checkpoint: Path, tmp_path: Path) -> None:
    """And may not start it again. It names the node, stops the others and leaves no process behind."""
    config = write_config(tmp_path, checkpoint)
    up = start_up(config, "--no-restart")
    try:
        pids = wait_until_ready(up, config)
        os.kill(pids[victim], signal.SIGKILL)
        output, errors = up.communicate(timeout=harness.default.peer_timeout + 15)
    finally:
        up.kill()

    assert up.returncode == 1
    assert re.search(rf"^lamina: node {victim} (was lost|was killed by signal 9)", errors, re.MULTILINE)
    assert "Traceback" not in errors
    assert not alive(pids)
    assert re.search(rf"{victim} \(\w+\) (lost|was killed)", output)


def test_up_stops_on_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    """States are shown on the way up, every node stops in order, and the exit status is 0."""
    config = write_config(tmp_path, checkpoint)
    up = start_up(config, "--verbose")
    try:
        pids = wait_until_ready(up, config)
        up.send_signal(signal.SIGINT)
        output, errors = up.communicate(timeout=20)
    finally:
        up.kill()

    assert up.returncode == 0, errors
    assert output.endswith("all nodes stopped\n")
    assert not alive(pids)
    assert errors.count("event=stopped") == 3


@pytest.mark.slow
def test_up_does_not_drain_after_a_second_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    """Answers that would take longer than the nodes' patience are given up, and no process is left."""
    config = write_config(tmp_path, checkpoint, PipelineConfig(max_batch=1))
    up = start_up(config, "--verbose")

    async def main() -> None:
        async with harness.client(config) as client:
            answers = [asyncio.ensure_future(client.generate([1, 2, 3], max_tokens=500)) for _ in range(300)]
            await asyncio.sleep(0)
            up.send_signal(signal.SIGINT)

            async def draining() -> bool:
                return (await client.status()).state == "draining"

            await harness.eventually(draining)
            up.send_signal(signal.SIGINT)
            ends = await asyncio.gather(*answers, return_exceptions=True)
            assert isinstance(ends[-1], LaminaError)

    try:
        pids = wait_until_ready(up, config)
        asyncio.run(main())
        _, errors = up.communicate(timeout=15)
    finally:
        up.kill()

    assert up.returncode == 0, errors
    assert "Traceback" not in errors
    assert "event=stopping_now" in errors
    assert not alive(pids)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_start_that_is_given_up_leaves_no_node(
    runner: Callable[[Coroutine[Any, Any, None]], None], checkpoint: Path, tmp_path: Path
) -> None:
    """Cancelled at any point: before, between and after the starts of the processes."""
    config = write_config(tmp_path, checkpoint)

    async def main() -> None:
        for steps in range(1, 40, 4):
            starting = asyncio.ensure_future(Cluster(config, log_file=log).__aenter__())
            for _ in range(steps):
                await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled():
                await starting.result().stop(drain=False)
            assert not processes(config)

    with (tmp_path / "nodes.log").open("wb") as log:
        runner(main())


@pytest.mark.slow
def test_nodes_do_not_outlive_up(checkpoint: Path, tmp_path: Path) -> None:
    """Not even when it is killed."""
    config = write_config(tmp_path, checkpoint)
    up = start_up(config)
    try:
        pids = wait_until_ready(up, config)
    finally:
        up.kill()
        up.communicate()

    deadline = time.monotonic() + 15
    while alive(pids):
        assert time.monotonic() < deadline, "nodes still run"
        time.sleep(0.05)


def test_sigterm_drains(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """What was asked is answered, what is asked later is refused, and the exit status is 0."""
    config = harness.write_config(tmp_path, checkpoint, memory_ports[:2])
    node = harness.start_node(config, "c0")

    async def main() -> None:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            stream = client.stream([1, 2, 3], max_tokens=150)
            tokens = [await anext(stream)]
            node.signal(signal.SIGTERM)

            async def draining() -> bool:
                return (await client.status()).state == "draining"

            await harness.eventually(draining)
            with pytest.raises(LaminaError, match="draining"):
                await client.generate([1])
            tokens += [token async for token in stream]
            assert len(tokens) == 150

    with harness.running(node):
        asyncio.run(main())
        assert node.wait() == 0


def start_up(config: ClusterConfig, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lamina", "up", str(config.file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_ready(up: subprocess.Popen[str], config: ClusterConfig) -> dict[str, int]:
    """Read its output until all nodes are ready; their process ids."""
    assert up.stdout
    for line in up.stdout:
        if line.startswith("ready; next: lamina generate"):
            break
    else:
        pytest.fail(f"the nodes were never ready: {up.communicate()[1]}")
    pids = processes(config)
    assert pids.keys() == {n.name for n in config.node}
    return pids


def processes(config: ClusterConfig) -> dict[str, int]:
    """Process ids of all nodes of the file that run."""
    pids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config.file).encode() in command and b"--name" in command:
            pids[command[command.index(b"--name") + 1].decode()] = int(process.name)
    return pids


def alive(pids: dict[str, int]) -> list[str]:
    """Names of the processes that exist and are not zombies."""
    return [name for name, pid in pids.items() if process_state(pid) not in "ZX"]


def process_state(pid: int) -> str:
    """The letter that Linux gives for it; X where it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except OSError:
        return "X"
