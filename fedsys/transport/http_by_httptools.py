"""A connection whose requests are read by httptools, which may not be installed."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedsys.transport.http_parsers import JoinedAnswers
from fedsys.transport.http_places import Phase


class ByHttpTools(JoinedAnswers, HttpToolsProtocol):
    """A connection whose requests are read by httptools."""

    in_head = True

    @property
    def request(self) -> Phase:
        """What the last request is doing; IDLE if it is answered, or none came."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return Phase.IDLE if self.in_head else Phase.BODY
        return Phase.BODY if cycle.more_body else Phase.WORK

    def on_headers_complete(self) -> None:
        """Line and headers of a request are there."""
        self.in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self.in_head = True
        super().on_message_complete()
