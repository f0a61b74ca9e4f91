"""How far a run is against a clock, and when it will be done."""

from __future__ import annotations

from collections.abc import Callable

from fedsys.runs.lines import eta_seconds

Clock = Callable[[], float]
"""Monotonic time in seconds."""


class RoundPace:
    """Counts rounds against a clock.

    Args:
        clock: Monotonic time in seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.rounds = self.done = self._before = 0
        self.begun = self._last = clock()

    def start(self, rounds: int, done: int) -> None:
        """Begin, with `done` of `rounds` behind it."""
        self.rounds, self.done, self._before = rounds, done, done
        self.begun = self._last = self._clock()

    def step(self) -> None:
        """A round is done."""
        self.done += 1
        self._last = self._clock()

    def elapsed(self) -> float:
        """Return the seconds since the begin."""
        return self._clock() - self.begun

    def since(self) -> float:
        """Return the seconds since the last round ended, or since the first began."""
        return self._clock() - self._last

    def eta(self) -> float | None:
        """Return the seconds that are left; None before the first round has ended."""
        here = self.done - self._before
        spent = self._last - self.begun
        return eta_seconds(self.rounds - self._before, here, spent, self.since())
