"""How long to wait for an answer before asking what is the matter: from the round trips so far.

The estimate is TCP's (Jacobson, "Congestion avoidance and control", SIGCOMM 1988; RFC 6298): the
smoothed round trip and four times its smoothed deviation, doubled each time in vain. It differs in
what a limit means. Here it only says when to ask: whoever finds the other side alive waits on, so a
limit that is too short costs a question and never a session.

Limits that follow each other add up: over attempts, edges and sessions. An `Allowance` is what all
of them may take together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_S = 1.0
"""Limit before there was a round trip, in seconds, as in RFC 6298."""

LEAST_S = 0.5
"""Shortest limit, in seconds: a machine can be busy for a moment."""

MOST_S = 60.0
"""Longest limit that doubling leads to, in seconds; round trips may make it longer."""


class Patience:
    """The time limit for one kind of round trip.

    Args:
        first_s: Limit before there was one, in seconds.
        least_s: Shortest limit, in seconds.
    """

    def __init__(self, first_s: float = FIRST_S, least_s: float = LEAST_S) -> None:
        self._first, self._least = first_s, least_s
        self._mean: float | None = None
        self._deviation = 0.0
        self._missed = 0

    @property
    def limit_s(self) -> float:
        """Seconds to wait from now on."""
        if self._mean is None:
            base = self._first
        else:
            base = max(self._least, self._mean + 4 * self._deviation)
        return max(base, min(MOST_S, base * 2.0**self._missed))

    def saw(self, seconds: float) -> None:
        """Take note of a round trip."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(self._mean - seconds) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8
        self._missed = 0

    def missed(self) -> None:
        """Take note that the limit passed without an answer."""
        self._missed = min(self._missed + 1, 64)

    def failed(self, seconds: float) -> None:
        """Take note of an attempt that failed after so long.

        One that was cut short tells nothing of how long to wait: a forwarder before a process that
        is gone ends each connection at once.
        """
        if seconds >= self.limit_s:
            self.missed()


class Allowance:
    """Seconds that may be waited all together, by any threads, until they are granted anew.

    Args:
        seconds: How many.
        clock: Seconds; replaced in tests.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._granted, self._clock = seconds, clock
        self._used = 0.0
        self._begun: dict[object, float] = {}  # blocks that spend at this moment
        self._lock = threading.Lock()

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        with self._lock:
            now = self._clock()
            used = self._used + sum(now - began for began in self._begun.values())
        return max(0.0, self._granted - used)

    def renew(self) -> None:
        """Grant all of them anew."""
        with self._lock:
            self._used = 0.0
            self._begun = dict.fromkeys(self._begun, self._clock())

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Take off what the block takes, from its begin on."""
        block = object()
        with self._lock:
            self._begun[block] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._used += self._clock() - self._begun.pop(block)
