"""What is believed of how fast machines compute, where that depends on what is planned.

How much slower a machine is than its profile is measured while it does what was planned for it. One
that several sessions, or other processes, share is slow because much was planned for it: believed
at once, that takes the work away, the machine is seen to be fast, and the work comes back, round
after round. So what goes on in the direction of the change before it is believed whole, and what
turns back half of the way, on the logarithmic scale of factors. Two measurements that alternate are
believed with the cube root of their ratio, so that plans come to rest, and a machine that truly
became fast again is believed to be so in the second round.

Rates of links are not damped (`fedsys.planning.measured_rates`): a link's rate is its own.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

LEAST: Final = 1e-4
MOST: Final = 1e4
"""Least and most times slower than its profile that a machine is believed to be."""


def believed(before: float, went: int, now: float, drift: float) -> tuple[float, int]:
    """Return the factor that is believed after a measurement, and which way it went.

    Args:
        before: By how many times a machine was believed to be slower than its profile.
        went: Which way that changed last: 1 slower, -1 faster, 0 not yet.
        now: By how many times it was measured to be slower.
        drift: Relative change from which on what is measured is believed.
    """
    now = min(max(now, LEAST), MOST)
    if abs(now / before - 1) <= drift:
        return before, went
    way = 1 if now > before else -1
    return (sqrt(before * now) if way == -went else now), way
