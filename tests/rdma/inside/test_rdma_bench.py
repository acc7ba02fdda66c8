"""The transport benchmark and the soak where there is RDMA."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import pytest

from lamina.bench.ends import Task
from lamina.bench.variants import emulated, ports
from lamina.bench.yardsticks import Program, Tool

TRIPS, FLOOD = Task("round_trip", 8192, 1, 1, 0.05), Task("bandwidth", 65536, 4, 4, 0.05)
NOT_PINNED = (-1, -1)


def test_ends_on_two_devices() -> None:
    """By default each end has a device of its own, and it is said that software pretends to be them."""
    near, far = ports()
    assert (near.device, far.device) == ("rxe0", "rxe1")
    assert emulated(near)
    assert emulated(far)
    assert ports(["rxe1"]) == (far, far)


def test_yardstick_of_pyverbs() -> None:
    """It answers one question after the other."""
    with closing(Program.module("yardsticks.verbs", "rxe0", "rxe1", "-1", "-1")) as program:
        for task in (TRIPS, FLOOD, TRIPS):
            found = program.measure(task)
            assert 0 < found["p50_us"] <= found["p99_us"]
            assert 0 < found["gbps"] < 2.1 * task.depth * task.size / found["p50_us"] / 1e3


@pytest.mark.parametrize(
    ("tool", "task", "key"), [("ibv_rc_pingpong", TRIPS, "p50_us"), ("ib_write_bw", FLOOD, "gbps")]
)
def test_tools_of_others(tool: str, task: Task, key: str) -> None:
    """What they print is understood."""
    assert Tool(tool, (("rxe0", 1), ("rxe1", 1)), NOT_PINNED).measure(task)[key] > 0


def test_a_short_soak() -> None:
    """Links that end in every way: all bytes arrive, nothing grows."""
    command = [sys.executable, "-m", "lamina.bench.soak", "--transport", "rdma"]
    command += ["--minutes", "0.2", "--link-seconds", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["writes"] > 100
