"""Audits of a claim: canaries in a training, and two activations at a cut.

What is guessed, and by which threshold, is fixed before the truth is looked at; where several
guesses are tried, what may go wrong is shared among them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.privacy.audit_epsilon import (
    CONFIDENCE,
    Rates,
    epsilon_of_guesses,
    epsilon_of_rates,
)
from fedsys.privacy.labels import randomised
from fedsys.privacy.noise import Addressed
from fedsys.privacy.release import Noise, clipped
from fedsys.randomness import Address

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed about: half of them "in", half of them "out"."""

ALARMS = 0.005
"""False alarms that the threshold between two activations is set for."""

FEATURES = 64
"""Numbers in the activations that are told apart."""


def canary_bound(
    scores: NDArray[np.float64],
    members: NDArray[np.bool_],
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """Return a lower bound on ε from models that were trained with canaries in or out by coins.

    The scores of a model are compared with the mean of the other models', which other coins
    decided. Of each model the canaries of highest and lowest scores are guessed to be in and out.

    Args:
        scores: Higher where a canary seems to be in, ``(models, canaries)``.
        members: The truth, likewise.
        delta: Of the claim.
        confidence: Of the highest bound of all models and `SHARES`.
    """
    models, canaries = scores.shape
    bounds = [0.0]
    each = 1 - (1 - confidence) / (models * len(SHARES))
    for index, truth in enumerate(members):
        others = np.delete(scores, index, axis=0)
        own = scores[index] - (others.mean(0) if len(others) else 0.0)
        order = np.argsort(own, kind="stable")
        for share in SHARES:
            half = int(share * canaries / 2)
            correct = int(truth[order[-half:]].sum() + (~truth[order[:half]]).sum()) if half else 0
            bounds.append(epsilon_of_guesses(correct, 2 * half, canaries, delta, each))
    return max(bounds)


def release_bound(
    noise: Noise,
    releases: int,
    delta: float,
    trials: int,
    address: Address,
    confidence: float = CONFIDENCE,
) -> float:
    """Return a lower bound on ε from telling apart what is released of two opposite activations.

    They are longer than the clipping allows and point in opposite directions, so after it they are
    as far apart as any two can be. All releases of one are looked at together.

    Args:
        noise: How much of which.
        releases: How often each activation is released.
        delta: Of the claim.
        trials: Tries with each of the two.
        address: Of the draws.
        confidence: Of the bound.
    """
    source = Addressed(address)
    first = torch.zeros(1, FEATURES)
    first[0, 0] = 3 * noise.clip_norm
    points = clipped(torch.cat([first, -first]), noise)
    statistics: list[NDArray[np.float64]] = []
    for point in points:
        told = torch.zeros(trials, dtype=torch.float64)
        for release in range(releases):
            which = f"audit {len(statistics)}"
            seen = point + noise.draw(source, which, release, (trials, FEATURES))
            told += _likelihood(seen[:, 0].double(), noise)
        statistics.append(told.numpy())
    # The threshold comes from other tries, with the noise that everybody knows
    aside = torch.zeros(trials, dtype=torch.float64)
    for release in range(releases):
        seen = points[1, 0] + noise.draw(source, "audit aside", release, (trials,))
        aside += _likelihood(seen.double(), noise)
    threshold = float(np.quantile(aside.numpy(), 1 - ALARMS))
    hits, alarms = (int((told > threshold).sum()) for told in statistics)
    return epsilon_of_rates(Rates(hits, alarms, trials), delta, confidence)


def response_bound(
    epsilon: float, classes: int, trials: int, address: Address, confidence: float = CONFIDENCE
) -> float:
    """Return a lower bound on ε from telling two labels apart by what is told of them.

    Args:
        epsilon: Of the randomised response.
        classes: Labels that there are.
        trials: Tries with each of two labels.
        address: Of the draws.
        confidence: Of the bound.
    """
    told = randomised(torch.arange(2).repeat_interleave(trials), epsilon, classes, address)
    hits, alarms = (int((part == 0).sum()) for part in torch.split(told, trials))
    return epsilon_of_rates(Rates(hits, alarms, trials), 0.0, confidence)


def _likelihood(seen: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Return the logarithm of how much likelier the first activation is, up to a factor."""
    if noise.kind == "gaussian":
        return seen
    c = noise.clip_norm
    ratio = (seen + c).abs() - (seen - c).abs()
    return ratio + 1e-6 * seen  # beyond both it is constant: no threshold would lie there
