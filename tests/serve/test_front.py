"""The server outlives the front: it says that it is away, and serves again when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig
from tests import harness
from tests.serve.conftest import Server, read_all, serving

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    """A cluster of its own, as its front is killed, and keeps nothing then; the queue holds one request."""
    folder = tmp_path_factory.mktemp("front")
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(folder, port)
    pipeline = harness.PipelineConfig(max_waiting=1, max_batch=1)
    with harness.running(memory):
        recovery = harness.RecoveryConfig(lease=0)
        yield harness.write_config(folder, checkpoint, [port], pipeline=pipeline, recovery=recovery, context=1600)


@pytest.fixture(scope="module")
def front(config: ClusterConfig) -> Iterator[harness.Node]:
    node = harness.start_node(config, "c0")
    with harness.running(node):
        asyncio.run(harness.ready(config, node))
        yield node


@pytest.fixture(scope="module")
def small(config: ClusterConfig, front: harness.Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with all options, before that cluster."""
    folder = tmp_path_factory.mktemp("options")
    keys = folder / "keys"
    keys.write_text("first-key\n\nsecond-key-which-is-longer\n")
    keys.chmod(0o600)
    options = ["--api-key-file", str(keys), "--served-model-name", "big", "--served-model-name", "also/big"]
    options += ["--cors-origin", "https://here.example", "--max-body", "64KiB"]
    with serving(config, folder / "serve.log", *options) as server:
        server.headers = {"Authorization": "Bearer first-key"}
        server.ready()
        yield server


@pytest.mark.parametrize("key", ["first-key", "second-key-which-is-longer"])
def test_each_key_lets_in(small: Server, key: str) -> None:
    assert small.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status == 200


@pytest.mark.parametrize("given", ["Bearer nothing", "Bearer", "Basic first-key", "Bearer first-key2", "Bearer é"])
def test_another_key_does_not(small: Server, given: str) -> None:
    """Nor does none. What monitors ask for needs none."""
    reply = small.ask("POST", "/v1/completions", {"prompt": "a"}, headers={"Authorization": given})

    assert (reply.status, reply.error["type"]) == (401, "authentication_error")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert small.ask("GET", "/health", headers={"Authorization": given}).status == 200


def test_a_model_has_the_names_that_it_was_given(small: Server) -> None:
    """And answers say the one that was asked for."""
    assert [model["id"] for model in small.get("/v1/models").json["data"]] == ["big", "also/big"]
    assert small.get("/v1/models/also/big").json["id"] == "also/big"
    assert small.complete(prompt="a", model="also/big", max_tokens=1).json["model"] == "also/big"
    assert small.complete(prompt="a", model="checkpoint").status == 404


def test_pages_of_the_named_origin_may_use_it(small: Server, server: Server) -> None:
    """A preflight needs no key; without the option, no page may."""
    asking = {"Origin": "https://here.example", "Access-Control-Request-Method": "POST"}

    assert small.ask("OPTIONS", "/v1/completions", headers=asking).headers["access-control-allow-origin"] == (
        "https://here.example"
    )
    assert (
        "access-control-allow-origin"
        not in small.ask("GET", "/health", headers={"Origin": "https://there.example"}).headers
    )
    assert "access-control-allow-origin" not in server.ask("GET", "/health", headers=asking).headers


def test_the_limit_of_bodies_is_an_option(small: Server) -> None:
    assert small.ask("POST", "/v1/completions", b"x" * 70_000).status == 413


def test_a_full_queue_is_told_with_a_time_to_retry(small: Server, config: ClusterConfig) -> None:
    """As whole seconds, which clients honour up to 120."""

    def holds(running: int, waiting: int) -> bool:
        status = asyncio.run(harness.status_of(config, config.front))
        return (status.requests_running, status.requests_waiting) == (running, waiting)

    busy = [_post(small, LONG)]
    _eventually(lambda: holds(1, 0))
    busy.append(_post(small, LONG))
    _eventually(lambda: holds(1, 1))
    for stream in (True, False):
        reply = small.complete(prompt="a", stream=stream)
        assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
        assert 1 <= int(reply.headers["retry-after"]) < 120
    for connection in busy:
        connection.close()


def test_a_lost_front_breaks_streams_and_is_found_again(
    small: Server, config: ClusterConfig, front: harness.Node
) -> None:
    """The stream ends with an error that clients raise on, and with no last chunk, so that it cannot pass for a
    success. Until the front is back, requests get 503."""
    connection = _post(small, LONG)
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    front.signal(signal.SIGKILL)
    rest = read_all(connection)

    *_, last = [event for event in rest.decode().split("\n\n") if "data: " in event]
    error = json.loads(last.partition("data: ")[2])["error"]
    assert (error["code"], error["type"]) == (503, "server_error")
    assert "was lost" in error["message"]
    assert not rest.endswith(b"0\r\n\r\n")
    _eventually(lambda: small.get("/health").status == 503)
    reply = small.complete(prompt="a")
    assert (reply.status, int(reply.headers["retry-after"])) == (503, 1)
    assert small.get("/ready").status == 503

    front.wait()
    again = harness.start_node(config, "c0")
    with harness.running(again):
        asyncio.run(harness.ready(config, again))
        small.ready()
        assert small.complete(prompt="Once", max_tokens=3).status == 200

        connection = _post(small, LONG | {"max_tokens": 300})
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        small.process.send_signal(signal.SIGTERM)
        _eventually(lambda: small.get("/ready").status == 503)
        assert "draining" in small.complete(prompt="a").error["message"]
        assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert small.process.wait(10) == 0


def test_a_stream_goes_on_when_the_front_is_back(checkpoint: Path, tmp_path: Path) -> None:
    """Whoever reads it sees a pause and nothing else: the whole text, the count of tokens, and the end; also of a chat,
    and of an answer that is no stream."""
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port)
    config = harness.write_config(tmp_path, checkpoint, [port], context=1600, recovery=harness.RecoveryConfig())
    asked = LONG | {"max_tokens": 700, "stream_options": {"include_usage": True}}
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 700, "ignore_eos": True}
    chat |= {"stream": True, "temperature": 0}
    plain = asked | {"stream": False}
    del plain["stream_options"]

    def post(path: str, body: dict[str, Any]) -> socket.socket:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\nHost: a\nConnection: close\nContent-Length: {len(data)}"
        connection = server.send(head, data)
        connection.settimeout(100)
        return connection

    def events(connection: socket.socket) -> list[dict[str, Any]]:
        text = read_all(connection).replace(b"\r\n", b"\n").decode()
        *parts, done = [part.partition("data: ")[2] for part in text.split("\n\n") if "data: " in part]
        assert done == "[DONE]"
        return [json.loads(part) for part in parts]

    def text_of(stream: list[dict[str, Any]]) -> str:
        choices = [event["choices"][0] for event in stream if event["choices"]]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    front = harness.start_node(config, "c0")
    with harness.running(memory, front):
        asyncio.run(harness.ready(config, front))
        with serving(config, tmp_path / "serve.log") as server:
            server.ready()
            connections = [post("/v1/completions", asked), post("/v1/chat/completions", chat)]
            connections.append(post("/v1/completions", plain))

            def generated() -> int:
                return asyncio.run(harness.status_of(config, config.front)).tokens_generated

            _eventually(lambda: generated() > 150, 60)
            front.signal(signal.SIGKILL)
            front.wait()
            again = harness.start_node(config, "c0")
            with harness.running(again):
                completion, talk = events(connections[0]), events(connections[1])
                whole = json.loads(read_all(connections[2]).partition(b"\r\n\r\n")[2])
                assert completion[-1]["usage"]["completion_tokens"] == 700
                assert whole["usage"]["completion_tokens"] == 700
                assert text_of(completion) == whole["choices"][0]["text"]
                # Undisturbed, it is the same.
                undisturbed = server.ask("POST", "/v1/completions", plain).json
                assert undisturbed["choices"] == whole["choices"]
                assert text_of(talk) == text_of(events(post("/v1/chat/completions", chat)))
                assert asyncio.run(harness.status_of(config, config.front)).requests_resumed == 3


def test_without_a_journal_a_stream_ends_with_the_front(checkpoint: Path, tmp_path: Path) -> None:
    """At once, although the server would wait for a minute for what goes on."""
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port)
    recovery = harness.RecoveryConfig(journal="off")
    config = harness.write_config(tmp_path, checkpoint, [port], context=1600, recovery=recovery)
    front = harness.start_node(config, "c0")
    with harness.running(memory, front):
        asyncio.run(harness.ready(config, front))
        with serving(config, tmp_path / "serve.log") as server:
            server.ready()
            connection = _post(server, LONG)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
            connection.settimeout(20)
            front.signal(signal.SIGKILL)
            rest = read_all(connection)
        *_, last = [event for event in rest.decode().split("\n\n") if "data: " in event]
        error = json.loads(last.partition("data: ")[2])["error"]
        assert error["code"] == 503
        assert "it keeps no journal (recovery.journal), so what it had begun is lost" in error["message"]


def _post(server: Server, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\nHost: a\nAuthorization: Bearer first-key\nContent-Length: {len(data)}"
    return server.send(head, data)


def _eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
