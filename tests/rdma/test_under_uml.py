"""The tests in ``inside``, where there is RDMA; and the launcher that takes them there."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.rdma.uml import CANNOT_RUN, TIMED_OUT, CannotRunError, find_kernel, missing_packages, room_for_torch

HERE = Path(__file__).parent
UML = HERE / "uml.py"
REPOSITORY = HERE.parent.parent
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
INSIDE_TIMEOUT_S = 600


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    """Only where the kernel is there already: building it takes minutes."""
    try:
        built = not missing_packages() and find_kernel()
    except CannotRunError as error:
        pytest.skip(f"no RDMA: {error}")
    if not built:
        pytest.skip("no RDMA: its kernel is not built here; run `make test-rdma` once")
    if not (PYVERBS / f"device{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        pytest.skip(f"no RDMA: Debian's pyverbs is for another Python than {sys.version.split()[0]}")


@pytest.mark.timeout(INSIDE_TIMEOUT_S + 60)
@pytest.mark.parametrize("file", sorted((HERE / "inside").glob("test_*.py")), ids=lambda file: file.stem)
def test_inside(file: Path) -> None:
    """All tests of the file pass where there is RDMA, and none of them is skipped there."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--durations=5", file]
    ended = uml("--timeout", str(INSIDE_TIMEOUT_S), "--dir", str(REPOSITORY), "--", *map(str, command))
    report = ended.stdout.decode() + ended.stderr.decode()
    assert ended.returncode == 0, report
    assert not re.search(r"\d+ (skipped|xfailed)", report.splitlines()[-1]), report


@pytest.mark.timeout(3 * INSIDE_TIMEOUT_S)
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(("tests/cluster/test_families.py", "-k", "llama"), id="tokens"),
        pytest.param(
            ("tests/cluster/test_requests.py", "-k", "cancelling or dies"), id="clients", marks=pytest.mark.slow
        ),
        pytest.param(("-m", "slow", "tests/cluster/test_kills.py", "-k", "rdma"), id="kills", marks=pytest.mark.slow),
    ],
)
def test_cluster(tests: tuple[str, ...]) -> None:
    """A whole cluster over RDMA: its memory nodes on one device, its compute node on the other."""
    if not room_for_torch():
        pytest.skip("no cluster over RDMA: vm.max_map_count is too low; run `make rdma-packages` once as root")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--transport", "rdma", *tests]
    given = ("--mem", "8192", "--timeout", str(INSIDE_TIMEOUT_S), "--dir", str(REPOSITORY), "--", *command)
    ended = uml(*given)
    if ended.returncode == CANNOT_RUN:  # Linux as a program is not as steady as what runs under it
        ended = uml(*given)
    report = ended.stdout.decode() + ended.stderr.decode()
    assert ended.returncode == 0, report
    assert re.search(r"\d+ passed", report), report
    if kills := re.search(r"^\d+ kills .*(\n.*){2}", report, re.MULTILINE):
        print(kills[0])  # noqa: T201


def test_output_and_status_are_the_commands() -> None:
    """Every byte of both outputs arrives, apart from each other, and so does the exit status."""
    script = (
        "import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes(3 << 20)); sys.exit('told 7\\r\\n')"
    )
    ended = uml("--", sys.executable, "-c", script)
    assert ended.stdout == random.Random(1).randbytes(3 << 20)
    assert (ended.stderr, ended.returncode) == (b"told 7\r\n\n", 1)


def test_the_command_runs_where_and_with_what_was_asked(tmp_path: Path) -> None:
    """Arguments, variables and folder are passed on as they are; only what is written in a shared folder stays."""
    shared, other = tmp_path / "it's shared, really", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    script = 'printf "%s|" "$PWD" "$NAME" "$@"; echo kept >kept; echo lost >../other/lost; exit 42'
    ended = uml(
        "--share", shared, "--dir", shared, "--env", "NAME=a b='c'", "--", "bash", "-c", script, "-", "x\ny", ""
    )
    assert (ended.stdout.decode(), ended.returncode) == (f"{shared}|a b='c'|x\ny||", 42)
    assert (shared / "kept").read_text() == "kept\n"
    assert not list(other.iterdir())


def test_a_command_that_cannot_be_run() -> None:
    """Where the command is not there the status is the shell's for that; where no kernel starts, the launcher's own."""
    assert uml("--", "no-such-command").returncode == 127
    ended = uml("--mem", "1", "--", "true")
    assert ended.returncode == CANNOT_RUN
    assert b"the kernel ended" in ended.stderr


def test_what_the_command_leaves_running_ends_with_it() -> None:
    """A process in the background that holds the output open does not hold up the end."""
    ended = uml("--", "sh", "-c", "sleep 1000 & echo done")
    assert (ended.stdout, ended.returncode) == (b"done\n", 0)


@pytest.mark.parametrize("how", ["--timeout", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_stays_behind(how: str, tmp_path: Path) -> None:
    """However a run is cut off, its kernel ends; and unless the launcher itself is killed, its files are removed."""
    command = [sys.executable, UML, "--timeout", "3" if how == "--timeout" else "100"]
    command += ["--", "sh", "-c", "sleep 1000 & echo started; sleep 1000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as launcher:
        assert launcher.stdout
        if how == "--timeout":
            told = launcher.communicate()[1]
            assert (launcher.returncode, told) == (TIMED_OUT, b"uml.py: killed: it ran past 3 s\n")
        else:
            assert launcher.stdout.readline() == b"started\n"
            assert kernels_of(tmp_path)
            number = signal.Signals[how]
            launcher.send_signal(number)
            assert launcher.wait() == (-number if how == "SIGKILL" else 128 + number)
    deadline = time.monotonic() + 45
    while kernels_of(tmp_path):  # they are dying
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert how == "SIGKILL" or not list(tmp_path.iterdir())


def kernels_of(folder: Path) -> list[str]:
    """The processes whose arguments name ``folder``: a kernel, and those in which its programs run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if f"talk={folder}".encode() in (process / "cmdline").read_bytes():
                if is_stranded(process):
                    os.kill(int(process.name), signal.SIGKILL)
                    continue
                found.append(process.name)
    return found


def is_stranded(process: Path) -> bool:
    """Whether a process asked to be traced when the kernel that was making it had just been killed.

    Its parent and tracer is the machine's first process then, for which it waits for ever. It runs nothing, and only a
    launcher that lives could have removed it.
    """
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    return status["State"].startswith("t") and status["PPid"] == status["TracerPid"] == "1"


def uml(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, UML, *arguments], capture_output=True)
