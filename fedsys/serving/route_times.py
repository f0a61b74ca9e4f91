"""How long requests took lately, by route, and what their parts took on hosts and links.

Two kinds are kept apart: requests of clients, and *rehearsals*, which are sent into pipelines that
stand ready so that it is known what they take before they are needed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, final

from fedsys.partition.pipeline import Passed

_KEPT = 15  # requests whose medians count
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

    def add(self, one: TimedRequest, rows: int) -> None:
        self.clients.setdefault(rows, deque(maxlen=_KEPT)).append(one)

    def usual(self) -> Sequence[TimedRequest]:
        """Return those of clients with the fewest images: estimates are for one image."""
        for rows in sorted(self.clients):
            if len(self.clients[rows]) >= _LEAST:
                return tuple(self.clients[rows])
        return ()


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
            of_it = self._routes.setdefault(label, _OfRoute())
            of_it.rehearsed.clear()
            of_it.rehearsed.extend(fresh)

    def requests(self, label: str) -> tuple[Sequence[TimedRequest], Sequence[TimedRequest]]:
        """Return the last requests of clients on a route, and its rehearsals."""
        with self._lock:
            of_it = self._routes.get(label)
            return (of_it.usual(), tuple(of_it.rehearsed)) if of_it is not None else ((), ())

    def took_s(self, label: str) -> float | None:
        """Return what requests of clients took lately on a route: the median; None: too few."""
        found = self.requests(label)[0]
        return median(one.took_s for one in found) if found else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Of routes that something is known of."""
        with self._lock:
            return tuple(self._routes)
