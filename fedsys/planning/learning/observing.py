"""What an agent sees, what it says, and what it is rewarded for: pure functions.

State, of G groups (2G numbers, or 3G with bandwidth), each by its slowest member::

    seconds of an iteration T_g: log10 T_g / B_g, with the seconds B_g of the baseline
    share of the work that is on the device, u_g
    log10 of the seconds in which a batch would cross the first cut both ways, over B_g

An empty group has the state of a device that trains alone. Seconds over the baseline do not depend
on the model or on how fast devices are, and their logarithm tells a tenth from a twentieth.
FedAdapt's code feeds raw seconds (``times="seconds"``) and rewards shares that are saved
(``reward="saved"``): what is twice as fast as a tenth of the baseline earns 0.05 more there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

MOST: Final = 2.0
"""Largest logarithm that is told apart."""

Reward = Callable[[Sequence[float], Sequence[float]], float]
"""Of seconds of an iteration, and of those of the baseline."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one device.

    Attributes:
        baseline_s: Seconds of an iteration alone.
        iteration_s: Seconds of an iteration as it trains now.
        share: Share of the work that it keeps.
        crossing_s: Seconds in which a batch would cross the first cut both ways; 0 if unknown.
    """

    baseline_s: float
    iteration_s: float
    share: float
    crossing_s: float = 0.0


def state_of(
    members: Sequence[Seen | None], *, bandwidth: bool = False, times: str = "log"
) -> Vector:
    """Return the agent's state.

    Args:
        members: The slowest member of each group; None of an empty one.
        bandwidth: Whether bandwidth is a part of it.
        times: ``log`` of the ratio to the baseline, or ``seconds``.
    """
    alone = Seen(1.0, 1.0, 1.0)
    known = [member or alone for member in members]
    parts = [
        [m.iteration_s if times == "seconds" else _log(m.iteration_s, m) for m in known],
        [m.share for m in known],
    ]
    if bandwidth:
        parts.append([_log(m.crossing_s, m) for m in known])
    return np.array([value for part in parts for value in part], dtype=np.float32)


def _log(seconds: float, seen: Seen) -> float:
    return log_ratio(seconds, seen.baseline_s)


def log_ratio(seconds: float, others: float) -> float:
    """Return the logarithm to base 10 of a ratio, within what is told apart; 0 if unknown."""
    if not (seconds > 0 and others > 0):
        return 0.0
    # Of the ratio itself there may be none: it is beyond what a number can be
    return min(MOST, max(-MOST, math.log10(seconds) - math.log10(others)))


def share_of(action: float) -> float:
    """Return the share of the work that an action in [-1, 1] asks for.

    Actions lie around 0: in [0, 1] an untrained Gaussian is clipped most of the time.
    """
    return (min(1.0, max(-1.0, action)) + 1.0) / 2.0


def action_of(share: float) -> float:
    """Return the action that asks for a share of the work."""
    return 2.0 * share - 1.0


def nearest(shares: Sequence[float], wanted: float) -> int:
    """Return the index of the legal share nearest to what is wanted; of two equal ones the last.

    VGG-5 with FedAdapt's offloading points:

    >>> [nearest((0.1042, 0.6601, 0.9381, 1.0), a) for a in (0.38, 0.39, 0.79, 0.80, 0.968, 0.97)]
    [0, 1, 1, 2, 2, 3]
    """
    return min(range(len(shares)), key=lambda i: (abs(shares[i] - wanted), -i))


def log_reward(iteration_s: Sequence[float], baseline_s: Sequence[float]) -> float:
    """Return what a step is worth: how many times as fast the slowest device is, and a little more.

    The logarithm to base 10 of the slowest baseline over the slowest device, and a tenth of the
    mean of that of each, so that no device is slower without need. Ours: a round takes as long as
    its slowest device, and what counts of it is the ratio to the best that there is.

    >>> log_reward([0.1], [1.0]), round(log_reward([0.1, 1.0], [1.0, 1.0]), 3)
    (1.1, 0.05)
    """
    slowest = log_ratio(max(baseline_s), max(iteration_s))
    each = [log_ratio(b, now) for now, b in zip(iteration_s, baseline_s, strict=True)]
    return slowest + 0.1 * sum(each) / len(each)


def reward(iteration_s: Sequence[float], baseline_s: Sequence[float]) -> float:
    """Return what a step is worth: over all devices, the share of the time that is saved.

    >>> reward([1.0], [1.0]), reward([0.5], [1.0]), reward([2.0], [1.0])
    (0.0, 0.5, -0.5)

    Source: FedAdapt, published code; each device counts from -1 to 1.
    """
    return sum(
        1.0 - now / base if now < base else base / now - 1.0
        for now, base in zip(iteration_s, baseline_s, strict=True)
    )


def mean_reward(iteration_s: Sequence[float], baseline_s: Sequence[float]) -> float:
    """Return `reward` for each device, so that fleets of all sizes weigh the same."""
    return reward(iteration_s, baseline_s) / len(baseline_s)


REWARDS: Final[Mapping[str, Reward]] = {"log": log_reward, "saved": mean_reward}
"""What is rewarded, by its name in the configuration."""


def in_vain(iteration_s: Sequence[float], baseline_s: Sequence[float]) -> bool:
    """Return whether the slowest device is no faster than without offloading: an episode ends."""
    return max(iteration_s) >= max(baseline_s)
