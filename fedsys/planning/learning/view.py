"""How an agent sees a fleet: groups of devices, each by its slowest member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        times: ``log`` of the ratio to the baseline, or ``seconds``.
        episode: Steps of an episode at most.
    """

    groups: int = 3
    low: LowBandwidth | None = None
    bandwidth: bool = False
    times: str = "log"
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
        """Return the state of devices that keep these shares of the work."""
        devices = _devices(base, now, shares)
        slowest = representatives(labels, now.iteration_s.tolist(), self.groups)
        return self._state([None if k is None else devices[k] for k in slowest])

    def states(
        self, base: Times, now: Times, labels: Sequence[int], shares: Sequence[float]
    ) -> NDArray[np.float32]:
        """Return for each device the state in which it stands for its group, ``(K, size)``."""
        devices = _devices(base, now, shares)
        slowest = representatives(labels, now.iteration_s.tolist(), self.groups)
        members = [None if k is None else devices[k] for k in slowest]
        common = self._state(members)
        states = np.tile(common, (len(devices), 1))
        for k, (device, group) in enumerate(zip(devices, labels, strict=True)):
            alone = self._state([device])  # its own numbers, one of each kind
            states[k, group :: self.groups] = alone
        return states

    def _state(self, members: Sequence[Seen | None]) -> Vector:
        return state_of(members, bandwidth=self.bandwidth, times=self.times)


def _devices(base: Times, now: Times, shares: Sequence[float]) -> list[Seen]:
    return [
        Seen(*values)
        for values in zip(
            base.iteration_s.tolist(), now.iteration_s.tolist(), shares, now.crossing_s.tolist(),
            strict=True,
        )
    ]  # fmt: skip
