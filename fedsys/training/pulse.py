"""How far the round is that goes on in this process: clients that are done, mini-batches.

One for the whole process, because a round passes through code that is called by Flower and can be
handed nothing. Mini-batches of clients in other processes are not seen.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Beat:
    """How far a round is.

    Attributes:
        asked: Clients that were asked.
        clients: Those that have answered.
        expected: Mini-batches of all of them.
        batches: Those that are done in this process.
    """

    asked: int = 0
    clients: int = 0
    expected: int = 0
    batches: int = 0


class Pulse:
    """Counts. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._beat, self._lock = Beat(), threading.Lock()
        self._batches = 0

    def begin(self, asked: int, expected: int) -> None:
        """Count anew: a round begins.

        Args:
            asked: Clients of the round.
            expected: Their mini-batches.
        """
        with self._lock:
            self._beat, self._batches = Beat(asked, expected=expected), 0

    def client_done(self, count: int = 1) -> None:
        """Count clients that have answered."""
        with self._lock:
            self._beat = replace(self._beat, clients=self._beat.clients + count)

    def batch_done(self) -> None:
        """Count a mini-batch."""
        with self._lock:
            self._batches += 1

    def read(self) -> Beat:
        """Return how far the round is."""
        with self._lock:
            return replace(self._beat, batches=self._batches)


_pulse = Pulse()


def pulse() -> Pulse:
    """Return the counts of this process."""
    return _pulse
