"""When a link is so poor that its device goes to another edge server, and when not again.

A device goes when its link has been poor for a while: a rate below a threshold, or a latency above
one. Then it stays wherever it is until the link was good again, which takes more than to be above
the threshold: so neither a link that wavers about it nor one that is poor everywhere sends a device
to and fro. Where rate or latency are on their way across the threshold, the move is foreseen.

Pure: what was known, and what is seen, to what is to be done. Devices that measure their link and
links that are modelled (`fedsys.planning.mobility.network_led`) are judged by the same function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TREND_S = 2.0
"""Seconds over which a trend is taken at least."""

Due = Literal["", "foresee", "leave", "remain"]


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What a link must carry.

    Attributes:
        below_bits_s: Rate, of the slower direction, below which it is poor; 0: rates do not count.
        above_s: Latency, one way, above which it is poor; infinite: latency does not count.
        hysteresis: Share by which it must be better than that to be good again.
        steady_s: Seconds for which it must have been poor, or good.
        foresee_s: Seconds for which a trend is followed; 0: nothing is foreseen.
    """

    below_bits_s: float = 0.0
    above_s: float = math.inf
    hysteresis: float = 0.2
    steady_s: float = 3.0
    foresee_s: float = 5.0

    def is_poor(self, rate: float, latency_s: float) -> bool:
        """Return whether a link is poor."""
        return rate < self.below_bits_s or latency_s > self.above_s

    def is_good(self, rate: float, latency_s: float) -> bool:
        """Return whether a link is good: better than what is not poor."""
        enough = rate >= (1 + self.hysteresis) * self.below_bits_s
        return enough and latency_s <= self.above_s / (1 + self.hysteresis)

    def in_words(self, rate: float, latency_s: float) -> str:
        """Return why a device leaves.

        >>> LinkLimits(below_bits_s=1e7).in_words(3.21e6, 0.01)
        'its link carried 3.2 Mbit/s, less than 10'
        """
        if rate < self.below_bits_s:
            least = self.below_bits_s / 1e6
            return f"its link carried {rate / 1e6:.1f} Mbit/s, less than {least:g}"
        return f"its link took {1e3 * latency_s:.1f} ms, more than {1e3 * self.above_s:g}"


@dataclass(frozen=True, slots=True)
class LinkWatch:
    """What is known of a link.

    Attributes:
        armed: Whether the device may go because of it.
        since_s: Since when it is poor, or, where it is not armed, good; None: it is not.
        foreseen: Whether it was said that the device will go.
        marks: When it was looked at some seconds ago, with rate and latency then: the newest, and
            one that is `TREND_S` older at least.
    """

    armed: bool = True
    since_s: float | None = None
    foreseen: bool = False
    marks: tuple[tuple[float, float, float], ...] = ()


def observed(
    watch: LinkWatch, limits: LinkLimits, now_s: float, rate: float, latency_s: float
) -> tuple[LinkWatch, Due]:
    """Take in what a link carries now; return what is known then, and what is due.

    Args:
        watch: What was known.
        limits: What it must carry.
        now_s: When; never earlier than before.
        rate: Bits per second of the slower direction.
        latency_s: One way.

    Returns:
        ``foresee``: the device will probably leave soon; ``remain``: it will not after all;
        ``leave``: it leaves.
    """
    poor = limits.is_poor(rate, latency_s)
    counts = poor if watch.armed else limits.is_good(rate, latency_s)
    since = (now_s if watch.since_s is None else watch.since_s) if counts else None
    marks = watch.marks
    if not marks or now_s - marks[-1][0] >= TREND_S:
        marks = (*marks[-1:], (now_s, rate, latency_s))
    steady = since is not None and now_s - since >= limits.steady_s
    if not watch.armed:
        if steady:
            return LinkWatch(marks=marks), ""
        return LinkWatch(False, since, marks=marks), ""
    if steady:
        return LinkWatch(armed=False, marks=marks), "leave"
    comes = limits.foresee_s > 0 and (poor or _will_be(watch, limits, now_s, rate, latency_s))
    due: Due = ""
    if comes != watch.foreseen:
        due = "foresee" if comes else "remain"
    return LinkWatch(True, since, comes, marks), due


def _will_be(
    watch: LinkWatch, limits: LinkLimits, now_s: float, rate: float, latency_s: float
) -> bool:
    """Return whether a link would be poor soon if it went on as it goes."""
    old = [mark for mark in watch.marks if now_s - mark[0] >= TREND_S]  # less is noise
    if not old or not (math.isfinite(rate) and math.isfinite(old[-1][1])):
        return False
    then_s, rate_then, latency_then = old[-1]
    share = limits.foresee_s / (now_s - then_s)
    ahead = rate + share * (rate - rate_then)
    later = latency_s + share * (latency_s - latency_then)
    return limits.is_poor(ahead, later)
