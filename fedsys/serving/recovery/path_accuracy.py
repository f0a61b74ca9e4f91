"""How accurate exits and skips are of which that was not measured, from those of which it was.

CONTINUER (Abdul Majeed et al., IEEE EDGE 2022) estimates accuracy by regression and reports a mean
error of 0.28 % at most. Here all exits and all short skips are measured once, when training ends
(`fedsys.training.resilience.measure`), and what was measured is taken as it is. Left are

* *exits* between two that were measured: on the line between them;
* *longer skips*: what leaving units out costs is regressed on what leaving each of them out alone
  costs (the sum and the largest), on their number, and on the shortest skips that cover the run.

Errors are those of leaving each measured one out in turn, in points of accuracy. Beside ours stand
the mean of the measured ones, and a line over multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from fedsys.models.exits import Run
from fedsys.serving.recovery.regression import Floats
from fedsys.training.resilience import PathScores

LEAST = 6
"""Skips of more than one unit without which nothing is regressed: their cost is then the sum."""


@dataclass(frozen=True)
class PointErrors:
    """Mean absolute errors on left-out paths, in points of accuracy (hundredths).

    Attributes:
        ours: Of the estimator.
        macs: Of a line over multiply-accumulates.
        mean: Of the mean of the others.
        samples: Left-out paths; 0: too few, and the errors are NaN.
    """

    ours: float
    macs: float
    mean: float
    samples: int


@final
class AccuracyEstimator:
    """Knows or estimates the accuracy of each path of a model.

    Args:
        scores: What was measured.

    Attributes:
        exit_errors: On left-out exits between the first and the last.
        skip_errors: On left-out skips of more than one unit.
    """

    def __init__(self, scores: PathScores) -> None:
        self._scores = scores
        self._exits = {each.after: each.accuracy for each in scores.exits}
        self._skips = {each.units: each.accuracy for each in scores.skips}
        self._macs = {each.units: each.macs for each in scores.skips}
        self._macs |= {(each.after, each.after): each.macs for each in scores.exits}
        several = [run for run in self._skips if run[1] - run[0] > 1]
        self._regressed = self._fit(several)
        inner = [(b, b) for b in sorted(self._exits)[1:-1]]
        self.exit_errors = self._errors(inner, lambda run, others: self._between(run[0], others))
        self.skip_errors = self._errors(several, lambda run, others: self._fit(others)(run))

    def exit(self, after: int) -> tuple[float, bool]:
        """Return the accuracy of an exit behind so many units, and whether it was measured."""
        if after in self._exits:
            return self._exits[after], True
        return self._between(after, [(b, b) for b in self._exits]), False

    def skip(self, first: int, last: int) -> tuple[float, bool]:
        """Return the accuracy without units ``[first, last)``, and whether it was measured."""
        if (first, last) in self._skips:
            return self._skips[first, last], True
        return self._regressed((first, last)), False

    # --- exits ------------------------------------------------------------------------------------

    def _between(self, after: int, others: Sequence[Run]) -> float:
        """Return what the exits around one suggest; units count alike, as most blocks do."""
        known = sorted(b for b, _ in others)
        if not known:
            return 0.0
        return float(np.interp(after, known, [self._exits[b] for b in known]))

    # --- skips ------------------------------------------------------------------------------------

    def _fit(self, runs: Sequence[Run]) -> Callable[[Run], float]:
        """Return what estimates the accuracy of a skip, from these skips of several units."""
        whole = self._scores.accuracy
        if len(runs) < LEAST:
            return lambda run: max(0.0, whole - float(self._features(run, runs)[0]))
        from sklearn.linear_model import Ridge

        features = np.array([self._features(run, runs) for run in runs])
        costs = np.array([whole - self._skips[run] for run in runs])
        mean, scale = features.mean(0), np.maximum(features.std(0), 1e-9)
        ridge = Ridge(alpha=0.1).fit((features - mean) / scale, costs)

        def accuracy(run: Run) -> float:
            asked = (self._features(run, runs) - mean) / scale
            return float(np.clip(whole - ridge.predict(asked[None, :])[0], 0.0, 1.0))

        return accuracy

    def _features(self, run: Run, known: Sequence[Run]) -> Floats:
        """Return what a skip is made of, without its own accuracy.

        The sum and the largest of what each unit costs alone, their number, and the largest cost of
        a run within it, or if none is known of a unit.
        """
        whole = self._scores.accuracy
        alone = [whole - self._skips.get((u, u + 1), whole) for u in range(*run)]
        inside = [
            whole - self._skips[other] for other in known
            if other != run and run[0] <= other[0] and other[1] <= run[1]
        ]  # fmt: skip
        largest = max(alone, default=0.0)
        return np.array([sum(alone), largest, run[1] - run[0], max(inside, default=largest)])

    # --- errors -----------------------------------------------------------------------------------

    def _errors(
        self, runs: Sequence[Run], estimate: Callable[[Run, Sequence[Run]], float]
    ) -> PointErrors:
        if len(runs) < LEAST:
            return PointErrors(float("nan"), float("nan"), float("nan"), 0)
        misses = []
        of_exits = runs[0][0] == runs[0][1]
        there = [(b, b) for b in self._exits] if of_exits else list(runs)
        for run in runs:
            others = [other for other in there if other != run]
            values = np.array([self._measured(other) for other in others])
            work = np.array([self._macs[other] for other in others], dtype=float)
            line = np.polyfit(work / 1e6, values, 1)
            guesses = (
                estimate(run, others), np.polyval(line, self._macs[run] / 1e6), values.mean(),
            )  # fmt: skip
            misses.append([abs(float(guess) - self._measured(run)) for guess in guesses])
        ours, macs, mean = (100 * float(np.mean(column)) for column in zip(*misses, strict=True))
        return PointErrors(ours, macs, mean, len(runs))

    def _measured(self, run: Run) -> float:
        return self._exits[run[0]] if run[0] == run[1] else self._skips[run]
