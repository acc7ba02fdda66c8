"""Nodes that are killed or stopped in mid-generation: the client is told in time which one, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig
from lamina.errors import LaminaError, NodeError
from tests import harness
from tests.families import FAMILIES

PEER_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


async def interrupt(config: ClusterConfig, strike: object) -> tuple[LaminaError, float]:
    """Call ``strike`` in the middle of an answer; the error that the client gets, and after how many seconds."""
    async with lamina.connect(config.front.address) as client:
        started = 0.0
        try:
            async for _ in client.stream([1, 2, 3], max_tokens=500):
                if not started:
                    started = time.monotonic()
                    strike()  # type: ignore[operator]
        except LaminaError as e:
            return e, time.monotonic() - started
        pytest.fail("the answer was completed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["c0", "m1"])
def test_the_client_learns_which_node_is_lost(
    victim: str, number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    """Within peer_timeout and a second, by name; the others end or wait for a new compute node."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2))
    nodes = {n.name: harness.start_node(config, n.name) for n in config.node}

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        error, seconds = await interrupt(config, lambda: nodes[victim].signal(number))
        assert isinstance(error, NodeError)
        assert error.node == victim
        assert victim in str(error)
        assert seconds < PEER_TIMEOUT_S + 1

    with harness.running(*nodes.values()):
        asyncio.run(main())
        if victim == "c0":
            # The memory nodes notice too, and take the next compute node.
            nodes["c0"].kill()
            again = harness.start_node(config, "c0")
            with harness.running(again):
                asyncio.run(harness.ready(config, again))
                assert again.stop() == 0
        else:
            assert nodes["c0"].wait() == 1
            assert f"memory node {victim} was lost" in nodes["c0"].log.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_up_ends_when_a_node_dies(number: signal.Signals, checkpoint: Path, tmp_path: Path) -> None:
    """It names the node, stops the others and leaves no process behind."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2))
    up = start_up(config)
    try:
        pids = wait_until_ready(up, config)
        os.kill(pids["m0"], number)
        output, errors = up.communicate(timeout=PEER_TIMEOUT_S + 15)
    finally:
        up.kill()

    assert up.returncode == 1
    assert re.search(r"^lamina: node m0 (was lost|was killed by signal 9)", errors, re.MULTILINE)
    assert "Traceback" not in errors
    assert not alive(pids)
    assert "m0 (memory) lost" in output or "m0 (memory) was killed" in output


def test_up_stops_on_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    """States are shown on the way up, every node stops in order, and the exit status is 0."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2))
    up = start_up(config)
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


def test_nodes_do_not_outlive_up(checkpoint: Path, tmp_path: Path) -> None:
    """Not even when it is killed."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2))
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
        async with lamina.connect(config.front.address) as client:
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


def start_up(config: ClusterConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lamina", "up", str(config.file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_ready(up: subprocess.Popen[str], config: ClusterConfig) -> dict[str, int]:
    """Read its output until all nodes are ready; their process ids."""
    assert up.stdout
    ready = " · ".join(f"{n.name} ({n.role}) ready" for n in config.node)
    for line in up.stdout:
        if line.strip() == ready:
            break
    else:
        pytest.fail(f"the nodes were never ready: {up.communicate()[1]}")
    pids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config.file).encode() in command and b"--name" in command:
            pids[command[command.index(b"--name") + 1].decode()] = int(process.name)
    assert pids.keys() == {n.name for n in config.node}
    return pids


def alive(pids: dict[str, int]) -> list[str]:
    """Names of the processes that exist and are not zombies."""
    found = []
    for name, pid in pids.items():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(name)
    return found
