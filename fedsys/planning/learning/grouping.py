"""Groups of devices that an agent treats alike: by speed, and those whose links are slow.

FedAdapt clusters devices by their baseline, the time of an iteration of classic federated learning
(k-means), and keeps one more group for devices whose bandwidth is low: their baseline says nothing
of it, and another share is right for them.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LowBandwidth:
    """When a device counts as one with a slow link.

    Attributes:
        mbit_s: Below this rate, of the slower way, it does.
        hysteresis: Share by which the rate must be above that for it to count as fast again.
    """

    mbit_s: float = 5.0
    hysteresis: float = 0.2

    def holds(self, mbit_s: float, before: bool) -> bool:
        """Return whether a device is slow, given whether it was; unknown rates change nothing.

        >>> rule = LowBandwidth(5.0, 0.2)
        >>> rule.holds(4.9, False), rule.holds(5.5, True), rule.holds(6.1, True)
        (True, True, False)
        """
        if not mbit_s > 0.0:
            return before
        return mbit_s < self.mbit_s * (1.0 + self.hysteresis if before else 1.0)


def cluster(baseline_s: Sequence[float], groups: int) -> tuple[int, ...]:
    """Return the group of each device, 0 for the fastest, by k-means of one feature.

    Where there are fewer different baselines than groups, the last groups stay empty: k-means would
    give two of them one centre.

    Args:
        baseline_s: Seconds of an iteration of each device that trains alone.
        groups: Number of groups.
    """
    known = [float(seconds) for seconds in baseline_s if math.isfinite(seconds)]
    slowest = max(known, default=0.0)  # who is said to take for ever is one of the slowest
    return _clustered(tuple(float(s) if math.isfinite(s) else slowest for s in baseline_s), groups)


@functools.lru_cache(maxsize=1024)
def _clustered(baseline_s: tuple[float, ...], groups: int) -> tuple[int, ...]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    values = np.array(baseline_s)
    count = min(groups, len(np.unique(values)))
    # Seconds far above the others would otherwise be a rounding error of the distances
    scaled = (values / values.max() if values.max() > 0 else values).reshape(-1, 1)
    with warnings.catch_warnings(), threadpool_limits(1):  # a hundred times slower with two
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(count, n_init=10, random_state=0).fit_predict(scaled)
    present = sorted(set(found.tolist()), key=lambda group: values[found == group].mean())
    return tuple(present.index(group) for group in found.tolist())


def regrouped(
    baseline_s: Sequence[float],
    mbit_s: Sequence[float],
    low: Sequence[bool],
    groups: int,
    rule: LowBandwidth | None,
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the group of each device, and which of them have slow links.

    Args:
        baseline_s: Seconds of an iteration of each device that trains alone.
        mbit_s: Rate of the slower way of its link; 0 if unknown.
        low: Which had slow links before.
        groups: Number of groups; with a `rule` the last one is that of slow links.
        rule: When a link is slow; None: no group of its own.
    """
    if rule is None or groups < 2:
        return cluster(baseline_s, groups), (False,) * len(baseline_s)
    now = tuple(rule.holds(rate, was) for rate, was in zip(mbit_s, low, strict=True))
    speeds = cluster(baseline_s, groups - 1)
    return tuple(groups - 1 if slow else g for g, slow in zip(speeds, now, strict=True)), now


def representatives(
    labels: Sequence[int], seconds: Sequence[float], groups: int
) -> tuple[int | None, ...]:
    """Return the slowest member of each group; None of an empty one.

    The published code lets device 0 stand for an empty group.
    """
    found: list[int | None] = [None] * groups
    for k, group in enumerate(labels):
        best = found[group]
        if best is None or seconds[k] > seconds[best]:
            found[group] = k
    return tuple(found)
