"""How much privacy releases cost: epsilon at a delta, and the noise that a budget asks for.

A release is the Gaussian mechanism on a Poisson sample: each unit takes part with probability
`rate`, what it contributes has norm 1 at most, and normal noise of deviation `noise` is added.
Neighbouring data differ by one unit that is there or not. Three accountants:

======  =========================================================================================
``pld`` the distribution of the privacy loss (Koskela et al., AISTATS 2020; Doroshenko et al.,
        "Connect the Dots", PoPETs 2022), by Google's dp-accounting; an upper bound, and tight
``rdp`` Rényi divergences (Mironov, CSF 2017; Mironov et al., 2019), by dp-accounting; an upper
        bound, 8 to 15 % above in benchmarks/privacy.md
``prv`` privacy random variables (Gopi et al., NeurIPS 2021), by Opacus; its upper bound
======  =========================================================================================

Opacus' GDP is none: it lies below the true epsilon.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedsys.config.targets import import_extra
from fedsys.errors import ConfigError

Kinds = tuple[tuple[float, float, int], ...]
"""Noise, rate and number of releases of each kind."""

_FINE: Final = 5e-4
"""How much too large epsilon by ``pld`` may be."""

_COARSE: Final = 2e-3
"""As a share of epsilon, where noise is searched: there may be that much more noise."""

_INTERVALS: Final = (1e-5, 5e-3)
"""Least and largest step of the grid of losses."""

_LEAST_NOISE: Final = 0.05
_MOST_NOISE: Final = 1e4
"""Between which noise is searched."""


@dataclass(frozen=True)
class Releases:
    """A number of releases of one kind.

    Attributes:
        noise: Standard deviation over the largest norm of what a unit contributes.
        rate: Probability with which a unit takes part, in (0, 1].
        count: How many.
    """

    noise: float
    rate: float
    count: int


def epsilon(
    releases: Sequence[Releases], delta: float, accountant: str = "pld", *, coarse: bool = False
) -> float:
    """Return the epsilon of all releases together; 0 for none.

    >>> round(epsilon([Releases(noise=1.0, rate=1.0, count=1)], 1e-5), 2)
    4.38

    Args:
        releases: What one unit took part in.
        delta: At which.
        accountant: ``pld``, ``rdp`` or ``prv``.
        coarse: Whether it may be 0.2 % too large by ``pld``, and is there sooner.

    Raises:
        ModelError: The library of the accountant is not installed.
    """
    counted: dict[tuple[float, float], int] = {}
    for each in releases:
        counted[each.noise, each.rate] = counted.get((each.noise, each.rate), 0) + each.count
    kinds = tuple(sorted((noise, rate, n) for (noise, rate), n in counted.items() if n))
    if coarse and kinds and accountant == "pld":
        return _pld(kinds, delta, True)
    return _epsilon(accountant, kinds, delta) if kinds else 0.0


def noise_multiplier(
    budget: float, delta: float, rate: float, count: int, accountant: str = "pld"
) -> float:
    """Return the least noise, up to 0.2 %, with which releases cost at most a budget.

    Args:
        budget: Epsilon of all of them.
        delta: At which.
        rate: Probability with which a unit takes part.
        count: Releases.
        accountant: ``pld``, ``rdp`` or ``prv``.

    Raises:
        ConfigError: No noise that is searched among is enough.
        ModelError: The library of the accountant is not installed.
    """
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        releases = ((math.exp(log_noise), rate, count),)
        cost = (
            _pld(releases, delta, True)
            if accountant == "pld"
            else _epsilon(accountant, releases, delta)
        )
        return math.log(max(cost, 1e-12) / budget)

    low, high = -0.5, 0.5
    while excess(high) > 0:  # epsilon falls with noise, nearly as a power of it
        low, high = high, high + max(0.5, 1.1 * excess(high))
        if high > math.log(_MOST_NOISE):
            rule = f"cannot be kept by a noise_multiplier of up to {_MOST_NOISE:g}"
            raise ConfigError.of("privacy.epsilon", budget, rule, "raise it, or lower rounds")
    while excess(low) < 0:
        low, high = low - 0.5, low
        if low < math.log(_LEAST_NOISE):
            return _LEAST_NOISE
    found = float(brentq(excess, low, high, xtol=1e-4, rtol=1e-6))
    while epsilon([Releases(math.exp(found), rate, count)], delta, accountant) > budget:
        found += 2e-4
    return math.exp(found)


@functools.lru_cache(maxsize=1024)
def cached_noise(budget: float, delta: float, rate: float, count: int, accountant: str) -> float:
    """Return `noise_multiplier`, computed once per process."""
    return noise_multiplier(budget, delta, rate, count, accountant)


# --------------------------------------------------------------------------------------------------
# Accountants


def _epsilon(accountant: str, kinds: Kinds, delta: float) -> float:
    return {"pld": _pld, "prv": _prv, "rdp": _rdp}[accountant](kinds, delta)


@functools.lru_cache(maxsize=4096)
def _pld(kinds: Kinds, delta: float, coarse: bool = False) -> float:
    """Return an epsilon that is above the true one by no more than was asked for.

    On a grid of losses it is too large by about n h² / epsilon, where h is the step of the grid
    and n the number of releases (seen for noise from 0.5 to 10 and rates from 0.001 to 1).
    """
    count = sum(n for _, _, n in kinds)
    least, interval = _INTERVALS
    while True:
        found = _pld_on_grid(kinds, delta, interval)
        allowed = _COARSE * found if coarse else min(_FINE, _COARSE * found)
        fine_enough = math.sqrt(allowed * max(found, 1e-9) / (1.5 * count))
        if interval <= max(fine_enough, least):
            return found
        interval = max(least, min(0.9 * fine_enough, interval / 2))


def _pld_on_grid(kinds: Kinds, delta: float, interval: float) -> float:
    library = import_extra(
        "dp_accounting.pld.privacy_loss_distribution", "privacy", "privacy.accountant"
    )
    total: Any = None
    for noise, rate, n in kinds:
        once = library.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=interval,
            use_connect_dots=True,
        )  # fmt: skip
        several = once.self_compose(n) if n > 1 else once
        total = several if total is None else total.compose(several)
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


@functools.lru_cache(maxsize=4096)
def _rdp(kinds: Kinds, delta: float) -> float:
    library = import_extra("dp_accounting", "privacy", "privacy.accountant")
    accountant = import_extra("dp_accounting.rdp", "privacy", "privacy.accountant").RdpAccountant()
    for noise, rate, n in kinds:
        event = library.GaussianDpEvent(noise)
        accountant.compose(library.PoissonSampledDpEvent(rate, event) if rate < 1 else event, n)
    found, order = accountant.get_epsilon_and_optimal_order(delta)
    logging.getLogger("fedsys.privacy").debug("RDP: epsilon %g at order %g", found, order)
    return float(found)


@functools.lru_cache(maxsize=4096)
def _prv(kinds: Kinds, delta: float) -> float:
    accountant = import_extra("opacus.accountants", "privacy", "privacy.accountant").PRVAccountant()
    accountant.history = [(noise, rate, n) for noise, rate, n in kinds]
    with np.errstate(all="ignore"):  # at a rate of 1 it takes a logarithm of 0
        return float(accountant.get_epsilon(delta))
