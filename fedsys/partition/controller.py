"""Whether cuts change now: a pure function of where they are, what was seen, and what is asked.

Under the present conditions the latency of every partition is estimated; they change if the best
one is better by a margin, if what that saves exceeds what the change costs, and not too soon after
the last change. Then the change is verified: if requests take longer than before it, it is undone,
and that partition is left alone for a while.

McNamee et al. (CLOUD 2021) measure that the best cut changes with the conditions, and have no
controller; NEUKONFIG (IC2E 2021) changes cuts whenever the network does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fedsys.partition.evaluation import evaluate
from fedsys.partition.planner import solve
from fedsys.partition.problem import Partition, Problem


class Verdict(Enum):
    """What is to be done."""

    STAY = "stay"
    MOVE = "move"
    BACK = "back"


@dataclass(frozen=True)
class MoveRules:
    """When cuts change.

    Attributes:
        margin: Share by which the best partition must be faster.
        dwell_s: No change earlier after one.
        shun_s: How long a partition is left alone that did not bear out what it promised.
        horizon_s: Time in which what a change saves must exceed what it costs.
    """

    margin: float = 0.1
    dwell_s: float = 5.0
    shun_s: float = 60.0
    horizon_s: float = 30.0


@dataclass(frozen=True)
class StandingCuts:
    """Where the cuts are, and how they came there.

    Attributes:
        partition: Who computes what.
        since_s: When the last change was.
        before: What was before it, as long as it is not verified.
        took_before_s: How long requests took before it.
        shunned: Until when partitions are left alone, by cuts.
    """

    partition: Partition
    since_s: float = -1e9
    before: Partition | None = None
    took_before_s: float | None = None
    shunned: Mapping[tuple[int, ...], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sight:
    """What was seen.

    Attributes:
        time_s: When.
        problem: The problem under the present conditions.
        took_s: How long requests take since the last change, measured; None: not known.
        requests_per_s: How many there are.
        move_s: What a change is expected to cost requests, in seconds of waiting altogether.
        among: The partitions that are looked at; empty: all.
    """

    time_s: float
    problem: Problem
    took_s: float | None = None
    requests_per_s: float = 0.0
    move_s: float = 0.0
    among: tuple[Partition, ...] = ()


@dataclass(frozen=True)
class MoveDecision:
    """What was decided, and why.

    Attributes:
        verdict: What is to be done.
        partition: Who is to compute what.
        now_s: Estimated latency of the present partition.
        best_s: Estimated latency of the best one.
        reason: In words.
    """

    verdict: Verdict
    partition: Partition
    now_s: float
    best_s: float
    reason: str


def decide_move(
    place: StandingCuts, sight: Sight, rules: MoveRules
) -> tuple[StandingCuts, MoveDecision]:
    """Return the next place and what was decided; whoever carries it out may fail.

    Args:
        place: Where the cuts are.
        sight: What was seen.
        rules: When cuts change.
    """
    now = evaluate(sight.problem, place.partition).latency_s
    dwelt = sight.time_s - place.since_s >= rules.dwell_s
    if not dwelt:
        return place, MoveDecision(Verdict.STAY, place.partition, now, now, "changed just now")
    place, undone = _verified(place, sight, rules)
    if undone is not None:
        reason = f"requests take longer than before: {_ms(sight.took_s)}"
        return place, MoveDecision(Verdict.BACK, undone, now, now, reason)
    best = _best(place, sight)
    if best is None or best.cuts == place.partition.cuts:
        return place, MoveDecision(Verdict.STAY, place.partition, now, now, "the best already")
    there = evaluate(sight.problem, best).latency_s
    saved = (now - there) * sight.requests_per_s * rules.horizon_s
    if there > now * (1 - rules.margin):
        reason = f"{_ms(there)} instead of {_ms(now)} is within the margin"
    elif sight.move_s > saved:
        reason = f"it would save {_ms(saved)} and cost {_ms(sight.move_s)}"
    else:
        reason = f"{_ms(there)} instead of {_ms(now)}"
        moved = dataclasses.replace(
            place, partition=best, since_s=sight.time_s, before=place.partition,
            took_before_s=sight.took_s,
        )  # fmt: skip
        return moved, MoveDecision(Verdict.MOVE, best, now, there, reason)
    return place, MoveDecision(Verdict.STAY, place.partition, now, there, reason)


def _verified(
    place: StandingCuts, sight: Sight, rules: MoveRules
) -> tuple[StandingCuts, Partition | None]:
    """Return the place when the last change has been looked at, and what to go back to."""
    if place.before is None or sight.took_s is None:
        return place, None
    before, took = place.before, place.took_before_s
    settled = dataclasses.replace(place, before=None, took_before_s=None)
    if took is None or sight.took_s <= took * (1 + rules.margin):
        return settled, None
    shunned = {**place.shunned, place.partition.cuts: sight.time_s + rules.shun_s}
    back = dataclasses.replace(settled, partition=before, since_s=sight.time_s, shunned=shunned)
    return back, before


def _best(place: StandingCuts, sight: Sight) -> Partition | None:
    def shunned(partition: Partition) -> bool:
        return place.shunned.get(partition.cuts, -1e18) > sight.time_s

    if sight.among:
        left = [one for one in sight.among if not shunned(one)]
        return min(left, key=lambda one: evaluate(sight.problem, one).latency_s, default=None)
    best = solve(sight.problem)
    return None if best is None or shunned(best) else best


def _ms(seconds: float | None) -> str:
    """Return a duration with three digits.

    >>> _ms(0.0375), _ms(1.418), _ms(None)
    ('37.5 ms', '1.42 s', 'unknown')
    """
    if seconds is None:
        return "unknown"
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
