"""Serves the live page over HTTP: the page, its script and style, and what it shows as JSON.

On loopback nobody is asked who they are, but a request must name the address that is served: a page
of another site cannot get at it by a name of its own. Off loopback there is a token, in the address
that is opened once (``/?token=…``), from then on in a cookie, or as ``Authorization: Bearer``. The
page may load nothing from elsewhere, and says so to the browser.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsys.config.dashboard import check_token, place_of
from fedsys.runs.live.page import PAGE, SERVED_PAGE, STYLE
from fedsys.runs.live.script import SCRIPT
from fedsys.runs.live.served_script import SERVED_SCRIPT
from fedsys.transport.http_places import HttpLimits
from fedsys.transport.http_server import HttpServer, listening_socket
from fedsys.transport.security import same_token

COOKIE: Final = "fedsys_live"

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Source(Protocol):
    """Says how what is shown is now."""

    def take(self) -> Mapping[str, Any]:
        """Return it as JSON has it; ``status`` is ``running`` as long as it may change."""

    def close(self) -> None:
        """PageParts no more."""


@dataclass(frozen=True)
class PageParts:
    """What a browser is given.

    Attributes:
        page: HTML.
        script: What fills it.
    """

    page: str
    script: str


OF_RUN: Final = PageParts(PAGE, SCRIPT)
OF_ENDPOINT: Final = PageParts(SERVED_PAGE, SERVED_SCRIPT)


@final
class LivePage:
    """Serves the page of a run, or of an endpoint, until it is closed.

    Args:
        source: Says how it is; closed with the page.
        address: ``HOST:PORT``; port 0 for any that is free.
        token: What everybody must present; empty on loopback only.
        look: What a browser is given.

    Attributes:
        address: As ``http://host:port``.
        asked: When the source was last asked for, by `time.monotonic`; 0 for never.
        told: The status that was told then.

    Raises:
        ConfigError: The address cannot be listened on, or needs a token.
    """

    def __init__(
        self, source: Source, address: str, token: str = "", look: PageParts = OF_RUN
    ) -> None:
        host, port = place_of(address)
        check_token(address, token)
        self._source, self.asked, self.told = source, 0.0, ""
        listening = listening_socket("dashboard", address, host, port)
        name = f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{listening.getsockname()[1]}"
        routes = [
            Route("/", lambda _: Response(look.page, media_type="text/html")),
            Route("/page.css", lambda _: Response(STYLE, media_type="text/css")),
            Route("/page.js", lambda _: Response(look.script, media_type="text/javascript")),
            Route("/run.json", self._run),
        ]
        app = _Door(Starlette(routes=routes), token, None if token else urlsplit(self.address).port)
        limits = HttpLimits(connections=64)
        self._server = HttpServer(app, listening, limits, always=lambda path: False, drain_s=1.0)

    def _run(self, request: Request) -> Response:  # in a thread of Starlette's: it reads files
        taken = self._source.take()
        self.asked, self.told = time.monotonic(), str(taken["status"])
        return JSONResponse(taken)

    def close(self) -> None:
        """End the server, and look no more."""
        self._server.close()
        self._source.close()


class _Door:
    """Lets in who has the token, or who names the address on loopback; adds the headers of all."""

    def __init__(self, app: ASGIApp, token: str, port: int | None) -> None:
        self._app, self._token, self._port = app, token, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        refused = self._refused(request)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *told]
            await send(message)

        app: ASGIApp = self._app if refused is None else refused
        await app(scope, receive, with_headers)

    def _refused(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("the page is only looked at", status_code=405)
        if not self._token:
            host, own = request.headers.get("host", ""), self._port
            if host in {f"127.0.0.1:{own}", f"localhost:{own}", f"[::1]:{own}"}:
                return None
            return PlainTextResponse("this is the page of another address", status_code=403)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        for presented in (bearer, request.cookies.get(COOKIE, "")):
            if same_token(presented, self._token):
                return None
        if same_token(request.query_params.get("token", ""), self._token):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
            return answer
        return PlainTextResponse("open the address with ?token=…", status_code=401)
