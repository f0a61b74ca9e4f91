"""Strangers: connections whose peers have shown nothing yet that only a friend would know.

Whoever can reach a port can connect. Until the handler of a link has seen a token or a certificate
that it knows and says so (`fedsys.transport.link.AcceptedLink.admit`), the link waits in a room of
its own: with few places, of which no friend takes one for longer than a round trip; with small
frames; and for a short time. Links that were admitted have other places, which strangers cannot
take.

If the room is full, whoever has waited longest goes, of the address from which most wait. Who has
come within `GRACE_S` stays, for he may be about to say who he is: so long a newcomer is not taken
in, and waits in the queue of the system.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, final

from fedsys.transport.wire import Limits

GRACE_S: Final = 0.25
"""Nobody is sent away earlier: what shows who he is may be on its way."""


SMALL: Final = Limits(frame_bytes=4096, tensor_bytes=4096, tensors=16, header_bytes=16 << 10)
"""Room for a name, a token, and no work."""


@dataclass(frozen=True)
class Strangers:
    """What those may cost who have not shown who they are.

    Attributes:
        places: How many there may be at a time.
        limits: What is accepted in a frame of theirs.
        seconds: How long a handler should wait for the first.
    """

    places: int = 256
    limits: Limits = SMALL
    seconds: float = 10.0


@dataclass(frozen=True)
class Census:
    """Who is at a server, for its metrics.

    Attributes:
        known: Links that were admitted.
        known_places: How many of these there may be.
        strangers: Connections that wait.
        strangers_places: How many of these there may be.
        ended: How many were sent away, by reason.
    """

    known: int
    known_places: int
    strangers: int
    strangers_places: int
    ended: Counter[str]


class Waiting(Protocol):
    """Somebody who waits, as far as it matters for who goes first."""

    @property
    def address(self) -> str:
        """Where he comes from; many may share one."""
        ...


W = TypeVar("W", bound=Waiting)


def first_to_go(waiting: Iterable[W]) -> W | None:
    """Return who goes if somebody must: the first of the address that occurs most often.

    Args:
        waiting: In the order in which they came.
    """
    all_ = list(waiting)
    often = Counter(one.address for one in all_)
    most = max(often.values(), default=0)
    return next((one for one in all_ if often[one.address] == most), None)


@final
class Stay:
    """One connection in the room.

    Args:
        address: Where it comes from, without the port.
        since: When it came, in seconds of `time.monotonic`.
        send_away: Ends it; called at most once, in the thread of somebody else who comes.

    Attributes:
        admitted: Whether it has left for another place.
    """

    def __init__(self, address: str, since: float, send_away: Callable[[], None]) -> None:
        self.address, self.since, self.send_away = address, since, send_away
        self.admitted = False


@final
class WaitingRoom:
    """The connections of strangers. Methods may be called from any thread.

    Args:
        places: How many there may be.
        grace_s: How long each may stay in any case, in seconds.
    """

    def __init__(self, places: int, grace_s: float = GRACE_S) -> None:
        self.places, self._grace_s = places, grace_s
        self._stays: dict[Stay, None] = {}  # in the order in which they came
        self._ended: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def ended(self) -> Counter[str]:
        """How many were sent away, by reason."""
        with self._changed:
            return Counter(self._ended)

    def __len__(self) -> int:
        return len(self._stays)

    def enter(self, address: str, send_away: Callable[[], None]) -> Stay | None:
        """Take somebody in, and send another one away if that must be; None once it is closed.

        Args:
            address: Where he comes from, without the port.
            send_away: Ends his connection without waiting.
        """
        goes: Stay | None = None
        with self._changed:
            while not self._closed and len(self._stays) >= self.places:
                goes = first_to_go(self._stays)
                assert goes is not None
                left = goes.since + self._grace_s - time.monotonic()
                if left <= 0:
                    del self._stays[goes]
                    self._ended["full"] += 1
                    break
                goes = None
                self._changed.wait(left)
            if self._closed:
                return None
            stay = Stay(address, time.monotonic(), send_away)
            self._stays[stay] = None
        if goes is not None:
            goes.send_away()
        return stay

    def leave(self, stay: Stay, reason: str = "") -> None:
        """Give a place back.

        Args:
            stay: Whose; it may have been given back before.
            reason: Why he goes; empty where that is nothing to be counted.
        """
        with self._changed:
            if self._stays.pop(stay, stay) is None:
                self._changed.notify_all()
                if reason:
                    self._ended[reason] += 1

    def count(self, reason: str) -> None:
        """Count somebody who was sent away without having been in."""
        with self._changed:
            self._ended[reason] += 1

    def close(self) -> None:
        """Take nobody in any more, and send all away."""
        with self._changed:
            self._closed = True
            stays, self._stays = list(self._stays), {}
            self._changed.notify_all()
        for stay in stays:
            stay.send_away()
