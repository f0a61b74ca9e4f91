"""Lower bounds on ε from attacks: what a claim must not lie below.

A claim (ε, δ) limits how well anybody can tell two neighbouring data sets apart. An attack that
does better than that refutes it, and the ε up to which its success refutes every claim is a lower
bound. Bounds hold with a confidence: of the audits of a claim that is exact, ``1 - confidence`` may
exceed it by chance. A low bound proves nothing: the attack may have been weak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedsys.errors import ConfigError

HIGHEST = 60.0
"""Above this ε nothing is looked for: a claim of that size promises nothing."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rates:
    """What a test of two data sets did.

    Attributes:
        hits: How often it said "the first" of the first.
        alarms: How often it said "the first" of the second.
        trials: Tries with each.
    """

    hits: int
    alarms: int
    trials: int


def epsilon_of_rates(seen: Rates, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the lower bound on ε that a test of two neighbouring data sets gives; at least 0.

    A test that says "the first" of the first with probability t and of the second with f obeys
    t ≤ e^ε f + δ, and 1 - f ≤ e^ε (1 - t) + δ (Kairouz, Oh and Viswanath, ICML 2015, theorem 2.1).
    Both probabilities are bounded by Clopper and Pearson, each with half of what may go wrong.

    Args:
        seen: What the test did; its threshold must not have been chosen by these tries.
        delta: Of the claim.
        confidence: Of the bound.
    """
    wrong = (1 - confidence) / 2
    hits = _at_least(seen.hits, seen.trials, wrong)
    alarms = 1 - _at_least(seen.trials - seen.alarms, seen.trials, wrong)
    bounds = [0.0]
    for likely, unlikely in ((hits, alarms), (1 - alarms, 1 - hits)):
        if likely - delta > unlikely > 0:
            bounds.append(math.log((likely - delta) / unlikely))
    return max(bounds)


def _at_least(successes: int, trials: int, wrong: float) -> float:
    """Return the one-sided lower bound of Clopper and Pearson on a probability."""
    from scipy.stats import beta

    if successes == 0:
        return 0.0
    return float(beta.ppf(wrong, successes, trials - successes + 1))


def epsilon_of_guesses(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound on ε that guesses about the canaries of one training give.

    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem
    5.2: each canary was in with probability 1/2, independently; whoever sees the result says of
    some that they were in or that they were not. Under (ε, δ) with examples added or removed the
    number of correct guesses is hardly ever above a binomial variable of probability
    e^ε / (1 + e^ε).

    Args:
        correct: Correct guesses.
        guesses: All guesses; which canaries they are about must not depend on the truth.
        canaries: Of which so many were tossed for.
        delta: Of the claim.
        confidence: Of the bound.

    Raises:
        ConfigError: More are correct than were guessed, or guessed than there are.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError.of(
            "guesses", guesses, f"must be from the {correct} correct to the {canaries} canaries"
        )
    low, high = 0.0, HIGHEST
    if guess_chance(correct, guesses, canaries, 0.0, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        refuted = guess_chance(correct, guesses, canaries, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def guess_chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many correct guesses under a claim.

    Equation 6 of theorem 5.2 (see `epsilon_of_guesses`): the tail of a binomial variable, and what
    δ adds to it.
    """
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, chance))
    if correct == 0 or delta == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    steepest = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * steepest)
