"""What a connection may do: leave, stall, send too much or nothing, and what it then sees."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from lamina.config import ClusterConfig
from lamina.serve import protocol
from tests import harness
from tests.serve.conftest import Server, read_all

LONG: dict[str, Any] = {
    "prompt": "Once upon a time",
    "max_tokens": 1900,
    "ignore_eos": True,
    "temperature": 1.0,
    "seed": 1,
}


async def _running(config: ClusterConfig) -> int:
    status = await harness.status_of(config, config.front)
    return status.requests_running + status.requests_waiting


def test_the_server_never_imports_torch(server: Server) -> None:
    """Its process has mapped no library of torch, and is small."""
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())

    assert "torch" not in mapped
    assert "tokenizers" in mapped
    assert resident is not None
    assert int(resident[1]) < 200_000


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(server: Server, cluster: ClusterConfig, *, stream: bool) -> None:
    """Within a step or two, not at the end of the answer."""

    async def is_running() -> bool:
        return await _running(cluster) == 3

    async def is_idle() -> bool:
        return await _running(cluster) == 0

    connection = server.post("/v1/completions", LONG | {"stream": stream, "n": 3})
    asyncio.run(harness.eventually(is_running))
    connection.close()

    asyncio.run(harness.eventually(is_idle, 2.0))


def test_a_slow_reader_loses_nothing(server: Server) -> None:
    """Nor does it hold up the others."""
    asked = LONG | {"max_tokens": 150, "temperature": 0.0, "stream": True, "return_token_ids": True}
    connection = server.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    data = json.dumps(asked).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data)
        + data
    )
    time.sleep(0.5)
    expected = server.complete(**asked).events
    body = _unchunked(read_all(connection))

    chunks = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line.startswith("data: {")]
    for key in ("text", "token_ids"):
        assert _joined(chunks, key) == _joined(expected, key)
    assert body.endswith(b"data: [DONE]\n\n")


def _joined(chunks: list[Any], key: str) -> list[Any]:
    return [part for chunk in chunks for choice in chunk["choices"] for part in choice[key]]


def _unchunked(answer: bytes) -> bytes:
    """The body of an answer in chunks, which has to be complete."""
    rest = answer.partition(b"\r\n\r\n")[2]
    parts = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return b"".join(parts)
        parts.append(rest[:length])
        rest = rest[length + 2 :]


def test_a_body_beyond_the_limit_is_refused(server: Server) -> None:
    """Whether its length is told before, or it comes in chunks; the answer can be read all the same."""
    big = b"x" * (17 << 20)
    told = server.ask("POST", "/v1/completions", big)
    connection = server.send("POST /v1/completions HTTP/1.1\nHost: a\nTransfer-Encoding: chunked")
    for start in range(0, len(big), 1 << 20):
        part = big[start : start + (1 << 20)]
        connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
    connection.sendall(b"0\r\n\r\n")

    assert told.status == 413
    assert "--max-body" in told.error["message"]
    assert read_all(connection).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_first_need_not_send_a_body_that_is_too_long(server: Server) -> None:
    connection = server.send(
        f"POST /v1/completions HTTP/1.1\nHost: a\nContent-Length: {10**9}\nExpect: 100-continue\nConnection: close"
    )

    assert read_all(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health HTTP/1.1\nHost: a\nX: " + "y" * 200_000, b"431"),
        ("GET /health HTTP/1.1\n" + "X: y\n" * 40_000 + "Host: a", b"431"),
        ("GET /" + "y" * 200_000 + " HTTP/1.1\nHost: a", b"431"),
        ("nonsense", b"400"),
        ("GET /health HTTP/1.1\nContent-Length: 1\nTransfer-Encoding: chunked", b"400"),
    ],
)
def test_a_head_that_is_too_long_or_none_is_refused(server: Server, head: str, status: bytes) -> None:
    """In the form of all errors."""
    answer = read_all(server.send(head))

    line, _, body = answer.partition(b"\r\n\r\n")
    assert line.split()[1] == status
    assert json.loads(body)["error"]["code"] == int(status)


def test_head_works_where_get_does(server: Server) -> None:
    for path in ("/metrics", "/health", "/ready", "/version", "/v1/models", "/docs"):
        reply = server.ask("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) > 0


def test_a_request_id_is_taken_if_it_is_plain_and_always_told(server: Server) -> None:
    """And it is in the log."""
    taken = server.ask("GET", "/health", headers={"X-Request-Id": "trace/7.a"})
    long = server.ask("GET", "/health", headers={"X-Request-Id": "a" * 129})
    odd = server.ask("GET", "/health", headers={"X-Request-Id": 'a" b'})

    assert taken.headers["x-request-id"] == "trace/7.a"
    assert re.fullmatch(r"[0-9a-f]{32}", long.headers["x-request-id"])
    assert re.fullmatch(r"[0-9a-f]{32}", odd.headers["x-request-id"])
    assert 'event=request id=trace/7.a client=127.0.0.1 method=GET path="/health" status=200' in server.log.read_text()
    assert server.get("/nowhere").headers["x-request-id"]


class _Bounded:
    """A server in this process, whose times are short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol, "HEAD_S", 0.3)
        monkeypatch.setattr(protocol, "IDLE_S", 0.6)
        monkeypatch.setattr(protocol, "STALL_S", 0.3)
        self.sent = 0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while (
                await asyncio.wait_for(send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True}), 5)
            ) is None:
                self.sent += 1
                if self.sent > 10_000:
                    return
                await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def open(self, first: bytes) -> tuple[asyncio.Server, asyncio.StreamReader, asyncio.StreamWriter]:
        config = uvicorn.Config(
            self.app, http=protocol.BoundedProtocol, interface="asgi3", lifespan="off", log_config=None
        )
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol.BoundedProtocol(config, state, {}, loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(first)
        return server, reader, writer


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"", b""),
        (b"GET / HT", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 200 "),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /", b"HTTP/1.1 200 "),
    ],
)
def test_a_connection_on_which_no_request_comes_is_closed(
    monkeypatch: pytest.MonkeyPatch, first: bytes, answer: bytes
) -> None:
    """Also if a byte comes now and then."""

    async def main() -> bytes:
        server, reader, writer = await _Bounded(monkeypatch).open(first)
        try:
            return await asyncio.wait_for(reader.read(), 3)
        finally:
            writer.close()
            server.close()

    got = asyncio.run(main())

    assert got.startswith(answer)
    assert bool(got) == bool(answer)


def test_a_client_that_stops_reading_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the server has sent it no more than the buffers between them hold."""

    async def main() -> int:
        bounded = _Bounded(monkeypatch)
        server, reader, writer = await bounded.open(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.2)
        held = bounded.sent
        await asyncio.sleep(0.6)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1 << 30), 3)
        writer.close()
        server.close()
        return held

    assert asyncio.run(main()) < 1000
