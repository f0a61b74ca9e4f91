"""How long a device that left may take until it is somewhere again.

A device that reaches no edge server goes on trying for as long as its round took so far
(`fedsys.offload.remote`), and says so when it gives up. One that nobody hears of any more is given
twice that time, and then the round goes on without it.
"""

from __future__ import annotations

from typing import Final

LEAST_S: Final = 20.0
"""Seconds that count for a device that left sooner in its round."""

TIMES: Final = 2.0


def limit_s(began_s: float, gone_s: float, away_s: float = 0.0) -> float:
    """Return the seconds after which a device that left is not waited for any more.

    >>> limit_s(began_s=100.0, gone_s=160.0)
    120.0

    Args:
        began_s: When it began its round.
        gone_s: When it was gone, by the same clock.
        away_s: Seconds for which it is known to be out of reach.
    """
    return TIMES * max(LEAST_S, gone_s - began_s) + away_s
