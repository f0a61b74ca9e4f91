"""The two parsers of uvicorn, and what a door must know of either: how far the next request is.

httptools, llhttp of Node.js in C, takes a request apart in a tenth of the time of h11 and is used
where it is installed (the extra ``serve``), as uvicorn itself does. It holds nobody back who sends
requests without waiting for answers, and so is asked at every byte whether headers are complete.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, Protocol, cast, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsys.transport.http_places import Phase

_ANSWER, _END = b"HTTP/1.1 ", b"\r\n\r\n"
_GO_ON = b"HTTP/1.1 1"  # 100 Continue is no answer


class Parser(Protocol):
    """The protocol of a connection that reads requests and sends answers."""

    loop: asyncio.AbstractEventLoop
    cycle: Any
    ended: bool

    @property
    def in_head(self) -> bool:
        """Whether the next bytes are of a line or headers."""

    @property
    def request(self) -> Phase:
        """What the last request is doing; IDLE if it is answered, or none came."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """As asyncio has it."""

    def data_received(self, data: bytes | memoryview) -> None:
        """As asyncio has it."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what came last when all before it is answered, and end the connection."""

    def refuse(self, status: int, text: str) -> None:
        """Answer the request that is coming by an error, and end the connection."""

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""

    def pause_writing(self) -> None:
        """As asyncio has it."""

    def resume_writing(self) -> None:
        """As asyncio has it."""


@final
class Joining:
    """A transport that sends the headers of an answer together with what follows them.

    uvicorn writes them apart: two calls of the system, and a client that is woken for either. What
    is held is sent by the next write, when the answer is complete (`flush`), or at the end.

    Args:
        transport: Of asyncio.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._held = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes, headers with the next ones."""
        if self._held:
            data, self._held = self._held + data, b""
        elif data.startswith(_ANSWER) and data.endswith(_END) and not data.startswith(_GO_ON):
            self._held = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            self.write(b"")

    def close(self) -> None:
        """End when all is sent."""
        self.flush()
        self._transport.close()


def last_answer(status: int, text: str) -> bytes:
    """Return an error as the last answer of a connection."""
    body = json.dumps({"error": text}).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class JoinedAnswers(asyncio.Protocol):
    """Has a protocol of uvicorn, which is the next base, send its answers through a `Joining`.

    Attributes:
        cycle: Of the last request.
        ended: Whether the peer sends no more: the connection ends when all is answered.
    """

    cycle: Any
    ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection."""
        self._joining = Joining(cast(asyncio.Transport, transport))
        super().connection_made(cast(Any, self._joining))

    def on_response_complete(self) -> None:
        """An answer is written."""
        self._joining.flush()
        cast(Any, super()).on_response_complete()
        if self.ended and self.cycle.response_complete:
            self._joining.close()

    def refuse(self, status: int, text: str) -> None:
        """End the connection; the request that is coming is answered by an error, but once."""
        cycle = self.cycle
        begun = cycle is not None and not cycle.response_complete
        here = begun or cast(Any, self).request is Phase.BODY
        if begun:  # whoever answers it hears that nobody is there
            cycle.disconnected = True
            cycle.message_event.set()
        if not (here and cycle.response_started):
            self._joining.write(last_answer(status, text))
        self._joining.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request."""
        self.refuse(400, msg)


class ByH11(JoinedAnswers, H11Protocol):
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
