"""An HTTP/1.1 server for anybody: uvicorn in a thread of its own, behind `http_door`.

The endpoint and the edge servers use it alike. Descriptors are counted against the limit of the
system before the first connection comes: without them not even a health check is heard.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import Any, cast, final

import uvicorn
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.transport.descriptors import affordable
from fedsys.transport.http_door import SPARE, Guard, Hall
from fedsys.transport.http_parsers import ByH11
from fedsys.transport.http_places import HttpLimits, Phase

BACKLOG = 4096
"""Connections that may wait in the system until they are taken in."""

_AT_A_TIME = 8  # of these are taken in before those that are in get their turn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def parser() -> type[Any]:
    """Return the `Parser` of connections: by httptools where it is installed."""
    try:
        from fedsys.transport.http_by_httptools import ByHttpTools
    except ImportError:
        return ByH11
    return ByHttpTools


@final
class HttpServer:
    """Serves an ASGI application until it is closed.

    Args:
        app: Answers.
        listening: A socket of `listening_socket`; closed with the server.
        limits: What connections may cost.
        always: Paths that are answered however many requests are in work: those of supervisors.
        drain_s: Longest time for requests in work at the end, in seconds.

    Attributes:
        limits: Those that hold: with fewer places where the system allows fewer descriptors.

    Raises:
        RuntimeFailure: It ends at its start.
    """

    def __init__(
        self,
        app: App,
        listening: socket.socket,
        limits: HttpLimits,
        *,
        always: Callable[[str], bool],
        drain_s: float,
    ) -> None:
        self.limits = replace(limits, connections=affordable(limits.connections, kept=SPARE))
        self._hall, self._parser = Hall(self.limits), parser()
        self._room = _Room(app, self.limits.connections, always)
        self._socket, self._drain_s = listening, drain_s
        self._server = _Server(
            uvicorn.Config(
                cast(Any, self._room),
                http=cast(Any, self._guard),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                backlog=_AT_A_TIME,
                h11_max_incomplete_event_size=2 * self.limits.header_bytes,
                timeout_keep_alive=max(1, round(self.limits.keep_alive_s)),
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="http", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeFailure("the HTTP server ended at its start")
            time.sleep(0.01)
        listening.listen(BACKLOG)

    def _guard(self, **given: Any) -> Guard:
        return Guard(self._parser(**given), self._hall)

    @property
    def requests(self) -> int:
        """How many requests are in work now, with those whose work has not begun."""
        return len(self._server.server_state.tasks)

    def metrics(self, prefix: str) -> Iterator[Metric]:
        """Yield what Prometheus is told of the connections; `prefix` begins each name."""
        yield GaugeMetricFamily(
            f"{prefix}_connection_places", "Connections that there may be.",
            value=self.limits.connections,
        )  # fmt: skip
        phases = self._hall.phases()
        open_ = GaugeMetricFamily(
            f"{prefix}_connections", "Connections by what they do.", labels=["phase"]
        )
        for phase in Phase:
            open_.add_metric([phase], phases[phase])
        yield open_
        gone = CounterMetricFamily(
            f"{prefix}_connections_ended", "Connections that were sent away.", labels=["reason"]
        )
        for reason, count in sorted(self._hall.gone.items()):
            gone.add_metric([reason], count)
        yield gone
        yield CounterMetricFamily(
            f"{prefix}_requests_full", "Requests refused as all places were in work.",
            value=self._room.refused,
        )  # fmt: skip

    def close(self) -> None:
        """Take no more connections, and let requests in work be answered."""
        self._server.should_exit = True
        self._thread.join(self._drain_s + 5)
        self._socket.close()


@final
class ConnectionCollector:
    """What Prometheus is told of the connections of a server.

    Args:
        server: The server.
        prefix: Begins each name.
    """

    def __init__(self, server: HttpServer, prefix: str) -> None:
        self._server, self._prefix = server, prefix

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        return self._server.metrics(self._prefix)


@final
class _Room:
    """Refuses requests while all places are in work, but for those of supervisors."""

    def __init__(self, app: App, places: int, always: Callable[[str], bool]) -> None:
        self._app, self._places, self._always = app, places, always
        self._working = 0
        self.refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._always(scope["path"]):
            await self._app(scope, receive, send)
        elif self._working >= self._places:
            self.refused += 1
            await _answer(send, 503, "all places are taken; ask again later")
        else:
            self._working += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._working -= 1


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@final
class _Server(uvicorn.Server):  # uvicorn offers no option for who handles signals
    """Leaves signals to the command: it ends the endpoint in its own order."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self.serve(sockets))


def listening_socket(argument: str, address: str, host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        argument: Name of the option, for the error.
        address: Its value, for the error.
        host: Name or number of an interface.
        port: 0 for any that is free.

    Raises:
        ConfigError: It cannot be listened on.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns the algorithm of Nagle off only where the protocol is named.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(place)
            made.listen(BACKLOG)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError.of(
            argument, address, f"cannot be listened on ({error})",
            "choose another port; 0 for any",
        ) from error  # fmt: skip
    return made
