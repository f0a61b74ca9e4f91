"""Random waypoint: devices go straight to points that are drawn, and stay there for a while.

Johnson and Maltz, "Dynamic Source Routing in Ad Hoc Wireless Networks", 1996. Speeds are drawn from
an interval above 0, because the mean speed decays towards 0 otherwise (Yoon, Liu and Noble, "Random
Waypoint Considered Harmful", INFOCOM 2003). Each leg of each device has an address of its own, so
where a device is at a moment does not depend on how far ahead anybody looked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsys.planning.mobility.tracks import Array, Track
from fedsys.randomness import Address

STEP_S = 1.0
"""Seconds from one position to the next, as in SUMO."""


@dataclass(frozen=True)
class RandomWaypoint:
    """Where devices go.

    Attributes:
        seed: Of the run.
        low: South-west corner of the area, in metres.
        high: Its north-east corner.
        speed_m_s: Least and greatest speed, above 0.
        pause_s: Least and greatest stay at a point.
    """

    seed: int
    low: tuple[float, float]
    high: tuple[float, float]
    speed_m_s: tuple[float, float]
    pause_s: tuple[float, float]

    def track(self, client: int, until_s: float) -> Track:
        """Return where a device is, once a second until `until_s` at least.

        Args:
            client: Partition id.
            until_s: In seconds; the walk begins at 0.
        """
        grid = np.arange(0.0, until_s + STEP_S, STEP_S)
        here, moment, leg = self._point(client, 0), 0.0, 0
        times, points = [0.0], [here]
        while moment <= grid[-1]:
            leg += 1
            there = self._point(client, leg)
            draws = Address(self.seed, client).numpy("waypoint manner", leg).random(2)
            speed = self.speed_m_s[0] + draws[0] * (self.speed_m_s[1] - self.speed_m_s[0])
            stay = self.pause_s[0] + draws[1] * (self.pause_s[1] - self.pause_s[0])
            arrives = moment + float(np.hypot(*(there - here))) / float(speed)
            moment = arrives + float(stay)
            times += [arrives, moment]
            points += [there, there]
            here = there
        knots = np.array(points)
        places = [np.interp(grid, times, knots[:, axis]) for axis in (0, 1)]
        return Track(grid, np.stack(places, axis=1))

    def _point(self, client: int, leg: int) -> Array:
        low, high = np.array(self.low), np.array(self.high)
        draws = Address(self.seed, client).numpy("waypoint", leg).random(2)
        point: Array = low + draws * (high - low)
        return point
