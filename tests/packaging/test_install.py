"""What a user gets: the sdist, the wheel that is built from it, and an environment that holds nothing but Lamina.

The environment sees neither this tree nor this Python's packages. `make package` runs these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
KERNEL = PurePosixPath("lamina/attention/native/liblamina_attention.so")
PACKED = [
    "lamina/py.typed",
    "lamina/transport/shm/lanes.py",
    "lamina/attention/native/kernel.cpp",
    "lamina/attention/native/kernel.h",
    "lamina/attention/native/simd.h",
    "lamina/attention/native/workers.cpp",
    "lamina/model/products.cpp",
    "lamina/bench/cli.py",
    "lamina/bench/yardsticks/pingpong.c",
    "lamina/demo/checkpoint/config.json",
    "lamina/demo/checkpoint/model.safetensors",
    "lamina/demo/checkpoint/tokenizer.json",
]
CHECKS = ["tests/attention/test_native.py", "tests/transport/test_conformance.py"]
"""Tests that the installed package must pass: of its compiled kernel, and of links over each transport of one host."""


class Distributions(NamedTuple):
    """The two files that a release would consist of."""

    sdist: Path
    wheel: Path


class Environment(NamedTuple):
    """A virtual environment, and an empty folder beside it to run commands in."""

    folder: Path
    work: Path
    variables: Mapping[str, str]

    def run(self, program: str, *arguments: str, statuses: Sequence[int] = (0,)) -> str:
        """Run a program of the environment; its standard output. Any other exit status fails the test."""
        command = [str(self.folder / "bin" / program), *arguments]
        return call(command, self.work, self.variables, statuses=statuses)

    def install(self, *arguments: str) -> None:
        """Install with pip the versions that are tested together."""
        # Without --no-compile pip would compile all of torch, with one core, of which the tests import a part.
        self.run("python", "-m", "pip", "install", "--no-compile", "--constraint", str(CONSTRAINTS), *arguments)


def call(command: list[str], folder: Path, variables: Mapping[str, str], *, statuses: Sequence[int] = (0,)) -> str:
    """Run a command in a folder; its standard output. Any other exit status fails the test."""
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode in statuses, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def outside_variables() -> dict[str, str]:
    """The variables of this process less those that would show a program this tree, or another kernel."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAMINA_", "VIRTUAL_"))}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder outside the tree that is gone after the tests: an environment takes a gigabyte."""
    with tempfile.TemporaryDirectory(prefix="lamina-package-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def distributions(folder: Path) -> Distributions:
    """The sdist of this tree, and the wheel of that sdist: ``build`` makes the wheel in an unpacked sdist."""
    output = folder / "dist"
    call([sys.executable, "-m", "build", "--outdir", str(output), str(ROOT)], folder, outside_variables())
    sdist, wheel = sorted(output.iterdir(), key=lambda file: file.suffix != ".gz")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def installed(folder: Path, distributions: Distributions) -> Environment:
    """An environment with the wheel and what it depends on."""
    environment = Environment(folder / "environment", folder / "work", outside_variables())
    environment.work.mkdir()
    call([sys.executable, "-m", "venv", str(environment.folder)], folder, environment.variables)
    environment.install(str(distributions.wheel))
    return environment


@pytest.fixture
def uncompiled(folder: Path, distributions: Distributions, installed: Environment) -> Iterator[Environment]:
    """The environment with the sdist in place of the wheel, installed and used where no C++ compiler is found."""
    (programs := folder / "no-programs").mkdir()
    variables = {name: value for name, value in installed.variables.items() if name not in ("CC", "CXX")}
    environment = installed._replace(variables=variables | {"PATH": str(programs)})
    environment.install("--force-reinstall", "--no-deps", str(distributions.sdist))
    yield environment
    installed.install("--force-reinstall", "--no-deps", str(distributions.wheel))


def files_of_the_tree() -> set[str]:
    """Every file of the package in this tree, through the links to transport, attention and bench."""
    return {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "lamina", followlinks=True)
        for name in names
        if not name.endswith((".pyc", ".so"))
    }


def doctor(environment: Environment, item: str) -> dict[str, str]:
    """What ``lamina doctor`` says of one thing on this machine."""
    # The exit status is 1 where the machine lacks something else.
    answer = environment.run("lamina", "doctor", "--json", statuses=(0, 1))
    [found] = [one for one in json.loads(answer)["findings"] if one["item"] == item]
    return dict(found)


def test_the_sdist_holds_the_whole_package_and_nothing_compiled(distributions: Distributions) -> None:
    """Every file of the package is in the sdist, with the tests and what builds it, and no library is."""
    with tarfile.open(distributions.sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()}

    assert files_of_the_tree() <= names
    assert {
        "deploy/install.sh",
        "deploy/Containerfile",
        "hatch_build.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        *CHECKS,
    } <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_and_its_kernel_alone(distributions: Distributions) -> None:
    """The wheel has the package's files, the kernel compiled for this platform, and no other name to import."""
    with zipfile.ZipFile(distributions.wheel) as archive:
        names = set(archive.namelist())

    package = {name for name in names if name.startswith("lamina/")}
    assert package == files_of_the_tree() | {str(KERNEL)}
    assert set(PACKED) - package == set()
    assert all(".dist-info/" in name for name in names - package)
    assert "-py3-none-linux_" in distributions.wheel.name


def test_the_package_is_imported_from_the_environment(installed: Environment) -> None:
    """The environment uses the installed files, and its command runs, with the benchmarks' group."""
    where = installed.run(
        "python", "-c", "import lamina, lamina.transport; print(lamina.__file__, lamina.transport.__file__)"
    )
    text = installed.run("lamina", "--help")

    assert all(Path(file).is_relative_to(installed.folder) for file in where.split())
    assert "demo" in text
    assert "bench" in text
    assert "throughput" in installed.run("lamina", "bench", "--help")
    assert doctor(installed, "attention kernel")["state"] == "ok"


def test_the_demo_runs_from_the_wheel(installed: Environment) -> None:
    """The installed demo's tokens are those of ``transformers``."""
    facts = json.loads(installed.run("lamina", "demo", "--json"))

    assert facts["identical"] is True
    assert facts["tokens"] > 50


def test_the_installed_package_passes_tests(installed: Environment, distributions: Distributions) -> None:
    """The sdist's tests of the kernel and of links pass with the installed package, away from the sources."""
    installed.install("pytest", "pytest-timeout", "hypothesis")
    with tarfile.open(distributions.sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]
            if parts[0] == "tests" or parts == ("pyproject.toml",):  # never "lamina", which would be imported from here
                archive.extract(member.replace(name=str(PurePosixPath(*parts))), installed.work, filter="data")

    where = installed.run("python", "-c", "import lamina; print(lamina.__file__)")
    text = installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS)

    assert Path(where.strip()).is_relative_to(installed.folder)
    assert " passed" in text


def test_without_a_compiler_the_sdist_installs_and_says_what_is_missing(uncompiled: Environment) -> None:
    """Without a compiler the package installs, the doctor names the missing kernel, and the demo runs on torch."""
    found = doctor(uncompiled, "attention kernel")
    facts = json.loads(uncompiled.run("lamina", "demo", "--json"))

    assert found["state"] == "warn"
    assert KERNEL.name in found["found"]
    assert "install g++" in found["found"]
    assert facts["identical"] is True
