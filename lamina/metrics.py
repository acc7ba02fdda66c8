"""Metrics in the format of Prometheus: what counts without a lock, and how it is written out.

What happens often is counted in plain numbers by the loop that it happens on. Families for `prometheus_client` are made
of them only when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `exposition` returns."""

TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds, in seconds, for the time between two tokens."""
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
"""Upper bounds, in seconds, for what a request waits for and takes."""

Labels = Mapping[str, str]
Values = float | Sequence[tuple[Labels, float]]
"""One value without labels, or several with the same label names."""


class Histogram:
    """Counts durations in fixed buckets. It belongs to one loop; an observation is one search and two additions."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """How many durations each bucket has, without those of the buckets before it; the last has no bound."""
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Return how many durations were counted."""
        return sum(self.counts)

    def family(self, name: str, text: str) -> Metric:
        """Return the histogram as Prometheus knows it."""
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.sum_s)


def counter(name: str, text: str, values: Values) -> Metric:
    """Return a family of counters; ``name`` ends in ``_total``."""
    return _filled(CounterMetricFamily, name, text, values)


def gauge(name: str, text: str, values: Values) -> Metric:
    """Return a family of gauges."""
    return _filled(GaugeMetricFamily, name, text, values)


def _filled(kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, text: str, values: Values) -> Metric:
    if isinstance(values, int | float):
        return kind(name, text, value=float(values))
    names = list(values[0][0]) if values else []
    family = kind(name, text, labels=names)
    for labels, value in values:
        family.add_metric([labels[key] for key in names], float(value))
    return family


def build_info(role: str, name: str, version: str) -> Metric:
    """Return what names a process: its role, its name in the cluster file, its version."""
    labels = {"role": role, "node": name, "version": version}
    return gauge("lamina_build_info", "The process that is asked, and its version of Lamina; always 1.", [(labels, 1)])


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(families: Iterable[Metric]) -> bytes:
    """Write families out, and after them those of this process: its processor time, memory and open files."""
    registry = CollectorRegistry()
    registry.register(_Given(families))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
