"""How an agent sees a fleet: groups of devices, each by its slowest member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsys.planning.learning.grouping import LowBandwidth, regrouped, representatives
from fedsys.planning.learning.observing import Seen, Vector, state_of
from fedsys.planning.workload import Array


@dataclass(frozen=True)
class Times:
    """What is known of the devices after a step, by device.

    Attributes:
        iteration_s: Seconds of an iteration, ``(K,)``; NaN of one that was left out.
        mbit_s: Rate of the slower way of their links; 0 if unknown.
        crossing_s: Seconds in which a batch would cross the first cut both ways; 0 if unknown.
    """

    iteration_s: Array
    mbit_s: Array
    crossing_s: Array

    def of(self, which: Sequence[int]) -> Times:
        """Return what is known of some of them, by index."""
        at = list(which)
        return Times(self.iteration_s[at], self.mbit_s[at], self.crossing_s[at])


@dataclass(frozen=True)
class View:
    """How an agent sees devices; a part of what is saved with it.

    Attributes:
        groups: Number of groups, that of slow links included.
        low: When a link is slow; None: there is no such group.
        bandwidth: Whether bandwidth is a part of the state.
        times: ``ratio`` to the baseline, or ``seconds``.
        veto: Whether a device that is slower at its group's cut than alone stays alone.
        episode: Steps of an episode at most.
    """

    groups: int = 3
    low: LowBandwidth | None = None
    bandwidth: bool = False
    times: str = "ratio"
    veto: bool = False
    episode: int = 100

    @property
    def size(self) -> int:
        """Numbers of the state."""
        return (3 if self.bandwidth else 2) * self.groups

    def labels(
        self, base: Times, now: Times, low: Sequence[bool]
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Return the group of each device, and which have slow links."""
        return regrouped(base.iteration_s.tolist(), now.mbit_s.tolist(), low, self.groups, self.low)

    def state(
        self, base: Times, now: Times, labels: Sequence[int], shares: Sequence[float]
    ) -> Vector:
        """Return the state of devices that keep these shares."""
        seconds = now.iteration_s.tolist()
        members = [
            None
            if k is None
            else Seen(float(base.iteration_s[k]), seconds[k], shares[k], float(now.crossing_s[k]))
            for k in representatives(labels, seconds, self.groups)
        ]
        return state_of(members, bandwidth=self.bandwidth, times=self.times)
