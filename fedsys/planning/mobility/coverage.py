"""Which edge server a device is at: the nearest one in reach, and not another one at every wobble.

A device stays where it is until it is out of reach, or another edge server in reach is nearer by
some metres. Where the trend of its position shows that some seconds ahead, the handover is
foreseen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.mobility.tracks import Array, Track

TREND_S = 2.0
"""Seconds over which the speed of a device is taken."""


@dataclass(frozen=True, eq=False)
class Coverage:
    """Where edge servers stand and how far they reach.

    Attributes:
        points: Metres to the east and to the north, ``(E, 2)``.
        radius_m: Of each, ``(E,)``; infinite where it reaches anywhere.
    """

    points: Array
    radius_m: Array

    def distances(self, points: Array) -> Array:
        """Return metres from points ``(N, 2)`` to each edge server, ``(N, E)``."""
        away = points[:, None, :] - self.points[None, :, :]
        found: Array = np.hypot(away[..., 0], away[..., 1])
        return found


@dataclass(frozen=True, slots=True)
class EdgeStay:
    """A time at one edge server, which ends when the next one begins.

    Attributes:
        from_s: When it begins.
        edge: Index of the edge server; None where none is in reach.
        foreseen_s: Seconds between the first sign of it and its begin; 0: it was not foreseen.
    """

    from_s: float
    edge: int | None
    foreseen_s: float = 0.0


def spread(points: Array, edges: int) -> Coverage:
    """Return edge servers that are spread evenly over where devices are, and reach anywhere.

    They stand in the middle of equal rectangles, in rows from south to north.

    Args:
        points: Where devices are, ``(N, 2)``.
        edges: Number of edge servers.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = np.maximum(high - low, 1e-9)
    rows = min(edges, max(1, round(math.sqrt(edges * height / width))))
    counts = [edges // rows + (row < edges % rows) for row in range(rows)]
    made = [
        (low[0] + (column + 0.5) / count * width, low[1] + (row + 0.5) / rows * height)
        for row, count in enumerate(counts)
        for column in range(count)
    ]
    return Coverage(np.array(made), np.full(edges, math.inf))


def stays(
    track: Track, coverage: Coverage, hysteresis_m: float, foresee_s: float
) -> tuple[EdgeStay, ...]:
    """Return at which edge servers a device is, one after the other.

    Args:
        track: Where it is.
        coverage: Where edge servers are.
        hysteresis_m: Metres by which another one must be nearer.
        foresee_s: Seconds for which the trend of its position is followed; 0: nothing is foreseen.

    Returns:
        At least one; the first begins with the track, and no two in a row are at one edge server.
    """
    away = coverage.distances(track.points)
    best = _Best.of(away, coverage.radius_m)
    ahead = _Best.of(
        coverage.distances(_ahead(track, foresee_s)), coverage.radius_m
    ) if foresee_s > 0 else None  # fmt: skip
    edge = best.nearest(0)
    found = [EdgeStay(float(track.times_s[0]), edge)]
    index = 0
    while True:
        leaves = best.leaves(edge, hysteresis_m, index + 1)
        if leaves is None:
            return tuple(found)
        target = best.nearest(leaves)
        noticed = 0.0
        if ahead is not None and edge is not None and target is not None:
            first = _first_sign(ahead, edge, target, hysteresis_m, (index, leaves))
            noticed = float(track.times_s[leaves] - track.times_s[first])
        found.append(EdgeStay(float(track.times_s[leaves]), target, noticed))
        index, edge = leaves, target


@dataclass(frozen=True, eq=False)
class _Best:
    """Distances, and at each moment the nearest edge server in reach."""

    away: Array
    reached: NDArray[np.bool_]
    edge: NDArray[np.int64]
    metres: Array

    @classmethod
    def of(cls, away: Array, radius_m: Array) -> _Best:
        reached = away <= radius_m
        within = np.where(reached, away, math.inf)
        edge = within.argmin(axis=1)
        return cls(away, reached, edge, within[np.arange(len(edge)), edge])

    def nearest(self, index: int) -> int | None:
        return int(self.edge[index]) if self.metres[index] < math.inf else None

    def out(self, edge: int | None, hysteresis_m: float, start: int, stop: int | None = None
            ) -> NDArray[np.bool_]:  # fmt: skip
        """Return at which moments a device would leave an edge server, or find one."""
        span = slice(start, stop)
        if edge is None:
            return self.metres[span] < math.inf
        nearer = self.away[span, edge] - self.metres[span] > hysteresis_m
        return ~self.reached[span, edge] | nearer

    def leaves(self, edge: int | None, hysteresis_m: float, start: int) -> int | None:
        """Return the first moment from `start` at which it leaves; None if it stays."""
        out = self.out(edge, hysteresis_m, start)
        return start + int(out.argmax()) if out.any() else None


def _ahead(track: Track, seconds: float) -> Array:
    """Return where a device would be some seconds later if it went on as it goes."""
    times, points = track.times_s, track.points
    before = np.searchsorted(times, times - TREND_S, side="left")
    before = np.minimum(before, np.maximum(np.arange(len(times)) - 1, 0))
    took = (times - times[before])[:, None]
    moved = points - points[before]
    speed = np.divide(moved, took, out=np.zeros_like(moved), where=took > 0)
    ahead: Array = points + seconds * speed
    return ahead


def _first_sign(
    ahead: _Best, edge: int, target: int, hysteresis_m: float, span: tuple[int, int]
) -> int:
    """Return from which moment on the trend showed the handover; the handover itself, if never."""
    begin, leaves = span
    shows = ahead.out(edge, hysteresis_m, begin, leaves) & (ahead.edge[begin:leaves] == target)
    shows &= ahead.metres[begin:leaves] < math.inf
    signs = np.flatnonzero(~shows)
    return begin + (int(signs[-1]) + 1 if len(signs) else 0)
