"""A device that watches its link: it goes to another edge server when what it measures is poor."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from fedsys.offload.remote import Remote
from fedsys.planning.mobility.link_trigger import Due, LinkLimits, LinkWatch, observed
from fedsys.runs.tracing import Recorder

_log = logging.getLogger("fedsys.offload")

PING_S = 1.0
"""Seconds from one measurement of the latency to the next at least."""

PINGS = 2
"""Round trips of one measurement, of which the shortest counts: the edge may be at its step."""


class LinkWatcher:
    """Judges the link of one device between its mini-batches. For one thread.

    Args:
        limits: What the link must carry.
        recorder: Knows what the mini-batches sent, and when it arrived.
        remote: The session.
        edges: Addresses of all edge servers.
        latency_s: What is known of the latency, one way, where it is not measured.
        armed: Whether the device leaves if the link is poor before it was good.
        clock: Seconds.
    """

    def __init__(
        self,
        limits: LinkLimits,
        recorder: Recorder,
        remote: Remote,
        edges: Sequence[str],
        latency_s: float = 0.0,
        *,
        armed: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._recorder, self._remote = limits, recorder, remote
        self._edges, self._latency_s, self._clock = edges, latency_s, clock
        self._watch, self._looked, self._pinged = LinkWatch(armed), 0, -math.inf
        self._why = ""

    def look(self, step: int) -> Due:
        """Return what is due before a mini-batch, each time once.

        Args:
            step: Mini-batches that are done.

        Raises:
            Moved: The session goes on from an earlier step.
            EdgesLost: It is nowhere.
        """
        if step <= self._looked:
            return ""
        self._looked = step
        measured = math.isfinite(self._limits.above_s)
        if measured and self._clock() - self._pinged >= PING_S:
            self._latency_s = min(self._remote.trip(step, k) for k in range(PINGS)) / 2
            self._pinged = self._clock()
        rate = self._recorder.rate(step - 1, self._latency_s)
        seen = rate, self._latency_s
        self._watch, due = observed(self._watch, self._limits, self._clock(), *seen)
        if due == "leave":
            self._why = self._limits.in_words(*seen)
        return due

    @property
    def armed(self) -> bool:
        """Whether the device leaves if the link is poor."""
        return self._watch.armed

    def why(self) -> str:
        """Return why the device left last, in words."""
        return self._why

    def target(self) -> str:
        """Return the address of the edge server, of the others, that answers soonest.

        Empty if none does; that is said.
        """
        others = [edge for edge in self._edges if edge != self._remote.edge]
        found = self._remote.nearest(others)
        if not found:
            _log.warning("the link is poor, and no other edge server is in reach")
        return found
