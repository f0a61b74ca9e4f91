"""Estimates from measurements: one regressor, and how far off it is where nothing was measured.

What layers take grows by adding up: so much for each multiply-accumulate of a kind, each element
that is made, each weight that is read. So the trend is linear without negative weights, of least
*relative* squared error, since times span orders of magnitude. A smooth function of the logarithms
may correct it (a Gaussian process on the logarithm of measured over trend; Rasmussen and Williams,
"Gaussian Processes for Machine Learning", 2006, section 2.2; scikit-learn): it says nothing far
from what was measured, so the trend alone extrapolates. Which of the two estimates a kind is what
did better on held-out samples. Trees and a Gaussian process without the trend did worse
(benchmarks/continuer.md).

A regressor is made anew from its samples wherever it is needed: samples are numbers in JSON, and no
fitted object is stored or unpickled.

Samples of equal features are held out together: a block that occurs five times in a network is one
block. Beside ours stands what is linear in multiply-accumulates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Floats]

FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """Mean absolute errors on what was not fitted, relative to the measured values.

    Attributes:
        ours: Of the estimator. Which of its two forms it has was chosen by these errors.
        linear: Of its linear form.
        macs: Of a linear model of multiply-accumulates alone.
        noise: Of samples against the mean of the others with equal features, which nothing can
            undercut; NaN where there are none.
        samples: Held-out samples; 0: too few to hold any out, and the errors are NaN.
    """

    ours: float
    linear: float
    macs: float
    noise: float
    samples: int


NOTHING = HeldOut(math.nan, math.nan, math.nan, math.nan, 0)


def fit_smooth(features: Floats, values: Floats) -> Predict:
    """Return the linear model, corrected by a smooth function near what was measured."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    linear, least = fit_linear(features, values), values.min() / 10

    def trend(asked: Floats) -> Floats:
        above: Floats = np.maximum(linear(asked), least)
        return above

    logs = np.log1p(features)
    mean, scale = logs.mean(0), np.where(np.ptp(logs, axis=0) > 0, logs.std(0), 1.0)
    # not fitted: with as few samples as there are, their likelihood follows the noise
    kernel = ConstantKernel(0.05) * RBF(2.0) + WhiteKernel(0.05)
    process = GaussianProcessRegressor(kernel, optimizer=None)
    process.fit((logs - mean) / scale, np.log(values / trend(features)))

    def predict(asked: Floats) -> Floats:
        correction: Any = process.predict((np.log1p(asked) - mean) / scale)
        return trend(asked) * np.exp(np.asarray(correction, dtype=np.float64))

    return predict


def fit_linear(features: Floats, values: Floats) -> Predict:
    """Return a linear model without negative weights, of least relative squared error."""
    from scipy.optimize import nnls

    design = np.column_stack([features, np.ones(len(features))])
    scale = np.maximum(design.max(0), 1.0)
    weights = nnls(design / scale / values[:, None], np.ones(len(values)))[0] / scale
    return lambda asked: np.column_stack([asked, np.ones(len(asked))]) @ weights


def held_out(features: Floats, values: Floats) -> HeldOut:
    """Return the errors of estimates for groups of equal features that were left out in turn.

    Args:
        features: ``(samples, features)``; the first is multiply-accumulates.
        values: What was measured, above 0.
    """
    _, found = np.unique(features, axis=0, return_inverse=True)
    groups = found.ravel()
    distinct = len(set(groups.tolist()))
    if distinct < 2 * FOLDS:
        return NOTHING
    order = np.random.default_rng(0).permutation(distinct)  # which groups are left out together
    fold = order[groups] % FOLDS
    smooth = _error(fit_smooth, features, values, fold)
    linear = _error(fit_linear, features, values, fold)
    macs = _error(fit_linear, features[:, :1], values, fold)
    return HeldOut(min(smooth, linear), linear, macs, _noise(values, groups), len(values))


def _error(
    way: Callable[[Floats, Floats], Predict], features: Floats, values: Floats, fold: NDArray[Any]
) -> float:
    estimates = np.zeros(len(values))
    for k in range(FOLDS):
        out = fold == k
        estimates[out] = way(features[~out], values[~out])(features[out])
    return float(np.mean(np.abs(estimates / values - 1.0)))


def _noise(values: Floats, groups: NDArray[Any]) -> float:
    misses = []
    for group in set(groups.tolist()):
        equal = values[groups == group]
        if len(equal) > 1:
            others = (equal.sum() - equal) / (len(equal) - 1)
            misses += list(np.abs(others / equal - 1.0))
    return float(np.mean(misses)) if misses else math.nan


@final
class Estimator:
    """A regressor for each kind of thing, and one of all for kinds of which too few were measured.

    Args:
        kinds: Kind of each sample.
        features: ``(samples, features)``; the first is multiply-accumulates.
        values: What was measured, above 0.

    Attributes:
        errors: On held-out samples: of the kinds with a regressor of their own, or of all.
    """

    def __init__(self, kinds: Sequence[str], features: Floats, values: Floats) -> None:
        self._own: dict[str, Predict] = {}
        weighed: list[HeldOut] = []
        for kind in sorted(set(kinds)):
            of_it = np.array([each == kind for each in kinds])
            errors, predict = _best(features[of_it], values[of_it])
            if errors.samples:
                self._own[kind] = predict
                weighed.append(errors)
        everything, self._all = _best(features, values)
        self.errors = _mean(weighed) if weighed else everything

    def __call__(self, kind: str, features: Floats) -> float:
        """Return the estimate for one thing, of `kind`, with ``(features,)``."""
        return float(self._own.get(kind, self._all)(features[None, :])[0])


def _best(features: Floats, values: Floats) -> tuple[HeldOut, Predict]:
    errors = held_out(features, values)
    way = fit_smooth if errors.ours < errors.linear else fit_linear
    return errors, way(features, values)


def _mean(errors: Sequence[HeldOut]) -> HeldOut:
    samples = sum(each.samples for each in errors)

    def mean(key: str) -> float:
        there = [(getattr(e, key), e.samples) for e in errors if not math.isnan(getattr(e, key))]
        total = sum(count for _, count in there)
        return sum(value * count for value, count in there) / total if total else math.nan

    return HeldOut(mean("ours"), mean("linear"), mean("macs"), mean("noise"), samples)
