"""The command line: every command explains itself, and every mistake gets one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from tests.test_output import COMMANDS

LAMINA = [sys.executable, "-P", "-m", "lamina"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAMINA, *arguments], capture_output=True, text=True, timeout=20, check=False)


def test_version() -> None:
    """As the package says."""
    assert run("--version").stdout == f"lamina {lamina.__version__}\n"


@pytest.mark.parametrize("command", ["", "up", "generate", "status", "bench", "bench decode"])
def test_short_help(command: str) -> None:
    """`-h` is `--help`."""
    short = run(*command.split(), "-h")
    assert short.returncode == 0
    assert short.stdout == run(*command.split(), "--help").stdout


def test_completion() -> None:
    """The shell's script names the program."""
    done = subprocess.run(
        [*LAMINA, "--show-completion", "bash"], capture_output=True, text=True, timeout=20, check=False
    )
    assert "_LAMINA_COMPLETE" in done.stdout


@pytest.mark.parametrize("name", [name for name in COMMANDS if name and name.split()[0] != "bench"])
def test_the_cluster_file_is_always_the_first_argument(name: str) -> None:
    """No command takes it as an option."""
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts]
    assert "--config" not in options
    arguments = [p.metavar or "" for p in COMMANDS[name].params if p.param_type_name == "argument"]
    assert not any("CONFIG" in argument for argument in arguments[1:])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("generate", "missing argument 'CONFIG'; see `lamina generate --help`"),
        ("generate x.toml", "PROMPT or --prompt-file: expected one of them; PROMPT - is standard input"),
        ("generate x.toml hello --prompt-file y", "PROMPT or --prompt-file: expected one of them; PROMPT - is"),
        ("generate x.toml --prompt-file none.txt", "none.txt cannot be read: No such file or directory"),
        ("generate localhost hello", "localhost: cannot be read: No such file or directory"),
        ("generate localhost:x hello", "'localhost:x': the port 'x' is not a number from 0 to 65535"),
        ("generate 10.0.0.1:7070 hello", "tcp://10.0.0.1:7070 is not a loopback address"),
        ("generate localhost:1 hello --tls-key k", "--tls-certificate: missing; certificate, key and authority"),
        ("generate x.toml hello --max-tokens 0", "--max-tokens: "),
        ("generate x.toml hello --seed x", "--seed: "),
        ("teapot", "no such command 'teapot'; see `lamina --help`"),
        ("statu x.toml", "no such command 'statu'; did you mean 'status'?"),
        ("bench transpor", "no such command 'transpor'; did you mean 'transport'?"),
        ("up --verbse x.toml", "no such option: --verbse; did you mean --verbose?"),
        ("bench decode --tokens 2", "--tokens: "),
        ("up", "missing argument 'CONFIG'; see `lamina up --help`"),
        ("up .", ".: cannot be read: Is a directory"),
        ("status none.toml", "none.toml: cannot be read: No such file or directory"),
        ("trace none.toml --out x", "none.toml: cannot be read: No such file or directory"),
        ("node", "CONFIG: missing; without a cluster file, --role memory runs a memory node"),
        ("node x.toml", "--name: missing; CONFIG needs the name of the node to run"),
        ("node x.toml --name m0 --memory 1GiB", "--memory: not allowed with a cluster file; set it in the file"),
        ("secret .", ". is a folder; name the file to make, such as cluster.key"),
        ("secret none/key", "none/key cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with the program's name, and the exit status is 2."""
    monkeypatch.chdir(tmp_path)
    done = run(*arguments.split())

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lamina: {sentence}")
