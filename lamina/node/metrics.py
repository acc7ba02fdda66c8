"""The metrics of a node: made of its status, and served to Prometheus over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from prometheus_client.metrics_core import Metric

import lamina
from lamina.errors import ConfigError
from lamina.front.meter import RequestMeter
from lamina.metrics import CONTENT_TYPE, build_info, counter, exposition, gauge
from lamina.transport import Address
from lamina.wire.admin import PeerStatus, Status

log = logging.getLogger("lamina.node")

ANSWER_S = 5.0
"""How long one connection may take in all."""
MAX_HEAD = 8192
"""The most bytes of a request."""
MAX_CONNECTIONS = 16
STATES = ("starting", "waiting", "ready", "draining")

Ask = Callable[[], Awaitable[Iterable[Metric]]]
"""Returns the families of this moment."""


# -- what is told


def of_status(status: Status) -> list[Metric]:
    """Return the families that a node of either role has."""
    peers = status.peers
    found = [
        build_info(status.role, status.name, lamina.__version__),
        gauge(
            "lamina_node_state",
            "1 for the state that the node is in, 0 for the others.",
            [({"state": state}, float(state == status.state)) for state in STATES],
        ),
        counter(
            "lamina_busy_seconds_total",
            "Seconds that the node's device has computed.",
            [({"role": status.role}, status.busy_s)],
        ),
        counter("lamina_layers_total", "Attention layers run, over all steps.", status.layers),
        counter("lamina_stale_tags_total", "Writes that came when nothing waited for them.", status.stale_tags),
        counter("lamina_link_bytes_total", "Bytes on the lanes of a link.", _bytes(peers)),
        gauge(
            "lamina_transport_info",
            "The transport that was chosen for the link to a peer; always 1.",
            [({"peer": p.name, "transport": p.transport}, 1) for p in peers],
        ),
    ]
    return found + (_of_compute(status) if status.role == "compute" else _of_memory(status))


def _of_compute(status: Status) -> list[Metric]:
    return [
        counter("lamina_steps_total", "Steps that were run.", status.steps),
        counter(
            "lamina_link_wait_seconds_total",
            "Seconds that steps (decode) or prompts (bulk) have waited for the peer, added up over batches.",
            [
                ({"peer": p.name, "lane": lane}, waited)
                for p in status.peers
                for lane, waited in (("decode", p.waited_s), ("bulk", p.bulk_waited_s))
            ],
        ),
    ]


def _of_memory(status: Status) -> list[Metric]:
    return [
        *_of_cache(status),
        counter(
            "lamina_tenant_busy_seconds_total",
            "Seconds that the device has computed for a tenant.",
            [({"tenant": t.name}, t.busy_s) for t in status.tenants],
        ),
    ]


def _of_cache(status: Status) -> list[Metric]:
    used, total = status.kv_tokens_total - status.kv_tokens_free, status.kv_tokens_total
    return [
        gauge(
            "lamina_kv_tokens",
            "Positions of KV cache: of the whole cluster on the front, of the node's tenants on a memory node.",
            [({"state": "used"}, used), ({"state": "free"}, status.kv_tokens_free)],
        ),
        gauge("lamina_kv_usage_ratio", "Used positions of KV cache, from 0 to 1.", used / total if total else 0.0),
        gauge("lamina_sequences", "Sequences that have space in the KV cache.", status.sequences),
    ]


def of_front(status: Status, meter: RequestMeter) -> list[Metric]:
    """Return the families that only the front has: requests, and how long they take."""
    return [
        *_of_cache(status),
        gauge("lamina_requests_running", "Requests that have space and are computed.", status.requests_running),
        gauge("lamina_requests_waiting", "Requests that wait for admission.", status.requests_waiting),
        counter("lamina_preemptions_total", "How often a request lost its space to others.", status.preemptions),
        counter("lamina_moves_total", "How often blocks of a request moved to another memory node.", status.moves),
        counter("lamina_moved_bytes_total", "Bytes of keys and values that moved.", status.moved_bytes),
        counter("lamina_failed_moves_total", "Moves of which nothing came.", status.failed_moves),
        counter(
            "lamina_redirections_total",
            "How often a request went on on another memory node as its own was full, without a copy.",
            status.redirections,
        ),
        counter(
            "lamina_prefix_tokens_queried_total",
            "Tokens of admitted requests that had to be prefilled or found.",
            status.prompt_tokens,
        ),
        counter(
            "lamina_prefix_tokens_hit_total",
            "Those of them that the memory nodes already held.",
            status.shared_tokens,
        ),
        counter("lamina_prompt_tokens_total", "Tokens of prompts that were answered.", meter.prompt_tokens),
        counter("lamina_generation_tokens_total", "Tokens that were generated.", status.tokens_generated),
        counter(
            "lamina_request_success_total",
            "Requests that were answered whole.",
            [({"finished_reason": reason}, count) for reason, count in meter.finished.items()],
        ),
        counter(
            "lamina_request_failures_total",
            "Requests that failed or were refused, by the class of the error.",
            [({"kind": kind}, count) for kind, count in meter.failed.items()],
        ),
        counter("lamina_requests_cancelled_total", "Requests whose client gave them up.", meter.cancelled),
        counter("lamina_requests_resumed_total", "How often a client came back for an answer.", meter.resumed),
        gauge("lamina_journal_bytes", "Length of the journal of requests.", status.journal_bytes),
        gauge("lamina_journal_failed", "1 while the journal cannot be written.", int(bool(status.journal_failure))),
        meter.queue_time.family("lamina_queue_time_seconds", "Seconds from a request's arrival to its admission."),
        meter.time_to_first_token.family(
            "lamina_time_to_first_token_seconds", "Seconds from a request's arrival to its first token."
        ),
        meter.inter_token_latency.family(
            "lamina_inter_token_latency_seconds", "Seconds between two tokens of a request."
        ),
        meter.latency.family(
            "lamina_e2e_request_latency_seconds", "Seconds from a request's arrival to its last token."
        ),
    ]


def _bytes(peers: list[PeerStatus]) -> list[tuple[dict[str, str], int]]:
    found = []
    for p in peers:
        for direction, whole, bulk in (
            ("sent", p.bytes_sent, p.bulk_sent),
            ("received", p.bytes_received, p.bulk_received),
        ):
            for lane, nbytes in (("decode", whole - bulk), ("bulk", bulk)):
                found.append(({"peer": p.name, "direction": direction, "lane": lane}, nbytes))
    return found


# -- how it is served


@asynccontextmanager
async def served(address: Address | None, ask: Ask) -> AsyncIterator[None]:
    """Answer GET /metrics at ``address`` on this loop with what ``ask`` returns. None: serve nothing.

    ConfigError if the address cannot be had.
    """
    if address is None:
        yield
        return
    page = _Page(ask)
    try:
        server = await asyncio.start_server(page.answer, address.host, address.port, limit=MAX_HEAD)
    except OSError as e:
        raise ConfigError(f"metrics: {address} cannot be listened at: {e.strerror}; choose another port") from e
    log.info("event=metrics address=http://%s/metrics", str(address).removeprefix("tcp://"))
    try:
        yield
    finally:
        server.close()
        await page.close()


class _Page:
    """Answers one request per connection, within a bounded time, on a bounded number of connections."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._answering: set[asyncio.Task[None]] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._answering) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            async with asyncio.timeout(ANSWER_S):
                writer.write(await self._response(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.transport.abort()  # without effect on one that is closed
            self._answering.discard(task)

    async def close(self) -> None:
        """End all connections."""
        tasks = list(self._answering)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which their transports close

    async def _response(self, head: bytes) -> bytes:
        method, path, *_ = [*head.split(b"\r\n", 1)[0].split(b" "), b"", b""]
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "only GET is answered here")
        if path.split(b"?")[0] != b"/metrics":
            return _response("404 Not Found", "metrics are at /metrics")
        body = exposition(await self._ask())
        return _response("200 OK", b"" if method == b"HEAD" else body, CONTENT_TYPE)


def _response(status: str, body: str | bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    content = body if isinstance(body, bytes) else f"{body}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return head.encode() + content
