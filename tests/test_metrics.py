"""What counts without a lock, what is documented, and the little HTTP server of a node's metrics."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from lamina.cluster.local import free_ports
from lamina.errors import ConfigError
from lamina.front.meter import RequestMeter
from lamina.metrics import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram, exposition
from lamina.node import metrics
from lamina.transport import Address
from lamina.wire.admin import PeerStatus, Status, TenantStatus

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


@pytest.mark.parametrize("bounds", [TOKEN_BUCKETS, REQUEST_BUCKETS])
def test_a_histogram_counts_each_duration_once(bounds: tuple[float, ...]) -> None:
    """In the first bucket whose bound is not below it; the buckets that Prometheus sees add up."""
    histogram = Histogram(bounds)
    durations = [0.0, bounds[0], bounds[0] * 1.01, bounds[-1], bounds[-1] + 1]
    for duration in durations:
        histogram.observe(duration)

    (family,) = text_string_to_metric_families(
        exposition([histogram.family("x_seconds", "x")]).decode().split("# HELP p")[0]
    )
    buckets = {float(s.labels["le"]): s.value for s in family.samples if s.name == "x_seconds_bucket"}
    assert buckets == {bound: sum(duration <= bound for duration in durations) for bound in (*bounds, float("inf"))}
    assert histogram.count == len(durations)
    assert histogram.sum_s == pytest.approx(sum(durations))


def test_a_token_costs_next_to_nothing() -> None:
    """Less than 2 µs for an observation even on a slow and busy machine, at best of many."""
    histogram = Histogram(TOKEN_BUCKETS)

    def once() -> float:
        begun = time.perf_counter()
        for _ in range(1000):
            histogram.observe(0.02)
        return (time.perf_counter() - begun) / 1000

    assert min(once() for _ in range(20)) < 2e-6


def _documented(*headings: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The rows of the page under these headings: type and labels of each metric."""
    found = {}
    for heading, text in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if heading in headings:
            for name, kind, labels in re.findall(r"^\| `(lamina_\w+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE):
                found[name] = kind, frozenset(re.findall(r"`(\w+)`", labels))
    return found


def _exposed(families: list[Metric]) -> dict[str, tuple[str, frozenset[str]]]:
    """The same of what a node says."""
    found = {}
    for family in text_string_to_metric_families(exposition(families).decode()):
        if family.name.startswith("lamina"):
            name = family.name + "_total" * (family.type == "counter")
            labels = frozenset(key for sample in family.samples for key in sample.labels) - {"le"}
            found[name] = family.type, labels
    return found


PEER = PeerStatus(name="x", transport="tcp", choice="", kv_heads=1, bytes_sent=3, bytes_received=2, bulk_sent=1)
TENANT = TenantStatus(
    name="t", model="", compute_nodes=[], sequences=0, kv_tokens_total=1, kv_tokens_free=1, quota=1, busy_s=1.0
)
COMPUTE = Status(name="c0", role="compute", state="ready", peers=[PEER])
MEMORY = Status(name="m0", role="memory", state="ready", peers=[PEER], tenants=[TENANT])


def test_every_metric_is_documented() -> None:
    """The page has a row for each metric of each kind of node, with its type and labels, and no other rows."""
    common = _documented("All nodes")
    follower = common | _documented("Compute nodes")
    assert len(follower) > 5
    assert _exposed(metrics.of_status(COMPUTE)) == follower
    assert _exposed(metrics.of_status(COMPUTE) + metrics.of_front(COMPUTE, RequestMeter())) == follower | _documented(
        "The front"
    )
    assert _exposed(metrics.of_status(MEMORY)) == common | _documented("Memory nodes")


# -- over HTTP


async def _ask_status() -> list[Metric]:
    return metrics.of_status(COMPUTE)


def serving(talk: Callable[[Address], Awaitable[None]]) -> None:
    async def main() -> None:
        address = Address("tcp", "127.0.0.1", free_ports(1)[0])
        async with metrics.served(address, _ask_status):
            await talk(address)

    asyncio.run(main())


async def say(address: Address, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics", 200),
        ("HEAD /metrics", 200),
        ("GET /metrics?name[]=x", 200),
        ("GET /", 404),
        ("POST /metrics", 405),
        ("", 405),
    ],
)
def test_only_get_metrics_is_answered(request_line: str, status: int) -> None:
    """Everything else gets a status that says what is wrong; HEAD gets no body."""

    async def talk(address: Address) -> None:
        head, _, body = (await say(address, f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(
            b"\r\n\r\n"
        )
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"lamina_build_info" in body) == request_line.startswith("GET /metrics")
        assert bool(body) != request_line.startswith("HEAD")

    serving(talk)


def test_a_slow_or_endless_request_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a bounded time, and after a bounded number of bytes; others are answered meanwhile."""
    monkeypatch.setattr(metrics, "ANSWER_S", 0.3)

    async def talk(address: Address) -> None:
        slow = asyncio.ensure_future(say(address, b"GET /metrics HTTP/1.1\r\n"))
        endless = asyncio.ensure_future(say(address, b"GET /" + b"x" * 100_000))
        assert b"200 OK" in await say(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        found = await asyncio.wait_for(asyncio.gather(slow, endless, return_exceptions=True), 10)
        assert [answer for answer in found if isinstance(answer, bytes) and answer] == []

    serving(talk)


def test_connections_are_bounded() -> None:
    """One too many is closed at once."""

    async def talk(address: Address) -> None:
        held = [await asyncio.open_connection(address.host, address.port) for _ in range(metrics.MAX_CONNECTIONS)]
        with suppress(ConnectionError):
            assert await say(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        held.pop()[1].close()
        await asyncio.sleep(0.05)
        assert b"200 OK" in await say(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        for _, writer in held:
            writer.close()

    serving(talk)


def test_an_address_that_is_taken_is_named() -> None:
    """In one sentence, with what to do."""

    async def talk(address: Address) -> None:
        with pytest.raises(ConfigError, match=rf"metrics: {address} cannot be listened at: .*; choose another port"):
            async with metrics.served(address, _ask_status):
                pass

    serving(talk)
