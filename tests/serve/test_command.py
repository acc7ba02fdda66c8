"""``lamina serve``: its options, and a whole cluster for one checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig, ModelConfig, write_cluster
from lamina.demo.run import CHECKPOINT
from tests import harness
from tests.serve.conftest import Server, serving

SERVE = [sys.executable, "-P", "-m", "lamina", "serve"]


def test_tls_and_a_checkpoint_that_cannot_chat(cluster: ClusterConfig, tmp_path: Path) -> None:
    """A chat is refused with a sentence; completions work, over TLS."""
    files = harness.certificates(tmp_path)
    other = tmp_path / "plain.toml"
    config = write_cluster(
        other, ModelConfig(path=str(CHECKPOINT), dtype="float32", compile=False), cluster.node,
        transport=cluster.transport,
    )  # fmt: skip

    options = ("--tls-certificate", str(files.certificate), "--tls-key", str(files.key), "--tool-parser", "hermes")
    with serving(config, tmp_path / "log", *options) as server:
        context = ssl.create_default_context(cafile=files.authority)
        context.check_hostname = False
        server.tls = context
        server.ready()
        assert server.complete(prompt="Once", max_tokens=2, stream=True).status == 200
        refused = server.chat()

    assert refused.status == 400
    assert "its checkpoint has no chat template" in refused.error["message"]


def test_a_chat_template_for_a_checkpoint_without_one(cluster: ClusterConfig, tmp_path: Path) -> None:
    """A file takes the place of the template that the checkpoint lacks."""
    config = write_cluster(
        tmp_path / "plain.toml", ModelConfig(path=str(CHECKPOINT), dtype="float32", compile=False), cluster.node,
        transport=cluster.transport,
    )  # fmt: skip
    (tmp_path / "template.jinja").write_text("{% for message in messages %}Once {{ message.content }}{% endfor %}")
    with serving(config, tmp_path / "log", "--chat-template", str(tmp_path / "template.jinja")) as server:
        server.ready()
        chat = server.chat(messages=[{"role": "user", "content": "upon a time"}], max_tokens=6).json
        text = server.complete(prompt="Once upon a time", max_tokens=6, add_special_tokens=False).json
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "192.0.2.1"], "--host: 192.0.2.1 can be reached from other machines, so it needs --api-key-file"),
        (["--tls-key", "key.pem"], "--tls-certificate: missing; certificate and key are needed together"),
        (["--tls-key", "a", "--tls-certificate", "b"], "--tls-certificate: b cannot be used: "),
        (["--api-key-file", "nowhere"], "--api-key-file: nowhere cannot be read: No such file or directory"),
        (["--api-key-file", "open"], "--api-key-file: open is open to others (mode 0644)"),
        (["--api-key-file", "empty"], "--api-key-file: empty has no key; write one on each line"),
        (["--api-key-file", "short"], "--api-key-file: short, line 2: expected a key of at least 8 ASCII characters"),
        (["--max-body", "large"], "--max-body: expected"),
        (["--chat-template", "nowhere"], "--chat-template: nowhere cannot be read: No such file or directory"),
        (["--tool-parser", "hermess"], "--tool-parser: unknown format 'hermess'; did you mean 'hermes'?"),
        (["--reasoning-parser", "x"], "--reasoning-parser: unknown format 'x'; known: none, think"),
        (["--memory", "1GiB"], "--memory: only allowed with a checkpoint directory; cluster.toml is a cluster file"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    """With one sentence, before anything starts."""
    for name, text in (("open", "a-key-that-is-long"), ("empty", "\n"), ("short", "a-key-that-is-long\nshort\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "open" else 0o600)

    done = _run(["cluster.toml", *options], tmp_path)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lamina: {message}")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    done = _run([str(tmp_path)], tmp_path)

    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_tokenizer_that_cannot_be_read_ends_the_server(cluster: ClusterConfig, tmp_path: Path) -> None:
    """As it would never be ready."""
    folder = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "tokenizer.json").write_text("{}")
    config = write_cluster(tmp_path / "broken.toml", ModelConfig(path=str(folder)), cluster.node)

    done = _run([str(config.file), "--port", "0"], tmp_path)

    assert done.returncode == 1
    assert f"lamina: {folder / 'tokenizer.json'}: the tokenizer cannot be read: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("form", ["cluster", "checkpoint"])
def test_a_port_in_use_is_named(cluster: ClusterConfig, server: Server, tmp_path: Path, form: str) -> None:
    """Also before the nodes of a checkpoint start."""
    served = str(cluster.file if form == "cluster" else CHECKPOINT)

    done = _run([served, "--port", str(server.port)], tmp_path)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"lamina: --host and --port: the server cannot listen at 127.0.0.1:{server.port}: address already in use; "
        "choose another port"
    )


@pytest.mark.slow
def test_the_cause_of_an_end_is_named(tmp_path: Path) -> None:
    """Though it is the end of a child, which logs into a file."""
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)

    done = _run([str(CHECKPOINT), "--port", "0", "--files", str(folder)], tmp_path)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"lamina: --files: {folder} can be entered by others")


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVE, *words],
        cwd=folder,
        env=os.environ | {"XDG_STATE_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_checkpoint_is_served_by_one_command(tmp_path: Path) -> None:
    """It shows its start; after Ctrl-C, what runs is answered, and nothing is left."""
    (port,) = harness.free_ports(1)
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    command = [*SERVE, str(CHECKPOINT), "--port", str(port), "--context", "512", "--memory", "64MiB"]
    with (tmp_path / "out").open("wb") as out:
        process: Any = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(process, port, tmp_path / "out")
    try:
        deadline = time.monotonic() + 300
        while "ready; next: curl" not in server.log.read_text():
            assert process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.2)
        server.ready()
        assert server.complete(prompt="Once", max_tokens=2).status == 200
        assert server.get("/v1/models").json["data"][0] == server.get("/v1/models/checkpoint").json
        assert server.get("/v1/models").json["data"][0]["max_model_len"] == 512
        asked = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        connection = server.post("/v1/completions", asked)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        rest = b""
        while part := connection.recv(1 << 16):
            rest += part
        connection.close()
        assert b"data: [DONE]" in rest
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    shown = server.log.read_text()
    assert "http (endpoint) ready" in shown
    assert shown.endswith("all processes stopped\n")
