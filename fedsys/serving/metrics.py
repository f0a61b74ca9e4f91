"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ESTIMATED = ("latency_ms", "accuracy", "downtime_ms")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class Metrics:
    """Counters of one endpoint, and what its engine says of itself.

    Args:
        status: Of the engine; numbers and truth values at its top become gauges.
        waiting: Images in the queue.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]], waiting: Callable[[], int]) -> None:
        self._status, self._waiting, self._started = status, waiting, time.time()
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fedsys_serving_requests", "Requests for inference, by the status of the answer.",
            ["status"], registry=self.registry,
        )  # fmt: skip
        self._answers = Counter(
            "fedsys_serving_images", "Images that were answered, by what answered.",
            ["by"], registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "fedsys_serving_seconds", "From the arrival of a request to its answer.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "fedsys_serving_batch", "Images in the batch of a request.",
            buckets=_ROWS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def answered(self, by: str, rows: int, batch: int, seconds: float) -> None:
        """Count an answer."""
        self._answers.labels(by).inc(rows)
        self._batches.observe(batch)
        self._seconds.observe(seconds)

    def ended(self, status: int) -> None:
        """Count a request by the status of its answer."""
        self._requests.labels(str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield what is so at this moment."""
        yield _gauge("started_seconds", "Start, in seconds since 1970.", self._started)
        yield _gauge("waiting_images", "Images in the queue.", self._waiting())
        status = self._status()
        for name, value in status.items():
            if isinstance(value, int | float):
                yield _gauge(name, "As the status of the engine says.", float(value))
        by = status.get("variant")
        if by is not None:
            info = GaugeMetricFamily(
                "fedsys_serving_variant", "What answers now.", labels=["variant"]
            )
            info.add_metric([str(by)], 1.0)
            yield info
        yield from _of_chain(status)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


def _of_chain(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield which hosts of a chain are used, and which technique stands in for lost ones."""
    rows = [row for row in status.get("chain", ()) if "state" in row]
    if not rows:
        return
    states = GaugeMetricFamily(
        "fedsys_serving_host", "State of a host of the chain.", labels=["host", "state"]
    )
    for row in rows:
        states.add_metric([row["host"], row["state"]], 1.0)
    yield states
    technique = GaugeMetricFamily(
        "fedsys_serving_technique", "What stands in for lost hosts.", labels=["technique", "route"]
    )
    technique.add_metric([status["technique"], status["route"]], 1.0)
    yield technique
    events = CounterMetricFamily(
        "fedsys_serving_recovery_events", "Losses, decisions, returns.", labels=["event"]
    )
    for kind, count in status["event_counts"].items():
        events.add_metric([kind], float(count))
    yield events
    expected = GaugeMetricFamily(
        "fedsys_serving_estimate", "Of the technique in force: ms, or a share of right answers.",
        labels=["quantity"],
    )  # fmt: skip
    for key in _ESTIMATED if status["estimate"] else ():
        expected.add_metric([key], float(status["estimate"][key]))
    yield expected


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fedsys_serving_{name}", text, value=value)
