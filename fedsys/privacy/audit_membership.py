"""Who was trained on: membership inference on a model.

Two attacks. *By loss*: members have the smaller one (Yeom et al., "Privacy Risk in Machine
Learning", CSF 2018). *By likelihood ratio*: the confidence of a model in an example, beside that of
models that were trained with it and of models that were not (Carlini et al., "Membership Inference
Attacks From First Principles", IEEE S&P 2022, section V, with variances that all examples share, as
they advise for few models). Of the models that are given each is attacked in turn, with the others
as the attacker's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsys.privacy.audit_metrics import auc, true_positives_at

FALSE_POSITIVES = 1e-3

Matrix = NDArray[np.float64]
Members = NDArray[np.bool_]


@dataclass(frozen=True)
class Membership:
    """How well members are told from others.

    Attributes:
        auc: Area under the curve.
        tpr: True positives at `FALSE_POSITIVES` false positives.
    """

    auc: float
    tpr: float

    @classmethod
    def of(cls, scores: Matrix, members: Members) -> Membership:
        """Return what scores tell, higher ones for members; both ``(N,)``."""
        inside, outside = scores[members], scores[~members]
        return cls(auc(inside, outside), true_positives_at(inside, outside, FALSE_POSITIVES))


def confidences(losses: Matrix) -> Matrix:
    """Return log(p / (1 - p)) of the true class's probability p, from cross-entropies -log p.

    Equation 6 of Carlini et al.: it is nearly normal, as p is not.
    """
    losses = np.clip(losses, 1e-9, 50.0)
    return np.asarray(-losses - np.log(-np.expm1(-losses)))


def likelihood_ratio(confidence: Matrix, members: Members) -> Membership:
    """Attack each model with the help of the others.

    Args:
        confidence: Of each model in each example, ``(models, N)``; four models or more.
        members: Likewise, by independent coins. Where numbers of models are fixed, those of the
            others tell of the one that is attacked.

    Returns:
        The mean over the models.
    """
    found = []
    for target in range(len(members)):
        others = np.arange(len(members)) != target
        scores = _ratios(confidence[target], confidence[others], members[others])
        usable = np.isfinite(scores)
        found.append(Membership.of(scores[usable], members[target][usable]))
    mean = [float(np.mean([getattr(one, key) for one in found])) for key in ("auc", "tpr")]
    return Membership(*mean)


def by_loss(losses: Matrix, members: Members) -> Membership:
    """Attack each model by the losses of its examples; arrays as in `likelihood_ratio`."""
    found = [Membership.of(-own, who) for own, who in zip(losses, members, strict=True)]
    return Membership(
        float(np.mean([one.auc for one in found])), float(np.mean([one.tpr for one in found]))
    )


def _ratios(own: Matrix, others: Matrix, members: Members) -> Matrix:
    """Return for each example the logarithm of how much likelier the model is one with it.

    A mean of n models is itself off by one n-th of the variance. NaN where all of the others have
    the example, or none has.
    """
    likely = []
    for inside in (members, ~members):
        count = inside.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(inside, others, 0.0).sum(0) / count
            gaps = np.nan_to_num(np.where(inside, others - mean, 0.0))
            spare = max(int(np.maximum(count - 1, 0).sum()), 1)
            spread = max(float((gaps**2).sum()) / spare, 1e-12) * (1 + 1 / count)
            likely.append(-((own - mean) ** 2) / (2 * spread) - 0.5 * np.log(spread))
    return np.asarray(likely[0] - likely[1])
