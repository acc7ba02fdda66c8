"""One small cluster and one server before it, as real processes, for all tests of the endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from lamina.config import ClusterConfig
from lamina.demo.run import CHECKPOINT
from tests import harness

START_S = 60.0
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Reply:
    """An answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, in which nothing but the four keys of the API may be."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        return error

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream, which must have been complete."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


@dataclass
class Server:
    """A running ``lamina serve``."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Send a request; a body that is not bytes goes as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)  # noqa: S310 - it is http
        request.add_header("Content-Type", "application/json")
        for name, value in {**self.headers, **(headers or {})}.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30, context=self.tls) as answer:  # noqa: S310
                return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as e:
            with e:
                return Reply(e.code, {k.lower(): v for k, v in e.headers.items()}, e.read())

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def complete(self, **body: Any) -> Reply:
        """POST /v1/completions, greedy unless ``body`` says otherwise."""
        return self.ask("POST", "/v1/completions", {"temperature": 0} | body)

    def chat(self, text: str = "Once upon a time", **body: Any) -> Reply:
        """POST /v1/chat/completions, greedy unless ``body`` says otherwise."""
        messages = [{"role": "user", "content": text}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0} | body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """Send the lines of a request as they are."""
        connection = self.connect()
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return connection

    def post(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request with a body in JSON, and read nothing."""
        data = json.dumps(body).encode()
        return self.send(f"POST {path} HTTP/1.1\nHost: here\nContent-Length: {len(data)}", data)

    def ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if self.get("/ready").status == 200:
                    return
            except OSError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


def read_all(connection: socket.socket) -> bytes:
    """Read until the other end closes the connection."""
    with connection:
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@contextmanager
def serving(config: ClusterConfig, log: Path, *options: str) -> Iterator[Server]:
    """Run ``lamina serve`` before a cluster, as it is installed: not in a process that has torch already."""
    (port,) = harness.free_ports(1)
    command = [sys.executable, "-P", "-m", "lamina", "serve", str(config.file), "--port", str(port), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ)
    server = Server(process, port, log)
    try:
        yield server
    except BaseException:
        sys.stderr.write(f"--- {log}\n{log.read_text()}")
        raise
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a chat template, which it has not: that of a play."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    """One compute and one memory node."""
    folder = tmp_path_factory.mktemp("serve")
    (port,) = harness.free_ports(1)
    config = harness.write_config(folder, checkpoint, [port], memory=64 << 20)
    memory, front = harness.start_memory(folder, port, memory="64MiB"), harness.start_node(config, "c0")
    with harness.running(memory, front):
        asyncio.run(harness.ready(config, front))
        yield config


@pytest.fixture(scope="session")
def server(cluster: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server before it."""
    with serving(cluster, tmp_path_factory.mktemp("http") / "serve.log") as server:
        server.ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The client that most programs use."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
