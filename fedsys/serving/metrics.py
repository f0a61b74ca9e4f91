"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ESTIMATED = ("latency_ms", "accuracy", "downtime_ms")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class _Tally:
    """A histogram that costs a request a microsecond; those of prometheus_client cost ten."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self) -> Metric:
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, itertools.accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._text, buckets, self._sum)


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
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._answers: Counter[str] = Counter()
        self._seconds = _Tally(
            "fedsys_serving_seconds", "From the arrival of a request to its answer.", _SECONDS
        )
        self._batches = _Tally("fedsys_serving_batch", "Images in the batch of a request.", _ROWS)
        self.registry.register(self)

    def answered(self, by: str, rows: int, batch: int, seconds: float) -> None:
        """Count an answer."""
        with self._lock:
            self._answers[by] += rows
            self._batches.add(batch)
            self._seconds.add(seconds)

    def ended(self, status: int) -> None:
        """Count a request by the status of its answer."""
        with self._lock:
            self._requests[status] += 1

    def _counted(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "fedsys_serving_requests", "Requests for inference, by the status of the answer.",
            labels=["status"],
        )  # fmt: skip
        answers = CounterMetricFamily(
            "fedsys_serving_images", "Images that were answered, by what answered.", labels=["by"]
        )
        with self._lock:
            for status, count in self._requests.items():
                requests.add_metric([str(status)], count)
            for by, rows in self._answers.items():
                answers.add_metric([by], rows)
            yield from (requests, answers, self._seconds.metric(), self._batches.metric())

    def collect(self) -> Iterator[Metric]:
        """Yield what is so at this moment."""
        yield from list(self._counted())
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
