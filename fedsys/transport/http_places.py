"""Who may stay at an HTTP server, and who goes first when places run out: pure functions.

A connection costs a place for as long as it is open. What it gives for it is told by its phase:

* ``idle``: no byte of a request is there;
* ``headers``: a request began, and its headers are not complete;
* ``body``: the body comes;
* ``work``: the request is whole, and is being answered.

Those in ``work`` are never sent away. Of the others each has a time after which it goes anyway
(`overdue`); where places are short, those go first that never asked anything, then those that wait
between two requests, then bodies that come too slowly, the longest wait first (`victims`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

GRACE_S = 0.25
"""Nobody is sent away earlier after his last step: his bytes may be on their way."""

SLOW_RATE = 1024.0
"""Bytes per second that a body must have in the mean, after `HttpLimits.header_s`."""

SHORT_RATE = 65_536.0
"""The same where places are short, after `SHORT_S`."""

SHORT_S = 1.0


class Phase(StrEnum):
    """What a connection is doing."""

    IDLE = "idle"
    HEADERS = "headers"
    BODY = "body"
    WORK = "work"


@dataclass(frozen=True)
class HttpLimits:
    """What a connection may cost.

    Attributes:
        connections: Places.
        header_bytes: Of one request's line and headers.
        header_s: Longest time until they are complete, from the first byte or, before the first
            request, from the connection, in seconds.
        keep_alive_s: Longest time between two requests, in seconds.
    """

    connections: int = 1024
    header_bytes: int = 16_384
    header_s: float = 10.0
    keep_alive_s: float = 30.0


@dataclass(frozen=True)
class Seat:
    """A connection as it is at one moment.

    Attributes:
        phase: What it is doing.
        since: When that began, in seconds of any clock.
        served: Whether it ever sent a whole request.
        body: Bytes of the body that have come, in the phase of that name.
    """

    phase: Phase
    since: float
    served: bool = False
    body: int = 0

    def rate(self, now: float) -> float:
        """Bytes of the body per second."""
        return self.body / max(now - self.since, 1e-3)


def overdue(seat: Seat, now: float, limits: HttpLimits) -> bool:
    """Return whether the time of a connection is over, however many places are free."""
    took = now - seat.since
    match seat.phase:
        case Phase.IDLE:
            return took > (limits.keep_alive_s if seat.served else limits.header_s)
        case Phase.HEADERS:
            return took > limits.header_s
        case Phase.BODY:
            return took > limits.header_s and seat.rate(now) < SLOW_RATE
        case Phase.WORK:
            return False


def victims(
    seats: Iterable[Seat], now: float, count: int, *, grace_s: float = GRACE_S
) -> list[int]:
    """Return the places in `seats` of up to `count` connections to send away, the first first.

    Args:
        seats: All connections.
        now: Time of the clock of `Seat.since`.
        count: How many are to go.
        grace_s: Those whose phase began later than so long ago stay.
    """
    ranked = [
        (rank, number)
        for number, seat in enumerate(seats)
        if now - seat.since >= grace_s and (rank := _rank(seat, now)) is not None
    ]
    return [number for _, number in sorted(ranked)[:count]]


def _rank(seat: Seat, now: float) -> tuple[int, float] | None:
    """Return the order in which connections go; None for those that stay."""
    match seat.phase:
        case Phase.HEADERS:
            return 0, seat.since
        case Phase.IDLE:
            return int(seat.served), seat.since
        case Phase.BODY if now - seat.since > SHORT_S and seat.rate(now) < SHORT_RATE:
            return 2, seat.rate(now)
        case _:
            return None
