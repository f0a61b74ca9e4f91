"""How long requests took lately, by route, and what their parts took on hosts and links.

Two kinds are kept apart: requests of clients, and *rehearsals*, which are sent into pipelines that
stand ready so that it is known what they take before they are needed.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, final

from fedsys.partition.pipeline import Passed

_KEPT = 15  # requests whose medians count
_LATELY_S = 30.0  # longest pause between requests that tell of the same time
_LEAST = 3  # before which the first ones, with cold caches, would count for too much


@dataclass(frozen=True)
class TimedRequest:
    """One request that came back.

    Attributes:
        took_s: All of it.
        link_s: Between entry and first host, there and back.
        parts: What each host told, as in `Passed.parts`.
    """

    took_s: float
    link_s: float
    parts: Sequence[Mapping[str, Any]]


@dataclass(eq=False)
class _OfRoute:
    clients: dict[int, deque[TimedRequest]] = field(default_factory=dict)  # by images
    rehearsed: deque[TimedRequest] = field(default_factory=lambda: deque(maxlen=_KEPT))
    medians: tuple[float | None, float | None] = (None, None)  # of both, in seconds
    answered_s: float = -math.inf  # when the last one of clients came back

    def add(self, one: TimedRequest, rows: int) -> None:
        now = time.monotonic()
        if now - self.answered_s > _LATELY_S:  # the machine had another load then
            self.clients.clear()
        self.answered_s = now
        self.clients.setdefault(rows, deque(maxlen=_KEPT)).append(one)
        self.medians = _median(self.usual()), self.medians[1]

    def rehearse(self, found: Sequence[TimedRequest]) -> None:
        self.rehearsed.clear()
        self.rehearsed.extend(found)
        if time.monotonic() - self.answered_s > _LATELY_S:
            self.clients.clear()
        self.medians = _median(self.usual()), _median(self.rehearsed)

    def usual(self) -> Sequence[TimedRequest]:
        """Return those of clients with the fewest images: estimates are for one image."""
        for rows in sorted(self.clients):
            if len(self.clients[rows]) >= _LEAST:
                return tuple(self.clients[rows])
        return ()


def _median(found: Collection[TimedRequest]) -> float | None:
    return median(one.took_s for one in found) if found else None


@final
class RouteTimes:
    """Keeps the last requests of each route."""

    def __init__(self) -> None:
        self._routes: dict[str, _OfRoute] = {}
        self._lock = threading.Lock()

    def noted(self, label: str, passed: Passed, rows: int, took_s: float) -> None:
        """Take note of a request of a client.

        Args:
            label: Of its route.
            passed: What came back.
            rows: Images of it.
            took_s: How long it took.
        """
        one = TimedRequest(took_s, passed.link_s, passed.parts)
        with self._lock:
            self._routes.setdefault(label, _OfRoute()).add(one, rows)

    def rehearsed(self, label: str, found: Sequence[tuple[Passed, float]]) -> None:
        """Take note of rehearsals of one image, with their seconds; they replace earlier ones."""
        fresh = [TimedRequest(took_s, passed.link_s, passed.parts) for passed, took_s in found]
        with self._lock:
            self._routes.setdefault(label, _OfRoute()).rehearse(fresh)

    def requests(self, label: str) -> tuple[Sequence[TimedRequest], Sequence[TimedRequest]]:
        """Return the last requests of clients on a route, and its rehearsals."""
        with self._lock:
            of_it = self._routes.get(label)
            return (of_it.usual(), tuple(of_it.rehearsed)) if of_it is not None else ((), ())

    def medians(self, label: str) -> tuple[float | None, float | None]:
        """Return what requests of clients took lately on a route, and rehearsals; None: too few.

        They are taken when requests come back, so that a decision only looks them up.
        """
        of_it = self._routes.get(label)
        return of_it.medians if of_it is not None else (None, None)

    def took_s(self, label: str) -> float | None:
        """Return what requests of clients took lately on a route: the median; None: too few."""
        return self.medians(label)[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """Of routes that something is known of."""
        with self._lock:
            return tuple(self._routes)
