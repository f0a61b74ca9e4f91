"""The endpoint: HTTP, and gRPC beside it, around an `Engine`: the Open Inference Protocol.

::

    GET  /v2  /v2/health/live  /v2/health/ready
    GET  /v2/models/NAME[/versions/1][/ready]
    POST /v2/models/NAME[/versions/1]/infer     `fedsys.serving.v2`, or one image/png, image/jpeg
    GET  /status  /metrics                      for people and for Prometheus

The HTTP server runs in a thread of its own (`fedsys.transport.http_server`); quick requests are
computed in it (`turns`), others in threads of their own (`batching`). Bodies are read up to their
limit and within one limit of memory (`bodies`), a request that takes too long is given up, and an
error of one is told to it alone.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError, RequestError
from fedsys.files import json_text
from fedsys.serving import v2
from fedsys.serving.batching import Batcher, BatchLimits, Served
from fedsys.serving.bodies import Bodies
from fedsys.serving.engine import Array, Engine
from fedsys.serving.metrics import Metrics
from fedsys.serving.reading import Reader
from fedsys.serving.turns import LoopTurns
from fedsys.transport.http_places import HttpLimits
from fedsys.transport.http_server import (
    ConnectionCollector,
    HttpServer,
    Receive,
    Scope,
    Send,
    listening_socket,
)

if TYPE_CHECKING:
    from fedsys.serving.grpc_entry import GrpcEntry

_FEW = 4096  # numbers of an answer that are written without a thread
_CLOSE = {"Connection": "close"}
_WATCHED = ("/v2/health/live", "/v2/health/ready", "/metrics")

_JSON, _RAW = b"application/json", b"application/octet-stream"

Handler = Callable[[Request], Awaitable[Response]]


@final
class Answered:
    """The answer to a request, as an ASGI application; a response of Starlette takes 20 µs more.

    Args:
        content: JSON, and raw tensors behind it.
        by: What answered.
        head: Length of the JSON; None if nothing follows it.
    """

    status_code = 200

    def __init__(self, content: bytes, by: str, head: int | None) -> None:
        self._content = content
        self._headers = [
            (b"fedsys-variant", by.encode("latin-1", "replace")),
            (b"content-length", str(len(content)).encode()),
            (b"content-type", _JSON if head is None else _RAW),
        ]
        if head is not None:
            self._headers.append((v2.HEADER_LENGTH.lower().encode(), str(head).encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._content})


@final
class Endpoint:
    """Serves an engine over HTTP, and over gRPC if an address is given, until it is closed.

    Args:
        engine: Computes the answers; closed with the endpoint.
        options: Address and limits.

    Attributes:
        address: As ``http://host:port``.

    Raises:
        ConfigError: The address has another form or cannot be listened on. What was opened is
            closed, and the engine is not.
    """

    def __init__(self, engine: Engine, options: ServingConfig) -> None:
        self._engine, self._options, self._draining = engine, options, False
        self._grpc: GrpcEntry | None = None
        with ExitStack() as opened:  # what is open if the rest cannot be
            listening, self.address = listen(options.address)
            opened.callback(listening.close)
            limits = BatchLimits(options.max_batch, options.max_delay_ms, options.max_queue)
            self._batcher = Batcher(engine, limits)
            opened.callback(self._batcher.close, 0.0)
            self._turns = LoopTurns(self._batcher, lambda: self._server.requests <= 1)
            self._bodies = Bodies(options)
            self._reader = Reader(engine.card, options)
            opened.callback(self._reader.close)
            self.metrics = Metrics(engine.status, lambda: self._batcher.waiting)
            path = f"/v2/models/{options.name}"
            self._inferring = {f"{path}/infer", f"{path}/versions/{v2.VERSION}/infer"}
            self._routed = self.application()
            self._server = HttpServer(
                self._enter,
                listening,
                HttpLimits(options.max_connections, options.max_header_bytes, options.header_s),
                always=_is_supervisors,
                drain_s=options.drain_s,
            )
            opened.callback(self._server.close)
            self.metrics.registry.register(ConnectionCollector(self._server, "fedsys_serving"))
            self.metrics.registry.register(self._bodies)
            self.metrics.registry.register(self._reader)
            if options.grpc is not None:
                from fedsys.serving.grpc_entry import GrpcEntry  # brings gRPC

                self._grpc = GrpcEntry(engine, self._batcher, options, self.metrics)
            opened.pop_all()

    @property
    def grpc_address(self) -> str | None:
        """Where it answers over gRPC, as ``grpc://host:port``; None if it does not."""
        return None if self._grpc is None else self._grpc.address

    @property
    def places(self) -> int:
        """Connections that there may be: fewer than asked for where descriptors are short."""
        return self._server.limits.connections

    def close(self) -> None:
        """Take no more requests, finish those in work, and end the engine."""
        self._draining = True
        if self._grpc is not None:
            self._grpc.close(self._options.drain_s)
        self._server.close()
        self._reader.close()
        self._batcher.close(self._options.drain_s)
        self._engine.close()

    # ----------------------------------------------------------------------------------------------
    # Routes

    def application(self) -> Starlette:
        """Return the endpoint as an ASGI application."""
        routes = [
            Route("/v2", self._about),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/status", self._status),
            Route("/metrics", self._metrics),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(model, self._model),
                Route(f"{model}/ready", self._ready),
                Route(f"{model}/infer", self._infer, methods=["POST"]),
            ]
        return Starlette(
            routes=routes,
            exception_handlers={404: _not_there, 405: _not_so, RequestError: _told, 500: _broken},
        )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer inference straight away, and all else by its route."""
        if scope["path"] not in self._inferring or scope["method"] != "POST":
            await self._routed(scope, receive, send)
            return
        request = Request(scope, receive)
        response: Response | Answered
        try:
            response = await self._infer(request)
        except Exception as error:
            response = await _broken(request, error)
            await response(scope, receive, send)
            raise
        await response(scope, receive, send)

    async def _about(self, request: Request) -> Response:
        return JSONResponse(
            {
                "name": "fedsys",
                "version": version("fedsys"),
                "extensions": list(v2.EXTENSIONS),
                "models": [self._options.name],
            }
        )

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        self._check_name(request)
        ready = self._engine.ready and not self._draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _model(self, request: Request) -> Response:
        self._check_name(request)
        return JSONResponse(v2.metadata(self._options.name, self._engine.card))

    async def _status(self, request: Request) -> Response:
        return Response(json_text(self._engine.status()), media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _infer(self, request: Request) -> Response | Answered:
        response: Response | Answered
        try:
            self._check_name(request)
            response = await self._answer(request)
        except RequestError as error:
            response = await _told(request, error)
        except ClientDisconnect:
            response = Response(status_code=499)  # as web servers count those who hung up
        self.metrics.ended(response.status_code)
        return response

    def _check_name(self, request: Request) -> None:
        name, number = request.path_params.get("model"), request.path_params.get("version")
        if name not in (None, self._options.name):
            v2.refuse(f"model {name!r} is not here; {self._options.name!r} is", 404)
        if number not in (None, v2.VERSION):
            v2.refuse(f"version {number!r} is not here; {v2.VERSION!r} is", 404)

    # ----------------------------------------------------------------------------------------------
    # Inference

    async def _answer(self, request: Request) -> Answered:
        began = time.perf_counter()
        if self._draining:
            raise RequestError(503, "the endpoint is about to end; ask another one")
        if (small := self._bodies.small(request)) is not None:
            return await self._inferred(request, small, began)
        async with self._bodies.read(request) as body:
            self._engine.watch.received(len(body), time.perf_counter() - began)
            return await self._inferred(request, body, began)

    async def _inferred(self, request: Request, body: bytes | bytearray, began: float) -> Answered:
        inference = await self._reader.read(request.headers, body)
        rows = inference.images.shape[0]
        served = await self._served(inference.images, began)
        took = time.perf_counter() - began
        facts = v2.facts_of(served)
        card, name = self._engine.card, self._options.name
        answer = inference, served.scores, card, name, facts
        if served.scores.size <= _FEW:
            content, head = v2.write(*answer)
        else:
            content, head = await asyncio.to_thread(v2.write, *answer)
        self.metrics.answered(served.by, rows, served.batch, took)
        return Answered(content, served.by, head)

    async def _served(self, images: Array, began: float) -> Served:
        left = self._options.timeout_s - (time.perf_counter() - began)
        try:
            return await self._turns.served(images, left)
        except TimeoutError as error:
            text = f"not answered within serving.timeout_s={self._options.timeout_s:g}"
            raise RequestError(504, text) from error


# --------------------------------------------------------------------------------------------------
# Errors, as the protocol has them: an object with one text


async def _told(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 500
    headers = dict(_CLOSE) if status in (408, 413, 415, 503) else {}
    if status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse({"error": str(error)}, status, headers)


async def _not_there(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"{request.url.path} is not here; see GET /v2"}, 404)


async def _not_so(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"{request.method} is not for {request.url.path}"}, 405)


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"defect of the endpoint: {type(error).__name__}"}, 500)


# Addresses


def _is_supervisors(path: str) -> bool:
    """Return whether a path is asked for by those who watch, and is answered under any load."""
    return path in _WATCHED or (path.startswith("/v2/models/") and path.endswith("/ready"))


def listen(address: str) -> tuple[socket.socket, str]:
    """Return a socket that listens at ``http://host:port``, and the address that it got.

    Raises:
        ConfigError: The address has another form or cannot be listened on.
    """
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path.strip("/"):
        raise ConfigError.of("serving.address", address, "must be http://host:port")
    made = listening_socket("serving.address", address, parts.hostname, port)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return made, f"http://{host}:{made.getsockname()[1]}"
