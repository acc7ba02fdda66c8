"""Clients that mean harm: what they do is refused in bounded time and memory, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig
from lamina.errors import HttpError
from lamina.serve import exchange
from lamina.serve.exchange import BodyRoom, Exchange
from tests import harness
from tests.serve.conftest import Server, read_all, serving

OTHERS_S = 3.0
"""How long others wait for an answer at most, on a machine that does other things."""


@pytest.fixture(scope="module")
def victim(cluster: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, as what is done to it may leave it large."""
    with serving(cluster, tmp_path_factory.mktemp("victim") / "serve.log") as server:
        server.ready()
        yield server
        assert "internal_error" not in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def resident(pid: int) -> int:
    """The bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


def cpu_s(pid: int) -> float:
    """The processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(server: Server) -> int:
    """The number of descriptors of the server."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def require_others_served(server: Server) -> None:
    """Fail unless somebody else gets an answer soon."""
    begun = time.monotonic()
    assert server.get("/health").status == 200
    assert server.complete(prompt="Once upon", max_tokens=2).status == 200
    assert time.monotonic() - begun < OTHERS_S


# -- bodies


@pytest.mark.parametrize("unit", [b"[],", b'{"a":1},', b"[[1]],"])
def test_a_body_of_millions_of_lists_is_refused_before_it_is_read(server: Server, unit: bytes) -> None:
    """As reading it would take seconds, in which nobody else is served."""
    body = b'{"metadata": {"a": [' + unit * ((15 << 20) // len(unit)) + b"1]}}"
    before = cpu_s(server.process.pid)
    reply = server.ask("POST", "/v1/completions", body)

    assert reply.status == 400
    assert "opening brackets; the limit is 262144" in reply.error["message"]
    assert cpu_s(server.process.pid) - before < 0.5


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for whose body there is no room is told to come again; the others are not harmed, and what ended makes
    room."""
    monkeypatch.setattr(exchange, "MAX_BODIES", 250)
    room = BodyRoom(100)

    def asked(nbytes: int) -> Exchange:
        parts = [{"type": "http.request", "body": b"x" * nbytes, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return parts.pop()

        async def send(message: dict[str, Any]) -> None:
            raise AssertionError(message)

        return Exchange({"headers": [], "lamina.id": "1"}, receive, send, max_body=100, room=room)

    async def main() -> None:
        first, second, third = asked(100), asked(100), asked(100)
        assert len(await first.body()) == len(await second.body()) == 100
        with pytest.raises(HttpError, match="the limit; retry") as refused:
            await third.body()
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1.0)
        third.end()
        first.end()
        first.end()
        assert len(await asked(100).body()) == 100
        with pytest.raises(HttpError):
            await asked(100).body()

    asyncio.run(main())


@pytest.mark.parametrize(("pause_s", "slowest"), [(0.05, 1 << 14), (0.5, 1)])
def test_a_file_that_comes_too_slowly_is_refused(monkeypatch: pytest.MonkeyPatch, pause_s: float, slowest: int) -> None:
    """If bytes only trickle, or do not come at all for a while."""
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    monkeypatch.setattr(exchange, "SLOWEST", slowest)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    async def main() -> None:
        slow = Exchange({"headers": [], "lamina.id": "1"}, receive, send, max_body=100)
        with pytest.raises(HttpError, match="send at least") as refused:
            async for _ in slow.chunks(1 << 20):
                pass
        assert refused.value.status == 408

    begun = time.monotonic()
    asyncio.run(main())

    assert time.monotonic() - begun < 2


@pytest.mark.slow
def test_many_long_bodies_take_no_more_than_a_bound(victim: Server) -> None:
    """Forty clients send 100 MB each and never end; memory is bounded, and others are served."""
    before = resident(victim.process.pid)
    connections, refused = [], 0
    piece = b"x" * (1 << 20)
    for _ in range(40):
        connection = victim.send(f"POST /v1/completions HTTP/1.1\nHost: a\nContent-Length: {100 << 20}")
        connection.settimeout(5)
        connections.append(connection)
        try:
            for _ in range(15):
                connection.sendall(piece)
        except OSError:
            refused += 1
    grown = resident(victim.process.pid) - before
    assert grown < exchange.MAX_BODIES * 5 // 4, grown
    heads = []
    for connection in connections:
        connection.settimeout(0.05)
        try:
            heads.append(connection.recv(12))
        except OSError:
            heads.append(b"")
        connection.close()

    assert heads.count(b"HTTP/1.1 503") + refused >= 20
    assert set(heads) <= {b"HTTP/1.1 503", b""}
    require_others_served(victim)


# -- connections


@pytest.mark.slow
def test_thousands_of_idle_connections_harm_nobody(victim: Server) -> None:
    """And their descriptors come back."""
    before, memory = descriptors(victim), resident(victim.process.pid)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    try:
        connections = [victim.connect() for _ in range(3000)]
        require_others_served(victim)
        assert resident(victim.process.pid) - memory < 100 << 20
        for connection in connections:
            connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    deadline = time.monotonic() + 30
    while descriptors(victim) > before:
        assert time.monotonic() < deadline, (descriptors(victim), before)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_without_descriptors_comes_back(cluster: ClusterConfig, tmp_path: Path) -> None:
    """When the connections that took them are gone."""
    with serving(cluster, tmp_path / "serve.log") as server:
        server.ready()
        limit = descriptors(server) + 20
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        used = cpu_s(server.process.pid)
        connections = [server.connect() for _ in range(60)]
        time.sleep(3)
        assert cpu_s(server.process.pid) - used < 1.5  # it does not try again and again
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + 30
        while True:
            try:
                require_others_served(server)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_clients_that_send_a_byte_now_and_then_are_cut_off(victim: Server) -> None:
    """Heads and bodies have to be there in time. Others are served while hundreds of such clients are there."""
    heads = [victim.connect() for _ in range(200)]
    bodies = [victim.send("POST /v1/completions HTTP/1.1\nHost: a\nContent-Length: 10000") for _ in range(200)]
    alive, ends = {*heads, *bodies}, {}
    for connection in heads:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
    for connection in alive:
        connection.setblocking(False)
    begun = time.monotonic()
    while alive and time.monotonic() - begun < 90:
        time.sleep(1)
        for connection in list(alive):
            try:
                if answer := connection.recv(1 << 16):
                    ends[connection] = (answer[:12], time.monotonic() - begun)
                connection.close()
                alive.discard(connection)
            except BlockingIOError:
                try:
                    connection.send(b"a")
                except OSError:
                    alive.discard(connection)
            except OSError:
                alive.discard(connection)
        if 5 < time.monotonic() - begun < 10:
            require_others_served(victim)

    assert not alive
    assert sum(ends[c][0] == b"HTTP/1.1 408" for c in heads if c in ends) > 150
    assert sum(ends[c][0] == b"HTTP/1.1 408" for c in bodies if c in ends) > 150
    assert max(at for c, (_, at) in ends.items() if c in set(heads)) < 25
    assert max(at for _, at in ends.values()) < 75


def test_requests_that_come_all_at_once_on_one_connection_are_answered_in_order(server: Server) -> None:
    """Those that generate and others; a connection that then asks for its end gets it."""
    body = json.dumps({"prompt": "Once", "max_tokens": 2, "temperature": 0, "stream": True}).encode()
    complete = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    simple = b"GET /version HTTP/1.1\r\nHost: a\r\nX-Request-Id: %d\r\n\r\n"
    asked = b"".join(
        simple % (2 * i) + complete.replace(b"Host: a", b"X-Request-Id: %d" % (2 * i + 1)) for i in range(30)
    )
    connection = server.connect()
    connection.sendall(asked + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    answer = read_all(connection)

    ids = [int(id_) for id_ in re.findall(rb"x-request-id: (\d{1,2})\r", answer)]
    assert ids == list(range(60))
    assert answer.count(b"HTTP/1.1 200") == 61
    assert answer.count(b"data: [DONE]") == 30


# -- constraints


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


_DOUBLING = {
    "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(24)}
    | {"d24": {"type": "string"}},
    "$ref": "#/$defs/d0",
}
_PRODUCT = {
    "allOf": [{"anyOf": [{"type": "string", "pattern": f"^{a}{i}"} for a in "abcdefgh"]} for i in range(12)],
}
BOMBS: dict[str, dict[str, Any]] = {
    "a loop of references": {"json": {"$ref": "#"}},
    "references that double": {"json": _DOUBLING},
    "a product of choices": {"json": _PRODUCT},
    "20 levels": {"json": _deep(20)},
    "thousands of levels in a text": {"json": json.dumps(_deep(20)).replace('{"type": "string"}', '{"not":' * 5000)},
    "a long string": {"json": {"type": "string", "minLength": 10**9, "maxLength": 10**9}},
    "a long list": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**7}},
    "a large number": {"json": {"type": "integer", "minimum": 10**300, "maximum": 10**301}},
    "a small step": {"json": {"type": "number", "multipleOf": 1e-300}},
    "many properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    "many choices": {"json": {"enum": [f"value {i}" for i in range(20_000)]}},
    "repeats of repeats": {"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    "one long repeat": {"regex": "[a-z]{1,1000000}"},
    "nested stars": {"regex": "((((a*)*)*)*)*b"},
    "many alternatives": {"regex": "|".join(f"{i}x*" for i in range(2000))},
    "deep groups": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "intersections": {"regex": ".*".join("abcdefghijklmnop") + "(?=a)"},
    "an ambiguous grammar": {"grammar": 'start: start start | "a" | start start start\n'},
    "a grammar without an end": {"grammar": 'start: "a" start\n'},
    "a grammar of many rules": {
        "grammar": "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "a"\n' for i in range(3000)) + 'r3000: "b"\n'
    },
    "many texts": {"choice": [f"{i} {'x' * 200}" for i in range(1000)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BOMBS))
def test_a_constraint_that_is_made_to_explode_is_answered_or_refused(
    victim: Server, cluster: ClusterConfig, name: str
) -> None:
    """Within the time that a constraint may take to compile; nobody else waits for it, and the front stays small."""
    pid = asyncio.run(harness.status_of(cluster, cluster.front)).pid
    before = resident(pid)
    begun = time.monotonic()
    asked = {"prompt": "Once", "max_tokens": 3, "temperature": 0, "structured_outputs": BOMBS[name]}
    connection = victim.post("/v1/completions", asked)
    connection.settimeout(60)
    require_others_served(victim)
    answer = connection.recv(1 << 16)
    connection.close()

    assert answer[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400"), answer
    assert time.monotonic() - begun < 40
    assert resident(pid) - before < 700 << 20


def test_a_connection_that_upgrades_is_answered_plainly(server: Server) -> None:
    """There are neither WebSockets nor HTTP/2."""
    for upgrade in ("websocket", "h2c"):
        connection = server.send(
            f"GET /health HTTP/1.1\nHost: a\nConnection: Upgrade, close\nUpgrade: {upgrade}\nHTTP2-Settings: AAMAAABk"
        )
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    connection = server.connect()
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 400 ")
