"""What an edge server tells over HTTP: ``/health`` for supervisors, ``/metrics`` for Prometheus.

Neither tells names, tokens or contents. The server is that of the standard library in threads; it
answers two kinds of GET and reads nothing else.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer

from fedsys.errors import ConfigError
from fedsys.offload.edge import EdgeServer

READ_S = 10.0
"""How long a peer may take to send its request, in seconds."""

_COUNTED = {
    "opened": "Sessions that a server app opened.",
    "released": "Sessions that ended.",
    "steps": "Optimizer steps.",
    "bytes_in": "Bytes of frames from devices.",
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


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fedsys_edge_{name}", text, value=value)


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
        registry = CollectorRegistry()
        registry.register(EdgeCollector(edge))
        metrics = make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO")
            if path == "/metrics":
                body: Iterable[bytes] = metrics(environ, start)
                return body
            known = path == "/health"
            text = {"status": "ok", "sessions": len(edge.sessions)} if known else {"status": "?"}
            status = "200 OK" if known else "404 Not Found"
            start(status, [("Content-Type", "application/json")])
            return [json.dumps(text).encode()]

        try:
            self._server = make_server(host, int(port), answer, ThreadingWSGIServer, _Quiet)
        except OSError as error:
            raise ConfigError.of(
                "edge.http", place, f"cannot be listened on ({error.strerror or error})",
                "choose another port, 0 for any, or null to turn it off",
            ) from error  # fmt: skip
        self.address = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="edge http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Quiet(WSGIRequestHandler):
    """Does not print a line for each request, and does not wait for ever for one."""

    timeout = READ_S

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
