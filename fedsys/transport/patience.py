"""How long to wait for an answer before asking what is the matter: from the round trips so far.

The estimate is TCP's (Jacobson, "Congestion avoidance and control", SIGCOMM 1988; RFC 6298): the
smoothed round trip and four times its smoothed deviation, doubled each time in vain. It differs in
what a limit means. Here it only says when to ask: whoever finds the other side alive waits on, so a
limit that is too short costs a question and never a session.
"""

from __future__ import annotations

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
