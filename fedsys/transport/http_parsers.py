"""The two parsers of uvicorn, and what a door must know of either: how far the next request is.

httptools, llhttp of Node.js in C, takes a request apart in a tenth of the time of h11 and is used
where it is installed (the extra ``serve``), as uvicorn itself does. It holds nobody back who sends
requests without waiting for answers, and so is asked at every byte whether headers are complete.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsys.transport.http_places import Phase


class Parser(Protocol):
    """The protocol of a connection that reads requests and sends answers."""

    loop: asyncio.AbstractEventLoop
    cycle: Any

    @property
    def in_head(self) -> bool:
        """Whether the next bytes are of a line or headers."""

    @property
    def request(self) -> Phase:
        """What the last request is doing; IDLE if it is answered, or none came."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """As asyncio has it."""

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""

    def eof_received(self) -> None:
        """As asyncio has it."""

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""

    def pause_writing(self) -> None:
        """As asyncio has it."""

    def resume_writing(self) -> None:
        """As asyncio has it."""


class ByH11(H11Protocol):
    """A connection whose requests are read by h11."""

    @property
    def in_head(self) -> bool:
        """Whether the next bytes are of a line or headers."""
        return self.conn.their_state is h11.IDLE

    @property
    def request(self) -> Phase:
        """What the last request is doing; IDLE if it is answered, or none came."""
        match self.conn.their_state:
            case h11.IDLE:
                return Phase.IDLE
            case h11.SEND_BODY:
                return Phase.BODY
            case _:
                return Phase.WORK


def parser() -> type[Any]:
    """Return the `Parser` of connections: by httptools where it is installed."""
    try:
        from fedsys.transport.http_by_httptools import ByHttpTools
    except ImportError:
        return ByH11
    return ByHttpTools
