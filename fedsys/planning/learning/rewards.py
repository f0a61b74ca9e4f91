"""What a round is worth to an agent that scores cuts: time that was lost."""

from __future__ import annotations

from typing import Final

import numpy as np

from fedsys.planning.contention import Indices
from fedsys.planning.workload import Array

WORST: Final = 5.0
"""Regret up to which rounds are told apart."""


def regret_reward(
    starts: Indices, fleet: Indices, round_s: Array, least_s: Array, classic_s: Array
) -> Array:
    """Return what a round earns each device, ``(R,)``: no regret is best.

    Half of it is the regret of the device itself, half that of its fleet, against the round that
    the slowest device might have had. Beside it counts by how much the device was slower than its
    fleet with all on the devices, and a little its own time.

    Args:
        starts: Index of the first device of each fleet.
        fleet: The fleet of each device.
        round_s: Seconds of the round of each.
        least_s: Seconds of a round that the slowest of its fleet may hope for.
        classic_s: Seconds of a round of its fleet with all on the devices.

    >>> one = np.zeros(1, dtype=np.int64)
    >>> regret_reward(one, one, np.array([2.0]), np.array([1.0]), np.array([4.0])).round(2).tolist()
    [-1.02]
    """
    over = round_s / np.maximum(least_s, 1e-12)
    own = np.clip(over - 1.0, 0.0, WORST)
    slowest = np.maximum.reduceat(own, starts)[fleet]
    slower = np.clip(round_s / np.maximum(classic_s, 1e-12) - 1.0, 0.0, WORST)
    earned: Array = -(own + slowest) / 2 - slower - 0.01 * np.minimum(over, WORST)
    return earned
