"""When a host counts as lost: a pure function of heartbeats, round trips and the clock.

::

                answer                    silent for a deadline        and for another one
    ALIVE ◀──────────────── SUSPECTED ◀───────────────── ALIVE          SUSPECTED ──▶ LOST
      ▲                                                                                │
      └────────── answers for `dwell_s` ────────── RETURNING ◀──────── an answer ──────┘

A deadline is `patience` times the usual round trip: the smoothed mean and four smoothed deviations
of it, as TCP waits for an acknowledgement (Jacobson and Karels, SIGCOMM 1988; RFC 6298). So with
`patience` 3 answers that take three times the usual time are neither a failure nor suspicious.
Accrual detectors (Hayashibara et al., SRDS 2004) take the spacing of heartbeats that come by
themselves instead, which a change of latency disturbs. A connection that ends is a verdict at once.

Time in which nobody looked does not count as silence: whoever was paused accuses nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

_GAIN, _SPREAD_GAIN, _SPREADS = 1 / 8, 1 / 4, 4.0  # RFC 6298
_FIRST_S = 2.0  # for the first round trip: nothing is usual yet
_UNANSWERED = 64  # heartbeats under way; further ones tell nothing more


class Health(Enum):
    """What is believed of a host."""

    ALIVE = "alive"
    SUSPECTED = "suspected"
    LOST = "lost"
    RETURNING = "returning"

    @property
    def usable(self) -> bool:
        """Whether requests may pass it."""
        return self in (Health.ALIVE, Health.SUSPECTED)


@dataclass(frozen=True)
class DetectorRules:
    """How patient the verdict is.

    Attributes:
        interval_s: From one heartbeat to the next, in seconds.
        floor_s: Silence that is never suspicious, in seconds, however short round trips are.
        ceiling_s: Silence that is suspicious, in seconds, however unsteady round trips are, if it
            is `patience` usual ones: on a busy machine their spread alone came to seconds.
        patience: Usual round trips that are waited for.
        dwell_s: How long a host that was lost must answer before it is used again, in seconds.
    """

    interval_s: float = 0.05
    floor_s: float = 0.1
    ceiling_s: float = 1.0
    patience: float = 3.0
    dwell_s: float = 5.0


@dataclass(frozen=True)
class Heart:
    """What is known of one host.

    Attributes:
        health: What is believed of it.
        mean_s: Smoothed round trip; None before the first.
        spread_s: Smoothed deviation from it.
        under_way: Heartbeats without an answer: number, and `watched_s` when each was sent.
        watched_s: Time in which somebody looked.
        looked_s: When somebody looked last, by the clock.
        since_s: `watched_s` of the last change of `health`.
        why: Of the last verdict, in words.
        leaves: Whether it wants to be left out, because it is about to end.
    """

    health: Health = Health.ALIVE
    mean_s: float | None = None
    spread_s: float = 0.0
    under_way: tuple[tuple[int, float], ...] = ()
    watched_s: float = 0.0
    looked_s: float | None = None
    since_s: float = 0.0
    why: str = ""
    leaves: bool = False

    @property
    def silent_s(self) -> float:
        """How long the oldest heartbeat under way has waited."""
        return self.watched_s - self.under_way[0][1] if self.under_way else 0.0

    @property
    def full(self) -> bool:
        """Whether another heartbeat would tell nothing more."""
        return len(self.under_way) >= _UNANSWERED


def deadline_s(heart: Heart, rules: DetectorRules) -> float:
    """Return how long an answer may take before its absence means something, in seconds."""
    if heart.mean_s is None:
        return max(_FIRST_S, 10 * rules.floor_s)
    steady = rules.patience * heart.mean_s
    unsteady = rules.patience * (heart.mean_s + _SPREADS * heart.spread_s)
    return max(rules.floor_s, steady, min(unsteady, rules.ceiling_s))


def sent(heart: Heart, number: int) -> Heart:
    """Return the state after a heartbeat was sent."""
    return replace(heart, under_way=(*heart.under_way, (number, heart.watched_s)))


def answered(heart: Heart, number: int, took_s: float, leaves: bool = False) -> Heart:
    """Return the state after the answer to a heartbeat; those before it have arrived, too.

    Args:
        heart: The state.
        number: Of the heartbeat.
        took_s: Its round trip by the clock, in seconds.
        leaves: Whether the host says that it wants to be left out.
    """
    left = tuple(one for one in heart.under_way if one[0] > number)
    heart = replace(heart, under_way=left, leaves=leaves)
    if heart.health is Health.LOST:  # what was under way meanwhile says nothing of round trips
        return _become(heart, Health.RETURNING, "it answers again")
    if heart.mean_s is None:
        heart = replace(heart, mean_s=took_s, spread_s=took_s / 2)
    else:
        spread = heart.spread_s + _SPREAD_GAIN * (abs(took_s - heart.mean_s) - heart.spread_s)
        mean = heart.mean_s + _GAIN * (took_s - heart.mean_s)
        heart = replace(heart, mean_s=mean, spread_s=spread)
    return _become(heart, Health.ALIVE) if heart.health is Health.SUSPECTED else heart


def ended(heart: Heart, why: str) -> Heart:
    """Return the state after a connection to the host ended: a verdict at once."""
    heart = replace(heart, under_way=(), leaves=False)
    return heart if heart.health is Health.LOST else _become(heart, Health.LOST, why)


def look(heart: Heart, now_s: float, rules: DetectorRules) -> Heart:
    """Return the state at a moment.

    Args:
        heart: The state.
        now_s: The clock, in seconds.
        rules: How patient the verdict is.
    """
    passed = 0.0 if heart.looked_s is None else now_s - heart.looked_s
    watched = heart.watched_s + min(passed, 2 * rules.interval_s)
    heart = replace(heart, watched_s=watched, looked_s=now_s)
    bound, here = deadline_s(heart, rules), heart.watched_s - heart.since_s
    match heart.health:
        case Health.ALIVE if heart.silent_s > bound:
            return _become(heart, Health.SUSPECTED)
        case Health.SUSPECTED if here > bound:
            return _become(heart, Health.LOST, f"silent for {1e3 * heart.silent_s:.0f} ms")
        case Health.RETURNING if heart.silent_s > bound:
            return _become(heart, Health.LOST, "silent again")
        case Health.RETURNING if here >= rules.dwell_s:
            return _become(heart, Health.ALIVE)
    return heart


def _become(heart: Heart, health: Health, why: str = "") -> Heart:
    return replace(heart, health=health, since_s=heart.watched_s, why=why or heart.why)
