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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

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
        reason: Why, as a sentence for people.
        candidates: All that were allowed, best first.
    """

    choice: RecoveryCandidate
    feasible: bool
    reason: str
    candidates: tuple[Scored, ...]


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
    allowed.sort(key=lambda c: (c.technique, c.path))  # what decides where all else is equal
    values = np.array([(c.accuracy, -c.latency_ms, -c.downtime_ms) for c in allowed])
    weights = _weights(objective)
    missed = _missed(values, objective)
    misses = np.asarray(missed.any(1))
    kept = values if misses.all() else values[~misses]
    every = _score(values, values, weights, objective.resolution)
    scores = np.where(misses, every, _score(values, kept, weights, objective.resolution))
    keys = (*-values.T[::-1], -scores, missed.sum(1), _weighted(missed, weights), misses)
    shares, places = missed.tolist(), scores.tolist()
    ranked = tuple(
        Scored(allowed[i], _named(shares[i]), places[i]) for i in np.lexsort(keys).tolist()
    )
    best = ranked[0]
    return RecoveryDecision(best.candidate, best.feasible, _reason(ranked), ranked)


# --------------------------------------------------------------------------------------------------
# The rule. Arrays have a row for each candidate and three columns: accuracy, latency and downtime,
# the times negated, so that more is better of all three. Columns are added one after the other:
# what is nowhere worse has then no smaller sum, whatever is rounded.

_KEYS = ("accuracy", "latency", "downtime")

Floats = NDArray[np.float64]


def _weights(objective: RecoveryObjective) -> Floats:
    weights = objective.weights
    given = np.array([weights.accuracy, weights.latency, weights.downtime])
    shares: Floats = given / given.sum()
    return shares


def _missed(values: Floats, objective: RecoveryObjective) -> Floats:
    """Return by which share of its threshold each value misses it; 0 where it keeps to it."""
    least = -math.inf if objective.accuracy is None else objective.accuracy
    most = [objective.latency_ms, objective.downtime_ms]
    bounds = np.array([least, *(-math.inf if bound is None else -bound for bound in most)])
    with np.errstate(over="ignore"):  # a threshold of 0 is missed by infinitely much
        of = np.maximum(np.abs(bounds), np.finfo(np.float64).tiny)
        shares: Floats = np.maximum(bounds - values, 0.0) / of
    return shares


def _named(missed: list[float]) -> dict[str, float]:
    return {key: share for key, share in zip(_KEYS, missed, strict=True) if share}


def _weighted(values: Floats, weights: Floats) -> Floats:
    total: Floats = np.zeros(len(values))
    for column, weight in zip(values.T, weights, strict=True):
        total = total + column * weight if weight else total
    return total


def _score(values: Floats, among: Floats, weights: Floats, resolution: float) -> Floats:
    """Return the scores of candidates on the scales that `among` spans."""
    best, least = among.max(0), among.min(0)
    spans = np.maximum(best - least, resolution * np.maximum(np.abs(best), np.abs(least)))
    behind: Floats = (best - values) / np.where(spans > 0.0, spans, 1.0)
    scores: Floats = 1.0 - _weighted(behind, weights)
    return scores


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
