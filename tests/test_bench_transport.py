"""The transport benchmark: what it compares moves the same bytes, and what is not there is said."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lamina.bench import transport
from lamina.bench.ends import Task
from lamina.bench.transport import KEYS
from lamina.bench.variants import VARIANTS, Setting, find, two_processors
from lamina.bench.yardsticks import Program, build
from lamina.errors import ConfigError, TransportError

TASKS = [
    Task("round_trip", 64, 1, 1, 0.02),
    Task("round_trip", 100_000, 1, 1, 0.02),
    Task("bandwidth", 8192, 16, 16, 0.02),
    Task("bandwidth", 1 << 20, 4, 16, 0.02),
]


@pytest.fixture(scope="module")
def pingpong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("yardsticks"))


@pytest.mark.parametrize("medium", ["tcp", "eventfd", "memcpy"])
def test_yardsticks_answer(medium: str, pingpong: Path) -> None:
    """Each yardstick in C answers one question after the other; what it answers fits together."""
    with closing(Program([str(pingpong), medium, "-1", "-1"])) as program:
        for task in TASKS:
            found = program.measure(task)
            assert 0 < found["p50_us"] <= found["p99_us"]
            # A median is at most twice the mean, and so many bytes were under way in it.
            assert 0 < found["gbps"] < 2.1 * task.depth * task.size / found["p50_us"] / 1e3


def test_a_yardstick_that_ends_is_an_error(pingpong: Path) -> None:
    """What it said last is in the message."""
    told = pytest.raises(TransportError, match=r"ended: usage: pingpong tcp\|eventfd")
    with closing(Program([str(pingpong), "pigeon", "-1", "-1"])) as program, told:
        program.measure(TASKS[0])


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "rdma" not in variant])
def test_links_answer(variant: str, tmp_path: Path) -> None:
    """Both ends of a link answer the same questions, and say what they took of the processors."""
    if variant.endswith("busy_poll") and two_processors()[0] < 0:
        pytest.skip("this process may use only one processor")
    setting = find(variant, tmp_path, (-1, -1) if "busy" not in variant else two_processors())
    with closing(Program.module("ends", as_json(setting))) as program:
        for task in TASKS:
            found = program.measure(task)
            assert 0 < found["p50_us"] <= found["p99_us"]
            assert found["gbps"] > 0
            assert found["cpu_write_us"] > 0
            assert found["cpu_arrival_us"] > 0


def test_a_transport_that_is_not_there_says_why() -> None:
    """A link that cannot be made is an answer, and the next question is asked as well."""
    with closing(Program.module("ends", as_json(Setting("rdma", devices=("none0", "none0"))))) as program:
        for task in TASKS[:2]:
            with pytest.raises(TransportError, match="rdma"):
                program.measure(task)


def test_polling_needs_two_processors(tmp_path: Path) -> None:
    """Busy polling is refused on one processor, where the ends would wait for each other's time slices."""
    with pytest.raises(TransportError, match="this process may use only one"):
        find("shm+busy_poll", tmp_path, (-1, -1))


def test_impossible_options_are_refused() -> None:
    """An unknown transport is refused before anything is measured."""
    with pytest.raises(ConfigError, match=r"--transport: expected one of tcp, .*, got pigeon"):
        transport.run(["pigeon"], None, as_json=True, plot=None, quick=True)
    with pytest.raises(ConfigError, match="--rdma-device: expected at most two"):
        transport.run(None, ["a", "b", "c"], as_json=True, plot=None, quick=True)


@pytest.mark.slow
def test_a_quick_run_reports_every_transport() -> None:
    """`lamina bench transport --quick --json` has a row for each transport, with figures or with the reason."""
    command = [sys.executable, "-m", "lamina", "bench", "transport", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert {row["transport"] for row in rows} == set(VARIANTS)
    for row in rows:
        assert set(row) == set(KEYS)
        if row["unavailable"]:
            continue
        assert row["yardstick"]
        trips = row["phase"] == "round_trip"
        own, beside = ("p50_us", "yardstick_p50_us") if trips else ("gbps", "yardstick_gbps")
        assert row["ratio"] == pytest.approx(row[own] / row[beside])
        assert (row["gbps"] is None) == trips
    tcp = [row for row in rows if row["transport"] == "tcp"]
    assert {row["yardstick"] for row in tcp} == {"socket"}
    assert {row["depth"] for row in tcp} == {1, 16}
    assert shutil.which("openssl") is None or any(row["transport"] == "tcp+tls" and row["p50_us"] for row in rows)


def as_json(setting: Setting) -> str:
    return json.dumps({name: getattr(setting, name) for name in setting.__struct_fields__})
