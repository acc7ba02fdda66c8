"""Nodes that die are started again by the commands that have started them, and the cluster works again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.config import ClusterConfig
from lamina.demo.run import CHECKPOINT
from tests import harness
from tests.cluster.test_failures import alive, processes

LAMINA = [sys.executable, "-P", "-m", "lamina"]
PROMPT = "Once upon a time"
WAIT_S = 60.0


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """One compute and one memory node; logs go into a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1))


class Command:
    """A running command, and what it has printed so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*LAMINA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.output = self.errors = ""
        self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("output", "errors")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in (self.process.stdout if name == "output" else self.process.stderr) or ():
            setattr(self, name, getattr(self, name) + line)

    def until(self, text: str, count: int = 1) -> None:
        """Wait until ``text`` was printed so often on standard output."""
        deadline = time.monotonic() + WAIT_S
        while self.output.count(text) < count:
            assert self.process.poll() is None, f"ended before {text!r}: {self.output}{self.errors}"
            assert time.monotonic() < deadline, f"no {text!r} in: {self.output}{self.errors}"
            time.sleep(0.02)

    def end(self, number: signal.Signals | None = None, timeout_s: float = 20.0) -> int:
        """Wait until it ends, after a signal if one is given; its exit status."""
        if number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()
            for reader in self._readers:
                reader.join()
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe
                pipe.close()


@pytest.fixture
def up(config: ClusterConfig) -> Iterator[Command]:
    """``lamina up`` of the file, when it is ready; no node may be left after it."""
    command = Command("up", str(config.file))
    try:
        command.until("ready; next: ")
        yield command
    finally:
        command.end(signal.SIGTERM)
    assert not alive(processes(config))


async def answer(config: ClusterConfig) -> list[int]:
    """What the cluster answers to a prompt, as soon as it takes one."""
    async with harness.client(config, deadline_s=WAIT_S) as client:

        async def is_ready() -> bool:
            return (await client.status()).state == "ready"

        await harness.eventually(is_ready, WAIT_S)
        return (await client.generate(PROMPT, max_tokens=8)).tokens


def test_nodes_that_die_come_back(up: Command, config: ClusterConfig, tmp_path: Path) -> None:
    """One after another; then the cluster answers as before. What a node logged before its death is kept."""
    tokens = asyncio.run(answer(config))
    for victim in ("m0", "c0"):
        pid = processes(config)[victim]
        os.kill(pid, signal.SIGKILL)
        up.until(f" node {victim} is ready again")
        assert asyncio.run(answer(config)) == tokens
        assert processes(config)[victim] != pid

    assert re.search(
        r"^memory node m0 was killed by signal 9 \(Killed\), .*; starting it again \(1 of 5\)$", up.output, re.MULTILINE
    )
    assert up.end(signal.SIGINT) == 0
    assert up.errors == ""
    assert up.output.endswith("all nodes stopped\n")
    (folder,) = (file.parent for file in tmp_path.glob("state/lamina/*/up.log"))
    assert (folder / "m0.log").read_text().count("event=memory ") == 2
    log = (folder / "up.log").read_text()
    assert "event=restarting member=m0 restart=1 limit=5 delay_s=0.5 reason='node m0 was killed by signal 9" in log
    assert "event=ready_again member=m0" in log


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_that_hangs_is_started_again(up: Command, config: ClusterConfig) -> None:
    """It is killed first."""
    pid = processes(config)["m0"]
    os.kill(pid, signal.SIGSTOP)
    up.until("memory node m0 is ready again")

    assert re.search(r"^memory node m0 was lost: .*; starting it again \(1 of 5\)$", up.output, re.MULTILINE)
    assert not alive({"m0": pid})


@pytest.mark.slow
def test_a_node_that_dies_too_often_ends_the_cluster(up: Command, config: ClusterConfig) -> None:
    """With its last error; the pauses before its starts grow."""
    for count in range(1, 7):
        wait(lambda: "m0" in processes(config))
        os.kill(processes(config)["m0"], signal.SIGSEGV if count == 6 else signal.SIGKILL)
        if count < 6:
            up.until(f"starting it again ({count} of 5)")

    assert up.end() == 1
    assert up.errors == "lamina: node m0 was killed by signal 11 (Segmentation fault)\n"
    assert "it was started again 5 times within 10 minutes, so the cluster ends" in up.output
    pauses = re.findall(r"m0 \(memory\) starts again in ([\d.]+) s", up.output)
    assert pauses == ["0.5", "1", "2", "4", "8"]


def test_ctrl_c_before_a_node_is_started_again(up: Command, config: ClusterConfig) -> None:
    """All ends at once, though an answer is under way that would take longer."""
    client = subprocess.Popen(
        [*LAMINA, "generate", str(config.file), PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with client:
        assert client.stdout
        client.stdout.read(10)
        os.kill(processes(config)["m0"], signal.SIGKILL)
        up.until("m0 (memory) starts again")
        began = time.monotonic()
        assert up.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 12  # two roles, each of which is killed after 5 s
        client.kill()  # it waits for a front that comes back
    assert "m0 (memory) starting" not in up.output.split("starts again")[1]


def test_a_node_that_was_told_to_stop_stays_away(up: Command, config: ClusterConfig) -> None:
    """The cluster ends, as it cannot do without."""
    os.kill(processes(config)["c0"], signal.SIGTERM)

    assert up.end() == 1
    assert up.errors == "lamina: node c0 ended with status 0, as it was told to stop\n"
    assert "starting it again" not in up.output


@pytest.mark.slow
def test_a_wrong_file_is_told_at_once(up: Command, config: ClusterConfig) -> None:
    """If it was changed while the cluster ran, and a node that starts again cannot use it."""
    text = config.file.read_text()
    config.file.write_text(text.replace("[model]", "[model]\nnonsense = 1"))
    os.kill(processes(config)["m0"], signal.SIGKILL)

    assert up.end(timeout_s=40) == 1
    assert "m0 (memory) starts again in 1 s" not in up.output
    assert re.match(rf"lamina: node \w+: {config.file}: .*nonsense", up.errors), up.errors
