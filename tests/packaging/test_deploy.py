"""The files for deployment: units that systemd accepts and that run nodes, and the steps of the container file."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.cluster.local import local_config
from lamina.demo.run import CHECKPOINT
from lamina.errors import ConfigError
from lamina.node.daemon import DRAIN_TIMEOUT_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
ANALYZE = shutil.which("systemd-analyze")
PREFIX = "/opt/lamina"


def service(unit: Path) -> configparser.SectionProxy:
    """The settings of a unit's service."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser["Service"]


def command(unit: Path, name: str, installed: Path, config: Path) -> list[str]:
    """The unit's command for a node, with other places for the environment and the cluster file."""
    line = service(unit)["ExecStart"].replace("%i", name)
    assert f"{PREFIX}/bin/lamina" in line
    return shlex.split(line.replace(PREFIX, str(installed)).replace("/etc/lamina/cluster.toml", str(config)))


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    """Without a warning, for a program that exists."""
    program = shlex.split(service(unit)["ExecStart"])[0]
    instance = tmp_path / unit.name.replace("@", "@m0")
    instance.write_text(unit.read_text().replace(program, sys.executable))
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(instance)], capture_output=True, text=True, timeout=60, check=False
    )

    assert len(UNITS) == 2
    assert (done.returncode, [line for line in done.stderr.splitlines() if "lamina" in line]) == (0, [])


def test_units_give_nodes_the_time_to_drain_and_restart_no_wrong_file() -> None:
    """systemd would kill a node that is finishing its requests, or start one for ever whose file is wrong."""
    for unit in UNITS:
        settings = service(unit)
        assert float(settings["TimeoutStopSec"]) > DRAIN_TIMEOUT_S
        assert settings["Restart"] == "on-failure"
        assert int(settings["RestartPreventExitStatus"]) == ConfigError.exit_status


def run_nodes(installed: Path, folder: Path) -> None:
    """Run both units' commands as a cluster, have a request answered, and stop them as systemd does."""
    config = local_config(folder, CHECKPOINT, memory_nodes=1, dtype="float32", memory=2**26, compiled=False)
    units = {"m0": "lamina-memory@.service", "c0": "lamina-compute@.service"}
    nodes = []
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        try:
            for name, unit in units.items():
                line = command(DEPLOY / unit, name, installed, config.file)
                nodes.append(subprocess.Popen(line, stderr=log, cwd=folder, env=environment))
            lamina, file = str(installed / "bin" / "lamina"), str(config.file)
            for _ in range(60):
                ask = [lamina, "generate", file, "Once upon a time", "--max-tokens", "5"]
                done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
                if done.returncode == 0:
                    break
            assert done.returncode == 0, done.stderr + (folder / "log").read_text()
            for node in reversed(nodes):
                node.send_signal(signal.SIGTERM)
                assert node.wait(40) == 0
        finally:
            for node in nodes:
                node.kill()
                node.wait()


def test_the_units_run_a_cluster(tmp_path: Path) -> None:
    """Their commands start a memory and a compute node that answer, and that end in order when they are told to."""
    run_nodes(Path(sys.executable).parents[1], tmp_path)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is gone after the test: an environment takes a gigabyte."""
    with tempfile.TemporaryDirectory(prefix="lamina-deploy-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_container_files_steps_install_what_the_units_run(folder: Path) -> None:
    """The script that the container file runs makes an environment in which a cluster runs."""
    steps = re.findall(r"/src/deploy/\S+(?: [^&\s]+)*", (DEPLOY / "Containerfile").read_text())
    assert steps == [f"/src/deploy/install.sh {PREFIX}"]
    installed = folder / "lamina"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))}
    done = subprocess.run(
        [str(DEPLOY / "install.sh"), str(installed), sys.executable],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("deploy/install.sh: installed lamina ")
    (work := folder / "work").mkdir()
    run_nodes(installed, work)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheels_are_tagged_for_old_systems_and_name_what_was_skipped(folder: Path) -> None:
    """The wheel of a release has a manylinux tag, loads its kernel on every Python here, and each other is named."""
    script = ROOT / ".ci" / "wheels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "wheels")], capture_output=True, text=True, timeout=500, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (folder / "wheels").iterdir()
    assert "-py3-none-manylinux_2_" in wheel.name
    lines = done.stdout.splitlines()
    assert lines[0] == f"built {wheel.name}"
    assert [line.split(":")[0] for line in lines[1:]] == [f"Python 3.{minor}" for minor in (11, 12, 13, 14)]
    assert all(": ok, lamina " in line or line.endswith("skipped, as this machine has none") for line in lines[1:])
