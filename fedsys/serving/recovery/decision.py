"""Which technique answers on after a failure: a pure function of small records.

CONTINUER (Abdul Majeed et al., IEEE EDGE 2022) chooses among repartitioning, early exit and skip
connection by accuracy, latency and downtime, under thresholds of the user. Its formula is not
public; ours:

1. *Feasible first.* Only candidates that keep to all thresholds are compared, if there are any.
2. *Weighted score.* Each of the three is put on a scale from 0 (worst) to 1 (best) over the
   candidates that are compared; the score is the sum of these, weighted. Only the ratio of weights
   counts. A scale spans at least `RecoveryObjective.resolution` of its largest value: else a
   difference below the error of an estimate would weigh as much as the largest that is possible.
3. *Least violation.* If none is feasible, the one whose relative violations, weighted, add up to
   least; ties are decided by the score. The reason says so.

So no candidate is chosen if another is at least as good in all three and better in one; a larger
weight never leads to a choice that is worse in what it weighs, as long as candidates stay; and the
unit of a quantity does not matter (`tests/serving/recovery/test_decision.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedsys.config.serving import TECHNIQUES, ObjectiveConfig, WeightsConfig
from fedsys.errors import ConfigError, RuntimeFailure


@dataclass(frozen=True, slots=True)
class RecoveryCandidate:
    """One way to answer on.

    Attributes:
        technique: One of `fedsys.config.serving.TECHNIQUES`.
        path: Which one of its kind, as ``exit:5``, ``skip:4-7``, ``5/9`` or the name of a variant.
        latency_ms: Time of a request by it, predicted or measured.
        accuracy: Share of right answers, in [0, 1].
        downtime_ms: Time without an answer until it answers.
        measured: Which of these were measured: ``latency``, ``accuracy``, ``downtime``; the others
            are estimates.

    Raises:
        ConfigError: A value is not finite or out of range.
    """

    technique: str
    path: str
    latency_ms: float
    accuracy: float
    downtime_ms: float
    measured: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.technique not in TECHNIQUES:
            rule = f"must be one of {', '.join(TECHNIQUES)}"
            raise ConfigError.of("candidate.technique", self.technique, rule)
        for key in ("latency_ms", "downtime_ms"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise ConfigError.of(f"candidate.{key}", getattr(self, key), "must be finite, >= 0")
        if not 0.0 <= self.accuracy <= 1.0:
            raise ConfigError.of("candidate.accuracy", self.accuracy, "must be in [0, 1]")


@dataclass(frozen=True, slots=True)
class RecoveryObjective:
    """What is asked of the way to answer on.

    Attributes:
        accuracy: Least accuracy, in [0, 1]; None: any.
        latency_ms: Longest time of a request; None: any.
        downtime_ms: Longest time without an answer; None: any.
        weights: How much each of the three counts among feasible candidates.
        resolution: Share of the largest value that a scale spans at least, in [0, 1].
        techniques: Those that may be chosen.
    """

    accuracy: float | None = None
    latency_ms: float | None = None
    downtime_ms: float | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    resolution: float = 0.05
    techniques: tuple[str, ...] = TECHNIQUES

    @classmethod
    def of(cls, config: ObjectiveConfig) -> RecoveryObjective:
        """Return what the group ``serving.objective`` asks for."""
        return cls(
            accuracy=config.accuracy,
            latency_ms=config.p95_ms if config.latency_ms is None else config.latency_ms,
            downtime_ms=config.downtime_ms,
            weights=config.weights,
            resolution=config.resolution,
            techniques=config.techniques,
        )

    def steady(self) -> RecoveryObjective:
        """Return the objective for what is prepared while another technique answers.

        It may take its time to come: its downtime is no gap, and counts for nothing.
        """
        weights = replace(self.weights, downtime=0.0)
        if not weights.accuracy + weights.latency:  # the gap alone was to count
            weights = replace(weights, accuracy=1.0, latency=1.0)
        return replace(self, downtime_ms=None, weights=weights)


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate and what the objective makes of it.

    Attributes:
        candidate: The candidate.
        violations: By how much it misses each threshold, as a share of it; those that it misses.
        score: Weighted sum of its places on the three scales, over the sum of the weights, in
            [0, 1]; of infeasible candidates over all of them.
    """

    candidate: RecoveryCandidate
    violations: dict[str, float]
    score: float

    @property
    def feasible(self) -> bool:
        """Whether it keeps to all thresholds."""
        return not self.violations


@dataclass(frozen=True, slots=True)
class RecoveryDecision:
    """What was chosen, and out of what.

    Attributes:
        choice: The candidate.
        feasible: Whether it keeps to all thresholds; if not, none does.
        candidates: All that were allowed, best first.
    """

    choice: RecoveryCandidate
    feasible: bool
    candidates: tuple[Scored, ...]

    @property
    def reason(self) -> str:
        """Why, as a sentence for people."""
        return _reason(self.candidates)


def choose(
    candidates: Sequence[RecoveryCandidate], objective: RecoveryObjective
) -> RecoveryDecision:
    """Choose among ways to answer on.

    Args:
        candidates: What can be done; the order decides nothing.
        objective: What is asked for.

    Raises:
        RuntimeFailure: There is no candidate, or none of an allowed technique.
    """
    allowed = [c for c in candidates if c.technique in objective.techniques]
    if not allowed:
        there = ", ".join(sorted({c.technique for c in candidates})) or "nothing"
        raise RuntimeFailure(
            f"no way to answer on: {there} is possible, and "
            f"serving.objective.techniques allows {', '.join(objective.techniques)}"
        )
    values = [(c.accuracy, -c.latency_ms, -c.downtime_ms) for c in allowed]
    weights, missed = _weights(objective), [_missed(each, objective) for each in values]
    kept = [value for value, misses in zip(values, missed, strict=True) if not any(misses)]
    every, among = _scales(values, objective), _scales(kept or values, objective)
    ranked = []
    for one, value, misses in zip(allowed, values, missed, strict=True):
        fails = any(misses)
        score = _score(value, every if fails else among, weights)
        violation = (_weighted(misses, weights), sum(misses)) if fails else (0.0, 0.0)
        key = (
            *(fails, *violation, -score, -value[0], -value[1], -value[2]),
            *(one.technique, one.path),  # what decides where all else is equal
        )
        ranked.append((key, Scored(one, _named(misses) if fails else {}, score)))
    ranked.sort(key=lambda pair: pair[0])
    best = ranked[0][1]
    return RecoveryDecision(best.candidate, best.feasible, tuple(each for _, each in ranked))


# --------------------------------------------------------------------------------------------------
# The rule. A value is a triple: accuracy, latency and downtime, the times negated, so that more is
# better of all three. What is added up is added in this order: what is nowhere worse has then no
# smaller sum, whatever is rounded. With the dozen candidates that there are plain numbers take a
# fifth of the time of arrays, and the first decision after an hour no longer than the next.

_KEYS = ("accuracy", "latency", "downtime")
_TINY = sys.float_info.min

Triple = tuple[float, float, float]


def _weights(objective: RecoveryObjective) -> Triple:
    weights = objective.weights
    total = weights.accuracy + weights.latency + weights.downtime
    return weights.accuracy / total, weights.latency / total, weights.downtime / total


def _missed(value: Triple, objective: RecoveryObjective) -> Triple:
    """Return by which share of its threshold each value misses it; 0 where it keeps to it."""
    least, latency, downtime = objective.accuracy, objective.latency_ms, objective.downtime_ms
    return (
        0.0 if least is None else _short(value[0], least),
        0.0 if latency is None else _short(value[1], -latency),
        0.0 if downtime is None else _short(value[2], -downtime),
    )


def _short(value: float, bound: float) -> float:
    if value >= bound:
        return 0.0
    return (bound - value) / max(abs(bound), _TINY)  # a threshold of 0: by infinitely much


def _named(missed: Triple) -> dict[str, float]:
    return {key: share for key, share in zip(_KEYS, missed, strict=True) if share}


def _weighted(values: Triple, weights: Triple) -> float:
    """Return the weighted sum; what has no weight counts for nothing, also if it is infinite."""
    first, second, third = weights
    total = values[0] * first if first else 0.0
    if second:
        total += values[1] * second
    return total + values[2] * third if third else total


def _scales(values: Sequence[Triple], objective: RecoveryObjective) -> tuple[Triple, Triple]:
    """Return the best of each quantity, and what its scale spans; 1 where all are equal."""
    best, spans = [], []
    for column in zip(*values, strict=True):
        most, least = max(column), min(column)
        span = max(most - least, objective.resolution * max(abs(most), abs(least)))
        best.append(most)
        spans.append(span if span > 0.0 else 1.0)
    return (best[0], best[1], best[2]), (spans[0], spans[1], spans[2])


def _score(value: Triple, scales: tuple[Triple, Triple], weights: Triple) -> float:
    """Return the score of a candidate on scales."""
    (a, b, c), (d, e, f) = scales
    behind = (a - value[0]) / d, (b - value[1]) / e, (c - value[2]) / f
    return 1.0 - _weighted(behind, weights)


def _reason(ranked: Sequence[Scored]) -> str:
    best, chosen = ranked[0], ranked[0].candidate
    what = (
        f"{chosen.technique} {chosen.path}: accuracy {chosen.accuracy:.4f}, "
        f"{chosen.latency_ms:.4g} ms, {chosen.downtime_ms:.4g} ms without an answer"
    )
    if not best.feasible:
        misses = ", ".join(f"{key} by {share:.1%}" for key, share in best.violations.items())
        return f"no candidate keeps to the objective; {what} misses it least: {misses}"
    others = [each for each in ranked[1:] if each.feasible]
    left = len(ranked) - 1 - len(others)
    out = f"; {left} of {len(ranked)} candidates miss the objective" if left else ""
    if not others:
        alone = "only candidate" if len(ranked) == 1 else "only one that keeps to the objective"
        return f"{what}; the {alone}{out}"
    second = others[0].candidate
    return (
        f"{what}; score {best.score:.3f}, next {second.technique} {second.path} with "
        f"{others[0].score:.3f}{out}"
    )
