"""Whether decisions are those of an oracle that has measured what they only expect.

The oracle chooses among the same candidates by the same rule, with measured latencies. Where both
differ, the *regret* says what that costs: by how much the score of the choice lies below that of
the oracle's, with what each is really like, and by how much more it misses thresholds. Scores are
in [0, 1].
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedsys.config.serving import WeightsConfig
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective, choose

_SEED = 1
_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)


@dataclass(frozen=True)
class Judged:
    """What the oracle says of a decision, and of others with the same candidates.

    Attributes:
        best: Route that it chooses by the objective itself.
        agrees: Whether that was decided.
        regret: Of what was decided.
        cells: Objectives of the grid.
        regrets: Of those of them for which something else was decided.
        misses: By how much each expected latency is off, relative to the measured one.
    """

    best: str
    agrees: bool
    regret: float
    cells: int
    regrets: tuple[float, ...]
    misses: tuple[float, ...]


def judge(
    expected: Sequence[RecoveryCandidate],
    measured: Sequence[RecoveryCandidate],
    objective: RecoveryObjective,
    grid: int,
) -> Judged:
    """Compare decisions by what was expected with those by what was measured.

    Args:
        expected: Candidates as decided on.
        measured: The same, in this order, with latencies that were measured.
        objective: By which was decided.
        grid: Further objectives.
    """
    best, regret = _compared(expected, measured, objective)
    regrets = []
    for other in grid_of(measured, grid):
        found, cost = _compared(expected, measured, other)
        if cost is not None and found:
            regrets.append(cost)
    misses = tuple(
        abs(e.latency_ms / m.latency_ms - 1) for e, m in zip(expected, measured, strict=True)
    )
    return Judged(best, regret is None, regret or 0.0, grid, tuple(regrets), misses)


def grid_of(measured: Sequence[RecoveryCandidate], count: int) -> Iterator[RecoveryObjective]:
    """Yield objectives, the same for the same candidates: weights, and thresholds among them."""
    draw = random.Random(_SEED)
    latencies = sorted(one.latency_ms for one in measured)
    accuracies = sorted(one.accuracy for one in measured)
    for _ in range(count):
        weights = WeightsConfig(*(draw.choice(_WEIGHTS) for _ in range(3)))
        if not weights.accuracy + weights.latency + weights.downtime:
            weights = WeightsConfig()
        objective = RecoveryObjective(weights=weights)
        if draw.random() < 0.5:
            bound = draw.uniform(latencies[0], 1.2 * latencies[-1])
            objective = replace(objective, latency_ms=bound)
        if draw.random() < 0.5:
            objective = replace(objective, accuracy=draw.uniform(accuracies[0], accuracies[-1]))
        yield objective


def _compared(
    expected: Sequence[RecoveryCandidate],
    measured: Sequence[RecoveryCandidate],
    objective: RecoveryObjective,
) -> tuple[str, float | None]:
    """Return the oracle's route, and the regret of what is decided; None where it is the same."""
    allowed = [one.path for one in expected if one.technique in objective.techniques]
    if not allowed:
        return "", None
    decided = choose(expected, objective).choice.path
    truth = {each.candidate.path: each for each in choose(measured, objective).candidates}
    best = choose(measured, objective).choice.path
    if decided == best:
        return best, None
    score = max(0.0, truth[best].score - truth[decided].score)
    misses = [sum(truth[path].violations.values()) for path in (decided, best)]
    return best, score + max(0.0, misses[0] - misses[1])
