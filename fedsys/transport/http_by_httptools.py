"""A connection whose requests are read by httptools, which may not be installed."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedsys.transport.http_parsers import JoinedAnswers
from fedsys.transport.http_places import Phase

_FRAMING = (b"content-length", b"transfer-encoding")


class ByHttpTools(JoinedAnswers, HttpToolsProtocol):
    """A connection whose requests are read by httptools."""

    in_head = True
    _wrong: str | None = None
    """What is wrong with the bytes behind the requests that are being answered."""

    @property
    def request(self) -> Phase:
        """What the last request is doing; IDLE if it is answered, or none came."""
        if self._wrong is not None:  # what came before it is answered first
            return Phase.WORK
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return Phase.IDLE if self.in_head else Phase.BODY
        return Phase.BODY if cycle.more_body else Phase.WORK

    def data_received(self, data: bytes | memoryview) -> None:
        """Read requests; nothing is read any more behind bytes that are none."""
        self._unset_keepalive_if_required()
        if self._wrong is not None:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(bytes(memoryview(data)[upgrade.args[0] :]))
        except httptools.HttpParserCallbackError:  # uvicorn's, which takes the address apart
            self.send_400_response("no valid request of HTTP/1.1: its address cannot be read")
        except httptools.HttpParserError as error:
            self.send_400_response(f"no valid request of HTTP/1.1: {str(error)[:200]}")

    def _go_on(self, rest: bytes) -> None:
        """Read on after a request that asks for another protocol, which is left unheard.

        httptools takes such a request to end with its headers. Clients of Java and ``curl --http2``
        ask with every first request, and its body was read as a request of its own.
        """
        framing = [(name, value) for name, value in self.headers if name in _FRAMING]
        if framing and not self.cycle.response_complete:
            self.cycle.more_body, self.in_head = True, False
            self.parser = httptools.HttpRequestParser(_BehindHead(self))
            lines = b"".join(b"%s: %s\r\n" % one for one in framing)
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % lines)
        if rest:
            self.data_received(rest)

    def on_headers_complete(self) -> None:
        """Line and headers of a request are there."""
        self.in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self.in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written."""
        last = not self.pipeline
        if self._wrong is not None:
            self.ended = False  # it is refused before the connection ends
        super().on_response_complete()
        if last and self._wrong is not None:
            self.refuse(400, self._wrong)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request, once those before them are answered."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or (cycle.more_body and not self.pipeline):
            super().send_400_response(msg)
            return
        self._wrong = msg
        if cycle.more_body:  # it has not begun, and never will
            self.pipeline.popleft()
            cycle.response_complete = True


class _BehindHead:
    """Callbacks of a parser that is told the headers of a request once more.

    Args:
        to: Who knows them, and is called back for all that follows.
    """

    def __init__(self, to: ByHttpTools) -> None:
        self._to, self._again = to, True

    def on_message_begin(self) -> None:
        """The next request begins."""
        if not self._again:
            self._to.on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of an address came."""
        if not self._again:
            self._to.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header came."""
        if not self._again:
            self._to.on_header(name, value)

    def on_headers_complete(self) -> None:
        """Line and headers are there."""
        if not self._again:
            self._to.on_headers_complete()
        self._again = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body came."""
        self._to.on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._to.on_message_complete()
