"""From what happens at an endpoint to the signals of the policy."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import psutil

from fedsys.pruning.memory import free_memory, others_load
from fedsys.serving.switch.policy import Profile, Signals, latency_at

WINDOW_S = 2.0
"""How far back the signals look, in seconds.

Rate and slowness are also taken of the last quarter of it, and the worse of both counts: a rush is
seen at once, and calm is believed only when it has lasted. A rate of so short a time varies by
chance, so what counts is two standard deviations (of Poisson arrivals) less than it was.
"""

ENOUGH = 200
"""Examples that tell their rate to 7 % (Poisson arrivals): where so many came in less than the
window, but at least a quarter of it, the rate is that of the time in which they came, so that calm
after a rush is believed sooner.
"""

LINK_BYTES = 64 * 1024
"""Smallest body whose duration says something about the rate of a link."""

_FEWEST = 3  # answers from which a median or a percentile is taken
_LOAD_S = 0.05  # least time over which the load of others is taken


@final
class Meter:
    """Notes arrivals, passes and answers, from any thread.

    Args:
        variants: Profiles that the time of a pass is compared with.
        clock: Seconds that never go back.
        free: Memory that could be taken, in bytes.
        window_s: How far back it looks.
    """

    def __init__(
        self,
        variants: Sequence[Profile],
        *,
        clock: Callable[[], float] = time.monotonic,
        free: Callable[[], int | None] = free_memory,
        window_s: float = WINDOW_S,
    ) -> None:
        self._profiles = {v.name: v for v in variants}
        self._clock, self._free, self._window_s = clock, free, window_s
        self._lock = threading.Lock()
        self._began = clock()
        self._arrivals: deque[tuple[float, float]] = deque()
        self._passes: deque[tuple[float, float]] = deque()
        self._answers: deque[tuple[float, float]] = deque()
        self._links: deque[tuple[float, float]] = deque()
        self._queue = self._standing = 0
        self._process = psutil.Process()
        self._load = (clock(), others_load(self._process))

    def arrived(self, rows: int) -> None:
        """Note that examples came and wait."""
        with self._lock:
            self._arrivals.append((self._clock(), rows))
            self._queue += rows

    def left(self, rows: int) -> None:
        """Note that examples wait no more."""
        with self._lock:
            self._queue -= rows
            self._standing = min(self._standing, self._queue)

    def overdue(self) -> None:
        """Note that what waits now cannot be answered in time."""
        with self._lock:
            self._standing = self._queue

    def received(self, size: int, seconds: float) -> None:
        """Note how long a body took to arrive; small ones say nothing about the link."""
        if size >= LINK_BYTES and seconds > 0:
            with self._lock:
                self._links.append((self._clock(), size * 8 / seconds / 1e6))

    def passed(self, name: str, rows: int, milliseconds: float) -> None:
        """Note the time of a forward pass of a variant."""
        profile = self._profiles.get(name)
        if profile is not None:
            with self._lock:
                ratio = milliseconds / latency_at(profile, rows).p50_ms
                self._passes.append((self._clock(), ratio))

    def answered(self, milliseconds: float) -> None:
        """Note the time from the arrival of a request to its answer."""
        with self._lock:
            self._answers.append((self._clock(), milliseconds))

    def signals(self) -> Signals:
        """Return what was seen lately.

        The queue is the shortest since the last call: one that is short now and then goes by
        itself (Nichols & Jacobson, "Controlling Queue Delay", 2012), unless it is overdue.
        """
        now = self._clock()
        if now - self._load[0] >= _LOAD_S:
            self._load = now, others_load(self._process)
        with self._lock:
            span = min(self._window_s, max(now - self._began, self._window_s / 4))
            for notes in (self._arrivals, self._passes, self._answers, self._links):
                while notes and notes[0][0] < now - self._window_s:
                    notes.popleft()
            answers = sorted(value for _, value in self._answers)
            links = [value for _, value in self._links]
            late = now - self._window_s / 4
            rate = _rate(self._arrivals, now, late, span)
            rush = _at_least([n for moment, n in self._arrivals if moment > late]) / (now - late)
            slow = [
                _middle([value for _, value in self._passes]),
                _middle([value for moment, value in self._passes if moment > late]),
            ]
            queue, self._standing = self._standing, self._queue
        return Signals(
            time_s=now,
            arrival_rate=max(rate, rush),
            queue=queue,
            p95_ms=answers[int(0.95 * (len(answers) - 1))] if len(answers) >= _FEWEST else None,
            slowdown=max((value for value in slow if value is not None), default=None),
            free_memory=self._free(),
            cpu_load=self._load[1],
            link_mbit_s=_middle(links),
        )


def _rate(arrivals: Sequence[tuple[float, float]], now: float, late: float, span: float) -> float:
    """Return the examples per second since the last `ENOUGH` of them, and at least since `late`."""
    rows = 0.0
    for moment, n in reversed(arrivals):
        if rows >= ENOUGH and moment <= late:
            return rows / (now - moment)
        rows += n
    return rows / span


def _at_least(rows: Sequence[float]) -> float:
    """Return how many examples came at least, chance aside: requests come as a Poisson process."""
    spread = math.sqrt(sum(n * n for n in rows))
    return max(0.0, sum(rows) - 2 * spread)


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if len(values) >= _FEWEST else None
