"""What releases at a cut spend, and how much noise a budget asks for.

Two clipped activations lie at most 2 C apart, so noise of deviation m C is a Gaussian mechanism
with multiplier m / 2 on a query of sensitivity 1; Laplace noise likewise, in sums of absolute
values. Whoever receives the releases sees every example in every epoch: nothing is sampled, and
they compose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from fedsys.config.targets import import_extra
from fedsys.errors import ConfigError
from fedsys.privacy.release import NOISE, Noise

REACH = 2.0
"""Distance of two clipped activations, over the norm that they are clipped to."""

_EXACT = 1e-3  # of a multiplier, relative
_HIGHEST = 1e4  # of an ε that is looked for


def cut_epsilon(noise: Noise, delta: float, releases: int) -> float:
    """Return the ε that a number of releases of one example spends at δ.

    Gaussian noise exactly: several releases are one of a larger shift, whose curve of (ε, δ) is
    known (Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
    theorem 8). Laplace noise by dp-accounting's PLD accountant, which errs upwards.

    Args:
        noise: Of each release.
        delta: Of the claim.
        releases: How often an example is released: once in each epoch.

    Returns:
        Infinite without noise; 0 without releases.
    """
    if releases == 0:
        return 0.0
    if noise.multiplier == 0.0:
        return math.inf
    if noise.kind == "laplace":
        return _laplace_epsilon(noise.multiplier, delta, releases)
    shift = math.sqrt(releases) * REACH / noise.multiplier
    if gaussian_delta(0.0, shift) <= delta:
        return 0.0
    return _bisected(lambda epsilon: gaussian_delta(epsilon, shift) <= delta, 0.0, _HIGHEST, 1e-9)


def gaussian_delta(epsilon: float, shift: float) -> float:
    """Return the least δ at ε of two normal distributions of deviation 1 whose means differ.

    Args:
        epsilon: At least 0.
        shift: Of the means.
    """
    from scipy.special import log_ndtr, ndtr

    above = float(ndtr(shift / 2 - epsilon / shift))
    return above - math.exp(epsilon + float(log_ndtr(-shift / 2 - epsilon / shift)))


@functools.lru_cache(maxsize=4096)
def _laplace_epsilon(multiplier: float, delta: float, releases: int) -> float:
    pure = releases * REACH / multiplier
    if releases == 1:
        # e^ε falls short of the pure bound by what δ allows: 1 - e^((ε - pure) / 2) = δ
        return max(0.0, pure + 2 * math.log1p(-delta))
    events = import_extra("dp_accounting", "privacy", "Laplace noise in several releases")
    library = import_extra("dp_accounting.pld", "privacy", "Laplace noise in several releases")
    accountant = library.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(events.LaplaceDpEvent(multiplier / REACH), releases)
    return min(pure, float(accountant.get_epsilon(delta)))


def cut_noise(
    epsilon: float, delta: float, clip_norm: float, releases: int, *, kind: str = "gaussian"
) -> Noise:
    """Return the least noise with which so many releases stay within (ε, δ), to a thousandth.

    Raises:
        ConfigError: There is no such noise.
    """
    if kind not in NOISE:
        raise ConfigError.of("privacy.noise", kind, f"must be one of {', '.join(NOISE)}")
    if releases == 0:
        return Noise(clip_norm, 0.0, kind)

    def within(multiplier: float) -> bool:
        return cut_epsilon(Noise(clip_norm, multiplier, kind), delta, releases) <= epsilon

    # Laplace noise within the sum of pure epsilons is enough. Gaussian: the usual bound for ε ≤ 1
    # (Dwork and Roth, theorem A.1), made larger until it is
    high = releases * REACH / epsilon
    if kind == "gaussian":
        high = math.sqrt(2 * math.log(1.25 / delta) * releases) * REACH / epsilon
        while not within(high):
            high *= 2
    return Noise(clip_norm, _bisected(within, 0.0, high, _EXACT), kind)


def _bisected(holds: Callable[[float], bool], low: float, high: float, exact: float) -> float:
    """Return about the least value for which a monotone condition holds; it holds for it."""
    while high - low > exact * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
