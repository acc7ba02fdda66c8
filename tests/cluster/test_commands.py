"""Commands beside a running cluster: what they take, what they print, and what they say where that is impossible."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig
from lamina.demo.run import CHECKPOINT
from tests import harness

LAMINA = [sys.executable, "-P", "-m", "lamina"]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterConfig, dict[str, harness.Node]]]:
    """A running cluster of one compute and one memory node."""
    config = harness.write_config(tmp_path_factory.mktemp("cluster"), CHECKPOINT, harness.free_ports(1))
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    with harness.running(*started.values()):
        asyncio.run(harness.ready(config, started["c0"]))
        yield config, started


@pytest.fixture(scope="module")
def config(nodes: tuple[ClusterConfig, dict[str, harness.Node]]) -> ClusterConfig:
    return nodes[0]


def lamina(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 60, "check": False}
    return subprocess.run([*LAMINA, *arguments], **(given | settings))


@pytest.fixture(scope="module")
def text(config: ClusterConfig) -> str:
    """What the cluster answers to PROMPT."""
    done = lamina("generate", str(config.file), PROMPT, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt_from_anywhere(config: ClusterConfig, text: str, tmp_path: Path) -> None:
    """From standard input and from a file; and the cluster by the address of its front."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    cluster, front, limit = str(config.file), str(config.front.address), ("--max-tokens", "8")

    assert lamina("generate", cluster, "-", *limit, input=PROMPT).stdout == text
    assert lamina("generate", cluster, "--prompt-file", str(file), *limit).stdout == text
    assert lamina("generate", front.removeprefix("tcp://"), PROMPT, *limit).stdout == text


def test_an_answer_as_json(config: ClusterConfig, text: str) -> None:
    """Text, tokens and why it ended, in one object."""
    facts = json.loads(lamina("generate", str(config.file), PROMPT, "--max-tokens", "8", "--json").stdout)

    assert facts["text"] + "\n" == text
    assert (len(facts["tokens"]), facts["finish_reason"]) == (8, "length")


def test_where_a_text_ends(config: ClusterConfig, text: str) -> None:
    """Before a text that is given, and no earlier than asked for; with the prompt as token ids too."""
    from lamina.model.tokenizer import Tokenizer

    limit, stop = ("--max-tokens", "8"), text.rstrip("\n")[5:8]
    ids = Tokenizer(CHECKPOINT, 2048).encode(PROMPT)

    stopped = lamina("generate", str(config.file), PROMPT, *limit, "--stop", "nowhere", "--stop", stop)
    given = lamina("generate", str(config.file), ",".join(map(str, ids)), "--prompt-ids", *limit, "--json")
    wrong = lamina("generate", str(config.file), "1 x", "--prompt-ids", *limit)

    assert stopped.stdout == text[: text.index(stop)] + "\n"
    assert (json.loads(given.stdout)["text"] + "\n", json.loads(given.stdout)["stopped_by"]) == (text, None)
    assert wrong.returncode == 2
    assert "--prompt-ids: expected token ids, separated by spaces or commas, got 'x'" in wrong.stderr


def test_status_of_a_running_cluster(config: ClusterConfig) -> None:
    """A row for each node in a pipe, everything in the JSON object; the exit status says that all are ready."""
    done, facts = lamina("status", str(config.file)), lamina("status", str(config.file), "--json")

    assert (done.returncode, facts.returncode) == (0, 0)
    rows = [line.replace(",", " ").split() for line in done.stdout.splitlines()[1:]]
    ready = [[n.name, n.role, str(n.address).removeprefix("tcp://"), "ready"] for n in config.node]
    assert [row[:4] for row in rows if row[0] in ("c0", "m0")] == ready
    assert [(n["name"], n["state"]) for n in json.loads(facts.stdout)["nodes"]] == [("c0", "ready"), ("m0", "ready")]


def test_status_of_a_cluster_that_does_not_run(tmp_path: Path) -> None:
    """It says so within two seconds; the exit status is 1."""
    config = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1))
    done = lamina("status", str(config.file), "--json", timeout=10)

    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert facts["ready"] is False
    assert [(n["state"], n["reason"]) for n in facts["nodes"]] == [("unreachable", "not running")] * 2


@pytest.mark.parametrize("command", ["generate", "generate --json", "convert", "status"])
def test_a_full_disk(command: str, config: ClusterConfig) -> None:
    """One sentence and exit status 1."""
    name, *options = command.split()
    given = {"generate": [str(config.file), PROMPT], "convert": [str(CHECKPOINT)], "status": [str(config.file)]}[name]
    with open("/dev/full", "w") as full:
        done = lamina(name, *given, *options, stdout=full)

    assert (done.returncode, done.stderr) == (1, "lamina: standard output cannot be written: No space left on device\n")


def test_a_reader_that_has_enough(config: ClusterConfig) -> None:
    """As after `| head -c 1`, generation ends without a word."""
    command = [*LAMINA, "generate", str(config.file), PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as generate:
        assert generate.stdout
        assert generate.stderr
        generate.stdout.read(1)
        generate.stdout.close()
        assert generate.wait(30) == 1
        assert generate.stderr.read() == b""


def test_a_pause_of_an_operators_command(config: ClusterConfig, tmp_path: Path) -> None:
    """A trace that is suspended by Ctrl-Z for longer than peer_timeout goes on: nodes wait longer for operators."""
    out = tmp_path / "trace.json"
    command = [*LAMINA, "trace", str(config.file), "--seconds", "4", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as trace:
        while not _connections(trace.pid, 4):  # two of them wake its loop
            assert trace.poll() is None
            time.sleep(0.01)
        assert lamina("generate", str(config.file), PROMPT, "--max-tokens", "20").returncode == 0
        trace.send_signal(signal.SIGSTOP)
        time.sleep(harness.default.peer_timeout + 2)
        trace.send_signal(signal.SIGCONT)
        _, errors = trace.communicate(timeout=30)
    assert trace.returncode == 0, errors
    assert "20 steps of 1 request;" in errors
    assert json.loads(out.read_text())["traceEvents"]


def _connections(pid: int, count: int) -> bool:
    """Whether a process has so many sockets."""
    links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    return sum(link.startswith("socket:") for link in links) >= count


def test_an_error_begins_on_a_line_of_its_own(nodes: tuple[ClusterConfig, dict[str, harness.Node]]) -> None:
    """A node that is lost in the middle of an answer is named below the text, which is ended by a line break.

    This is the last test of the module, as the cluster is gone after it.
    """
    config, started = nodes
    command = [*LAMINA, "generate", str(config.file), PROMPT, "--temperature", "1", "--seed", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as generate:
        assert generate.stdout
        assert generate.stderr
        shown = generate.stdout.read(3)
        started["m0"].kill()
        shown += generate.stdout.read()
        errors = generate.stderr.read()
        assert generate.wait(30) == 1
    assert shown.endswith("\n")
    assert errors.startswith("lamina: memory node m0 was lost")
