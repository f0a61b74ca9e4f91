"""The door of an HTTP server: bounds what each connection may cost before it reaches uvicorn.

uvicorn has one bound, the number of connections, and those that came first keep their places: 1,000
idle ones shut everybody else out, and headers of any length are collected. A `Guard` stands before
each connection's protocol, hands bytes on, and sees from its parser what they are for; the `Hall`
knows all guards and applies `http_places`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast, final

from fedsys.transport.http_parsers import Parser, last_answer
from fedsys.transport.http_places import HttpLimits, Phase, Seat, overdue, victims

SPARE = 64
"""Places beyond the limit, for those who may be about to ask for the health of the server."""

SWEEP_S = 0.5
LINGER_S = 2.0
"""How long bytes of somebody who was refused are dropped, in seconds, before his end is cut off.

Whoever closes at once takes the refusal from him before he has read it.
"""

_END = b"\r\n\r\n"  # of headers
_AT_A_TIME = 16
_SOON_S = 0.02
_LINGER_BYTES = 1 << 20
_STALLED_S = 10.0  # without a byte of an answer being taken


@final
class Hall:
    """All connections of one server.

    Args:
        limits: What each may cost.

    Attributes:
        gone: How many were sent away, by reason.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.gone: Counter[str] = Counter()
        self._guards: dict[Guard, None] = {}  # in the order in which they came
        self._sweeper: asyncio.TimerHandle | None = None

    def phases(self) -> Counter[str]:
        """Return how many connections are in which phase."""
        return Counter(guard.phase for guard in list(self._guards))

    def enter(self, guard: Guard) -> None:
        """Take a connection in, and send others away where places are short."""
        self._guards[guard] = None
        if self._sweeper is None:
            self._sweeper = guard.loop.call_later(SWEEP_S, self._sweep, guard.loop)
        if len(self._guards) > self.limits.connections:
            self._make_room(guard.loop.time())

    def leave(self, guard: Guard) -> None:
        """Forget a connection."""
        self._guards.pop(guard, None)

    def _make_room(self, now: float) -> None:
        """Send several away at once: to look through all for each that comes would cost more."""
        guards = list(self._guards)
        seats = [guard.seat(now) for guard in guards]
        over = len(guards) - self.limits.connections
        found = victims(seats, now, over + self.limits.connections // 16)
        if not found and over > SPARE:
            found = victims(seats, now, over, grace_s=0.0) or [len(guards) - 1]
        for number in found:
            guards[number].send_away("full")

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send away whose time is over; a few at a time, since others wait meanwhile."""
        now, gone = loop.time(), 0
        for guard in list(self._guards):
            reason = guard.overdue(now)
            if reason is not None:
                guard.send_away(reason)
                gone += 1
            if gone >= _AT_A_TIME:
                break
        pause_s = _SOON_S if gone >= _AT_A_TIME else SWEEP_S
        self._sweeper = loop.call_later(pause_s, self._sweep, loop) if self._guards else None


@final
class Guard(asyncio.Protocol):
    """Stands before the protocol of one connection.

    Args:
        inner: Of uvicorn; gets what the connection gets.
        hall: Where it waits.
    """

    def __init__(self, inner: Parser, hall: Hall) -> None:
        self._inner, self._hall = inner, hall
        self.loop = inner.loop
        self._phase, self._since = Phase.IDLE, self.loop.time()
        self._body = self._header = self._dropped = 0
        self._leaving: float | None = None
        self._unsent = (0, self._since)

    # ----------------------------------------------------------------------------------------------
    # What asyncio says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place."""
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(self._transport)
        self._hall.enter(self)

    def data_received(self, data: bytes) -> None:
        """Hand bytes on, as far as headers stay within their limit."""
        if self._leaving is not None:
            self._drop(len(data))
            return
        start, most = 0, self._hall.limits.header_bytes
        while start < len(data) and not self._transport.is_closing():
            if not self._inner.in_head:
                self._inner.data_received(memoryview(data)[start:] if start else data)
                self._body += len(data) - start
                break
            piece = data[start : start + self._step(data, start)]
            cycle = self._inner.cycle
            self._header += len(piece)
            self._inner.data_received(piece)
            if self._inner.cycle is not cycle or not self._inner.in_head:
                self._header = self._body = 0
            elif self._header > most:
                self._refuse(431, f"the headers have more than {most:,} bytes")
                return
            start += len(piece)
        self._look(self.loop.time())

    def _step(self, data: bytes, start: int) -> int:
        """Return how many bytes are handed on at once: as many as headers may have, or fewer.

        Headers alone where their end is there and more follows: a body comes in one piece then.
        """
        room = max(1, self._hall.limits.header_bytes + 1 - self._header)
        if len(data) - start <= room:
            return room
        end = data.find(_END, start, start + room)
        return room if end < 0 else end + len(_END) - start

    def eof_received(self) -> bool | None:
        """The peer sends no more: what it asked for is answered, half a request refused."""
        if self._leaving is not None:
            return False
        match self.phase:
            case Phase.IDLE:
                return False
            case Phase.WORK:  # half of the connection is left, for the answers
                self._inner.ended = True
            case _:
                self._inner.send_400_response("the connection ended within a request")
        return not self._transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._hall.leave(self)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer takes answers too slowly."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """It took them."""
        self._inner.resume_writing()

    # ----------------------------------------------------------------------------------------------
    # What the hall asks

    @property
    def phase(self) -> Phase:
        """What the connection is doing."""
        phase = self._inner.request
        return Phase.HEADERS if phase is Phase.IDLE and self._header else phase

    def seat(self, now: float) -> Seat:
        """Return how it is now."""
        self._look(now)
        return Seat(self._phase, self._since, self._inner.cycle is not None, self._body)

    def overdue(self, now: float) -> str | None:
        """Return why the time of the connection is over; None if it is not."""
        if self._is_stalled(now):
            return "stalled"
        if not overdue(self.seat(now), now, self._hall.limits):
            return None
        return "idle" if self._phase is Phase.IDLE else f"slow_{self._phase}"

    def _is_stalled(self, now: float) -> bool:
        """Return whether the peer has taken nothing of its answer for long, or lingers."""
        if self._leaving is not None:
            return now - self._leaving > LINGER_S
        unsent = self._transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent[0]:
            self._unsent = unsent, now
        return now - self._unsent[1] > _STALLED_S

    def send_away(self, reason: str) -> None:
        """End the connection; a request that has begun is told so, where it still can be."""
        lingers = self._leaving is not None
        if not lingers:
            self._hall.gone[reason] += 1
        self._hall.leave(self)
        if self._phase is Phase.HEADERS and not lingers:
            self._tell(408, "the headers did not arrive in time")
            self._transport.close()
        elif self._phase is Phase.IDLE and not lingers:
            self._transport.close()
        elif self._phase is Phase.BODY and reason == "slow_body" and not lingers:
            self._inner.refuse(408, "the body did not arrive in time")
        else:
            self._transport.abort()

    # ----------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        phase = self.phase
        if phase is not self._phase:
            self._phase, self._since = phase, now

    def _refuse(self, status: int, text: str) -> None:
        self._hall.gone[f"refused_{status}"] += 1
        if self._inner.request is not Phase.IDLE:  # the answer to that one is still to be sent
            self._transport.abort()
            return
        self._tell(status, text)
        self._leaving = self.loop.time()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _tell(self, status: int, text: str) -> None:
        self._transport.write(last_answer(status, text))

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > _LINGER_BYTES:
            self._transport.abort()
