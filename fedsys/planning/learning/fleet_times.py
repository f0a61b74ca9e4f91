"""Iterations of many fleets at once, with contention for edges, as arrays of devices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices, together_s
from fedsys.planning.learning.knowing import Rows
from fedsys.planning.workload import Array, StageTimes

_NAMES = [field.name for field in dataclasses.fields(StageTimes)]


@dataclass(frozen=True)
class Lines:
    """N fleets as lines of a table, R devices at places in them.

    Attributes:
        line: The line of each device, ``(R,)``.
        place: Its place there.
        edge: Its edge, counted within the fleet.
        workers: Sessions that edges compute at a time, by line, ``(N,)``.
    """

    line: Indices
    place: Indices
    edge: Indices
    workers: Indices

    @classmethod
    def of(cls, rows: Rows) -> Lines:
        """Return fleets as they are."""
        first = np.minimum.reduceat(rows.edge, rows.starts)
        return cls(
            rows.fleet,
            np.arange(len(rows.fleet)) - rows.starts[rows.fleet],
            rows.edge - first[rows.fleet],
            rows.workers[rows.starts].astype(np.int64),
        )

    def iterations_s(self, s: StageTimes) -> Array:
        """Return the seconds of an iteration of each device, ``(R,)``, of those of like edges."""
        seconds = np.zeros(len(self.line))
        for several in np.unique(self.workers):
            mine = np.flatnonzero(self.workers[self.line] == several)
            lines, line = np.unique(self.line[mine], return_inverse=True)
            at = line, self.place[mine]
            shape = len(lines), int(self.place[mine].max()) + 1
            parts = StageTimes(**{n: _spread(getattr(s, n)[mine], at, shape) for n in _NAMES})
            edges = _spread(self.edge[mine], at, shape)
            seconds[mine] = together_s(parts, edges, [int(several)] * (int(edges.max()) + 1))[at]
        return seconds


def _spread(values: NDArray[Any], at: tuple[Indices, Indices], shape: tuple[int, int]) -> Any:
    made = np.zeros(shape, dtype=values.dtype)
    made[at] = values
    return made


@dataclass(frozen=True)
class Others:
    """Each fleet as often as it has devices: in each copy another one does something else.

    Attributes:
        lines: The copies.
        of: Which device each place is of, ``(R',)``.
        other: Whether it does something else there.
        starts: Index of the first place of each copy, one for each device, ``(R,)``.
    """

    lines: Lines
    of: Indices
    other: NDArray[np.bool_]
    starts: Indices

    @classmethod
    def among(cls, rows: Rows) -> Others:
        """Return the copies of fleets."""
        whole = Lines.of(rows)
        counts = np.bincount(rows.fleet)[rows.fleet]
        copy = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum(counts) - counts
        place = np.arange(len(copy)) - starts[copy]
        of = rows.starts[rows.fleet[copy]] + place
        workers = whole.workers[rows.fleet]
        return cls(Lines(copy, place, whole.edge[of], workers), of, of == copy, starts)

    def iterations_s(self, s: StageTimes, others: StageTimes) -> Array:
        """Return the seconds of an iteration in all copies, ``(R',)``.

        Args:
            s: The stages of each device, ``(R,)``.
            others: Those of what it might have done instead.
        """
        parts = {n: np.where(self.other, getattr(others, n)[self.of], getattr(s, n)[self.of])
                 for n in _NAMES}  # fmt: skip
        return self.lines.iterations_s(StageTimes(**parts))
