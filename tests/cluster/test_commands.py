"""Commands beside a running cluster: what they take, what they print, and what they say where that is impossible."""

from __future__ import annotations

import asyncio
import json
import os
import re
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
    command = [*LAMINA, "generate", str(config.file), PROMPT, "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as generate:
        assert generate.stdout
        generate.stdout.read(3)
        done = lamina("status", str(config.file), env={k: v for k, v in os.environ.items() if k != "COLUMNS"})
        facts = json.loads(lamina("status", str(config.file), "--json").stdout)
        generate.kill()

    assert (done.returncode, done.stderr) == (0, "")
    head, headings, _, front, memory = done.stdout.splitlines()
    assert re.fullmatch(r"Lamina  cluster\.toml  2 of 2 nodes ready  epoch \d+", head)
    assert headings.split() == ["node", "role", "state", "for", "KV", "requests", "links", "rate"]
    assert re.fullmatch(r"c0 +compute +ready +\w+ +[1-9]\d?% +1 +\w+ +[\d.,]+ tokens/s", front)
    assert re.fullmatch(r"m0 +memory +ready +\w+ +[1-9]\d?% +1 +\w+ +[1-9][\d.k]* layers/s", memory)
    assert facts["ready"] is True
    assert facts["epoch"] > 0
    assert [(n["name"], n["state"], n["address"]) for n in facts["nodes"]] == [
        (n.name, "ready", str(n.address)) for n in config.node
    ]
    assert [n["member"]["state"] for n in facts["nodes"]] == ["serving", "serving"]
    assert facts["nodes"][0]["requests_running"] == 1
    assert facts["nodes"][0]["rates"]["tokens"] > 0


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["blocks", "json"])
def test_status_again_and_again_in_a_pipe(config: ClusterConfig, options: tuple[str, ...]) -> None:
    """A block or a line each second, at once, until Ctrl-C, after which it ends well."""
    command = [*LAMINA, "status", str(config.file), "--watch", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as status:
        assert status.stdout
        assert status.stderr
        shown = [status.stdout.readline() for _ in range(2 if options else 12)]
        status.send_signal(signal.SIGINT)
        shown.append(status.stdout.read())
        assert (status.wait(20), status.stderr.read()) == (0, "")
    if options:
        looks = [json.loads(line) for line in shown[:2]]
        assert [look["ready"] for look in looks] == [True, True]
        assert looks[0]["nodes"][1]["rates"] is None
        assert looks[1]["nodes"][1]["rates"]["layers"] >= 0
    else:
        assert [line.partition(" ")[0].strip("-\n") for line in shown[:6]] == ["Lamina", "node", "", "c0", "m0", ""]
        assert shown[6].startswith("Lamina  cluster.toml  2 of 2 nodes ready")


def test_status_where_a_node_does_not_answer(config: ClusterConfig, tmp_path: Path) -> None:
    """The others are shown as always, and the exit status is 1. No line is longer than 80 columns."""
    (port,) = harness.free_ports(1)
    away = tmp_path / "away.toml"
    memory = config.memory_nodes[0].address
    away.write_text(config.file.read_text().replace(str(memory), str(memory).replace(str(memory.port), str(port))))
    done = lamina("status", str(away), env={k: v for k, v in os.environ.items() if k != "COLUMNS"})
    facts = json.loads(lamina("status", str(away), "--json").stdout)

    assert (done.returncode, done.stderr) == (1, "")
    head, _, _, front, row, why = done.stdout.splitlines()
    assert "1 of 2 nodes ready" in head
    assert front.split()[:3] == ["c0", "compute", "ready"]
    assert row.split()[:3] == ["m0", "memory", "unreachable"]
    assert why == f"m0, tcp://127.0.0.1:{port}: not running"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert facts["ready"] is False
    assert facts["nodes"][1]["state"] == "unreachable"
    assert facts["nodes"][1]["member"]["state"] == "serving"


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
    """What becomes of an answer whose only memory node is lost stands below the text, which is ended by a line break.

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
    assert errors.startswith("lamina: all memory nodes are lost")
