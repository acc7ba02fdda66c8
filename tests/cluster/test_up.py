"""``lamina up`` tells what it does and why it fails, and depends on nothing but its nodes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lamina.config import ClusterConfig, RdmaConfig, TransportConfig, write_cluster
from tests import harness
from tests.cluster.test_failures import alive, processes
from tests.families import FAMILIES

UP = [sys.executable, "-P", "-m", "lamina", "up"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """One compute and one memory node; logs go into a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return harness.write_config(tmp_path, checkpoint, harness.free_ports(1))


def edit(config: ClusterConfig, old: str, new: str) -> Path:
    """Change the text of a cluster file; the file."""
    text = config.file.read_text()
    assert old in text
    config.file.write_text(text.replace(old, new))
    return config.file


def fails(file: Path, *, timeout_s: float) -> str:
    """Run ``lamina up``, which must fail in time with one sentence and nothing else on standard error."""
    started = time.monotonic()
    done = subprocess.run([*UP, str(file)], capture_output=True, text=True, timeout=60, check=False)
    seconds = time.monotonic() - started
    assert done.returncode in (1, 2), done
    (sentence,) = done.stderr.splitlines()
    assert seconds < timeout_s, f"{seconds:.1f} s: {sentence}"
    return sentence


# -- what is known before anything is started


def no_model(config: ClusterConfig) -> tuple[Path, str]:
    return edit(config, f'path = "{config.model.path}"', 'path = "none"'), "none: no such checkpoint directory"


def empty_model(config: ClusterConfig) -> tuple[Path, str]:
    (config.file.parent / "empty").mkdir()
    return edit(config, f'path = "{config.model.path}"', 'path = "empty"'), "empty/config.json: missing"


def much_memory(config: ClusterConfig) -> tuple[Path, str]:
    return edit(config, 'memory = "16MiB"', 'memory = "1000TiB"'), "1024000.0GiB for m0 cannot be had: "


def no_device(config: ClusterConfig) -> tuple[Path, str]:
    transport = TransportConfig(kind="rdma", rdma=RdmaConfig(device="none"))
    write_cluster(config.file, config.model, config.node, transport=transport)
    return config.file, 'node c0: transport.kind "rdma" is impossible: '


def no_processor(config: ClusterConfig) -> tuple[Path, str]:
    return edit(config, 'memory = "16MiB"', 'memory = "16MiB"\ncpus = "9000-9001"'), "no processors 9000-9001"


def far_address(config: ClusterConfig) -> tuple[Path, str]:
    edit(config, "[transport]", '[transport]\nsecret_file = "cluster.key"')
    subprocess.run([*UP[:-1], "secret", str(config.file.parent / "cluster.key")], check=True, capture_output=True)
    address = config.memory_nodes[0].address
    return edit(config, str(address), f"tcp://192.0.2.1:{address.port}"), "m0 cannot listen at tcp://192.0.2.1"


@pytest.mark.parametrize("change", [no_model, empty_model, much_memory, no_device, no_processor, far_address])
def test_what_can_be_known_is_told_at_once(
    change: Callable[[ClusterConfig], tuple[Path, str]], config: ClusterConfig
) -> None:
    """In under two seconds, although importing torch alone takes longer."""
    file, message = change(config)

    assert message in fails(file, timeout_s=2.0)


def test_a_port_in_use_is_told_at_once(config: ClusterConfig) -> None:
    """Node and address."""
    with socket.create_server(("127.0.0.1", config.front.address.port)):
        sentence = fails(config.file, timeout_s=2.0)
    assert f"node c0 cannot listen at {config.front.address}: address already in use" in sentence


def test_a_start_that_fails_at_once_leaves_no_folder(config: ClusterConfig, tmp_path: Path) -> None:
    """Also where a user has no home for logs, so that their folder is a temporary one."""
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"XDG_STATE_HOME": "/dev/null", "TMPDIR": str(tmp_path / "temporary")}
    with socket.create_server(("127.0.0.1", config.front.address.port)):
        command = [sys.executable, "-P", "-m", "lamina", "up", str(config.file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert list((tmp_path / "temporary").iterdir()) == []


# -- what only nodes find out


def test_the_memory_node_says_why_it_cannot_start(config: ClusterConfig) -> None:
    """Its own sentence is the last one, and the only one, of standard error."""
    sentence = fails(edit(config, 'memory = "16MiB"', 'memory = "16MiB"\nnuma = 4000'), timeout_s=30)

    assert re.match(r"lamina: node m0: numa: expected one of this machine's NUMA nodes", sentence)


def test_the_compute_node_says_why_it_cannot_start(config: ClusterConfig) -> None:
    """Not that its link was closed, which the others see of it."""
    sentence = fails(edit(config, 'memory = "16MiB"', 'memory = "256KiB"'), timeout_s=40)

    assert re.match(r"lamina: node c0: the memory nodes can hold \d+ tokens of one request, fewer than", sentence)


# -- on a terminal


class OnTerminal:
    """``lamina up`` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        self.process = subprocess.Popen([*UP, *arguments], stdin=far, stdout=far, stderr=far, start_new_session=True)
        os.close(far)
        self.shown = ""

    def read(self, until: str = "") -> str:
        """Read until ``until`` is shown, or until the end."""
        while not until or until not in self.shown:
            try:
                piece = os.read(self._near, 4096)
            except OSError:
                break
            self.shown += piece.decode()
        return self.shown


def test_a_terminal_shows_states_and_what_comes_next(config: ClusterConfig, tmp_path: Path) -> None:
    """A list of nodes that is kept up to date, no logs, and the next command; logs are in a private folder."""
    up = OnTerminal(str(edit(config, "compile = false", "compile = true")))
    try:
        shown = up.read(until="ready; next: ")
        up.process.send_signal(signal.SIGINT)
        up.read()
        assert up.process.wait(20) == 0
    finally:
        up.process.kill()

    assert "event=" not in up.shown
    assert re.search(r"c0 +compute +reading the model", shown)
    assert re.search(r"c0 +compute +compiling 2 of \d", shown)
    assert re.search(r"m0 +memory +ready +tcp://127", shown)
    last = re.split(r"\x1b\[\dF\x1b\[J", shown)[-1]
    assert re.match(r"c0 +compute +ready", last)
    assert f'lamina generate {config.file} "Once upon a time"' in shown.replace("\r\n", "")
    (folder,) = re.findall(r"logs: (\S+)", shown)
    assert Path(folder).is_relative_to(tmp_path / "state" / "lamina")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert {file.name for file in Path(folder).iterdir()} == {"c0.log", "m0.log", "up.log"}
    assert "event=ready" in (Path(folder) / "c0.log").read_text()


# -- while it runs


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``lamina up`` of a file, without restarts; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(file: Path, **settings: Any) -> subprocess.Popen[str]:
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen([*UP, str(file), "--no-restart"], **(given | settings)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until_ready(output: IO[str] | None) -> list[str]:
    """The lines up to the one that says that the cluster is ready."""
    assert output
    lines = []
    for line in output:
        lines.append(line)
        if line.startswith("ready;"):
            return lines
    pytest.fail(f"never ready: {lines}")


def test_the_second_up_of_a_file(
    config: ClusterConfig, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """It ends at once and leaves the first alone, which does not notice. Files of the current folder are no modules."""
    for name in ("token", "queue", "profile", "lamina"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    first = start(config.file, cwd=tmp_path)
    lines = until_ready(first.stdout)
    assert "m0 (memory) ready\n" in lines

    assert "is this cluster running already?" in fails(config.file, timeout_s=2.0)

    assert len(alive(processes(config))) == 2
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=20)
    assert (first.returncode, errors) == (0, "")
    assert output.endswith("all nodes stopped\n")


def test_its_own_pause_is_not_the_nodes_silence(
    config: ClusterConfig, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Suspended by Ctrl-Z for longer than peer_timeout, it goes on afterwards, and so do the nodes."""
    up = start(config.file)
    until_ready(up.stdout)
    pids = processes(config)
    up.send_signal(signal.SIGSTOP)
    time.sleep(harness.default.peer_timeout + 2)
    up.send_signal(signal.SIGCONT)
    time.sleep(3)

    assert up.poll() is None
    assert len(alive(pids)) == 2
    up.send_signal(signal.SIGINT)
    assert up.communicate(timeout=20)[1] == ""
    assert up.returncode == 0


@pytest.mark.slow
def test_a_long_pause(config: ClusterConfig, start: Callable[..., subprocess.Popen[str]]) -> None:
    """The nodes have given up its links, and it makes new ones; a node that dies then is noticed."""
    up = start(config.file)
    until_ready(up.stdout)
    up.send_signal(signal.SIGSTOP)
    time.sleep(40)
    up.send_signal(signal.SIGCONT)
    time.sleep(3)

    assert up.poll() is None
    os.kill(processes(config)["m0"], signal.SIGSTOP)
    assert "lamina: node m0 was lost" in up.communicate(timeout=20)[1]


@pytest.mark.parametrize("closed", ["in use", pytest.param("from the start", marks=pytest.mark.slow)])
def test_nobody_reads_the_output(
    closed: str, config: ClusterConfig, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The nodes go on, and one that dies is noticed."""
    if closed == "in use":
        up = start(config.file)
        assert up.stdout
        up.stdout.readline()
        up.stdout.close()
        up.stdout = None
    else:
        up = start(config.file, stdout=None, preexec_fn=lambda: os.close(1))
    deadline = time.monotonic() + 40
    logs = tmp_path / "state" / "lamina"
    while not any("event=ready" in file.read_text() for file in logs.glob("*/c0.log")):
        assert time.monotonic() < deadline
        assert up.poll() is None, up.communicate()[1]
        time.sleep(0.1)

    os.kill(processes(config)["m0"], signal.SIGKILL)
    _, errors = up.communicate(timeout=15)
    assert up.returncode == 1
    assert errors.startswith("lamina: node m0 was killed by signal 9")


@pytest.mark.parametrize("module", ["asyncio", "typer.core", "lamina.cli"])
def test_ctrl_c_while_it_is_imported(module: str, config: ClusterConfig) -> None:
    """No traceback, wherever it strikes."""
    command = [sys.executable, "-P", "-X", "importtime", *UP[2:], str(config.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert up.stderr
        for line in up.stderr:
            if line.rstrip().endswith(f"| {module}") or line.rstrip().endswith(f" {module}"):
                break
        up.send_signal(signal.SIGINT)
        rest = up.stderr.read()
    assert "Traceback" not in rest
    assert up.returncode in (130, -signal.SIGINT)


def test_two_processes_do_not_share_a_folder_of_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two servers of one checkpoint would overwrite each other's logs. Later, the first folder is free again."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    program = "import sys; from pathlib import Path; from lamina.cluster.up import log_folder\n"
    program += "print(log_folder(Path('model')), flush=True); sys.stdin.read()"
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, text=True) as first:
        assert first.stdout is not None
        folder = first.stdout.readline().strip()
        beside = subprocess.run(command, input="", capture_output=True, cwd=tmp_path, text=True, check=True)
    later = subprocess.run(command, input="", capture_output=True, cwd=tmp_path, text=True, check=True)

    assert beside.stdout.strip() == f"{folder}-2"
    assert later.stdout.strip() == folder
