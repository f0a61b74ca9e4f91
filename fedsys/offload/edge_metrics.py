"""What an edge server tells over HTTP: ``/health`` for supervisors, ``/metrics`` for Prometheus.

Neither tells names, tokens or contents. The server is that of the endpoint with limits of its own
(`fedsys.transport.http_server`): whoever opens connections and says nothing shuts nobody out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedsys.errors import ConfigError
from fedsys.offload.edge import EdgeServer
from fedsys.offload.worker_usage import WorkerUsage
from fedsys.transport.http_places import HttpLimits
from fedsys.transport.http_server import (
    ConnectionCollector,
    HttpServer,
    Receive,
    Scope,
    Send,
    listening_socket,
)
from fedsys.transport.strangers import Census

LIMITS = HttpLimits(connections=64)
"""A supervisor or two ask at a time; descriptors are for links."""

DRAIN_S = 1.0

_COUNTED = {
    "opened": "Sessions that a server app opened.",
    "released": "Sessions that ended.",
    "steps": "Optimizer steps.",
    "bytes_in": "Bytes of frames from devices.",
    "workers_lost": "Worker processes that ended before they should.",
}


class EdgeCollector:
    """The state and the counters of an edge server as Prometheus's metrics.

    Args:
        edge: The edge server.
    """

    def __init__(self, edge: EdgeServer) -> None:
        self._edge, self._started = edge, time.time()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        edge = self._edge
        yield _gauge("started_seconds", "Start, in seconds since 1970.", self._started)
        yield _gauge("sessions", "Sessions that are open.", len(edge.sessions))
        yield _gauge("session_bytes", "Weights and optimizer state in bytes.", edge.session_bytes)
        yield from _links(edge.census())
        yield from _workers(edge.workers_usage())
        counters = dict(edge.counters)
        for name, text in _COUNTED.items():
            yield CounterMetricFamily(f"fedsys_edge_{name}", text, value=counters.get(name, 0))
        refused = CounterMetricFamily(
            "fedsys_edge_refused", "Links and requests that were refused.", labels=["reason"]
        )
        for name, count in sorted(counters.items()):
            if name.startswith("refused_"):
                refused.add_metric([name.removeprefix("refused_")], count)
        yield refused


def _links(census: Census) -> Iterator[Metric]:
    places = GaugeMetricFamily(
        "fedsys_edge_link_places", "Links that there may be, by whose.", labels=["whose"]
    )
    links = GaugeMetricFamily("fedsys_edge_links", "Links, by whose.", labels=["whose"])
    for whose, count, most in (
        ("known", census.known, census.known_places),
        ("strangers", census.strangers, census.strangers_places),
    ):
        links.add_metric([whose], count)
        places.add_metric([whose], most)
    yield from (places, links)
    ended = CounterMetricFamily(
        "fedsys_edge_links_ended", "Connections that were sent away.", labels=["reason"]
    )
    for reason, number in sorted(census.ended.items()):
        ended.add_metric([reason], number)
    yield ended


def _workers(usage: WorkerUsage) -> Iterator[Metric]:
    """Yield what worker processes take: it is not in the figures of this process."""
    yield _gauge("workers", "Worker processes; 0: sessions compute in this one.", usage.processes)
    yield CounterMetricFamily(
        "fedsys_edge_workers_cpu_seconds", "Processor time of those that live.", value=usage.cpu_s
    )
    yield _gauge(
        "workers_resident_memory_bytes", "Their memory; what they share counts for each.",
        usage.resident_bytes,
    )  # fmt: skip


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fedsys_edge_{name}", text, value=value)


@final
class MetricsEndpoint:
    """Serves ``/health`` and ``/metrics`` of an edge server until it is closed.

    Args:
        edge: The edge server.
        place: ``host:port``; port 0: any that is free.

    Attributes:
        address: As ``http://host:port``.

    Raises:
        ConfigError: `place` has another form, or cannot be listened on.
    """

    def __init__(self, edge: EdgeServer, place: str) -> None:
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError.of("edge.http", place, "must be host:port", "null turns it off")
        self._edge, self._registry = edge, CollectorRegistry()
        listening = listening_socket("edge.http", place, host.strip("[]"), int(port))
        self.address = f"http://{host}:{listening.getsockname()[1]}"
        self._server = HttpServer(
            self._app, listening, LIMITS, always=lambda path: True, drain_s=DRAIN_S
        )
        self._registry.register(EdgeCollector(edge))
        # gRPC tells nobody of connections without a stream; their descriptors are seen.
        ProcessCollector(namespace="fedsys_edge", registry=self._registry)
        self._registry.register(ConnectionCollector(self._server, "fedsys_edge_http"))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, kind, body = self._answer(scope["path"])
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/health":
            tree: Any = {"status": "ok", "sessions": len(self._edge.sessions)}
            return 200, "application/json", json.dumps(tree).encode()
        return 404, "application/json", json.dumps({"status": "?"}).encode()

    def close(self) -> None:
        """Stop answering."""
        self._server.close()
