"""What this process counts, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPEN_METRICS
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """Holds the counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lamina_http_requests", "HTTP requests answered.", ["endpoint", "status"], registry=registry
        )
        self.running = Gauge("lamina_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self.first_token = Histogram(
            "lamina_http_time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer.",
            buckets=_LONG,
            registry=registry,
        )
        self.next_token = Histogram(
            "lamina_http_inter_token_latency_seconds",
            "From one token of an answer to the next.",
            buckets=_SHORT,
            registry=registry,
        )
        self.whole = Histogram(
            "lamina_http_request_seconds",
            "From the arrival of a request that generates to the end of its answer.",
            buckets=_LONG,
            registry=registry,
        )
        self.prompt_tokens = Counter("lamina_http_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("lamina_http_generated_tokens", "Tokens of answers.", registry=registry)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all counters as text, and the type of that, for a client that accepts ``accept``."""
        if "application/openmetrics-text" in accept:
            return open_metrics(self.registry), OPEN_METRICS
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
