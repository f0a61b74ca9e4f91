"""Epsilon of subsampled Gaussian releases, against closed forms and two independent libraries."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedsys.errors import ConfigError, ModelError
from fedsys.privacy.accountant import Releases, epsilon, noise_multiplier

DELTA = 1e-5


def exact(noise, delta):
    """Return epsilon of one Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(eps):
        a, b = 0.5 / noise, eps * noise
        return norm.cdf(a - b) - math.exp(eps + norm.logcdf(-a - b)) - delta

    return brentq(excess, 0.0, 200.0)


@pytest.mark.parametrize(("noise", "count"), [(0.5, 1), (1, 1), (5, 1), (1, 4), (5, 100), (20, 9)])
def test_without_sampling_it_is_that_of_the_gaussian_mechanism(noise, count):
    """Releases of noise s are together one of noise s / sqrt(n)."""
    expected = exact(noise / math.sqrt(count), DELTA)
    found = epsilon([Releases(noise, 1.0, count)], DELTA)
    assert found == pytest.approx(expected, abs=1e-3) and found >= expected - 1e-9
    assert epsilon([Releases(noise, 1.0, count)], DELTA, "rdp") >= found - 1e-3


GRID = [
    (noise, rate, count)
    for noise in (0.8, 1.5, 4.0)
    for rate, count in ((0.01, 1000), (0.2, 100), (1.0, 20))
]


@pytest.mark.parametrize(("noise", "rate", "count"), GRID)
def test_it_agrees_with_the_accountant_of_dp_accounting(noise, rate, count):
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting import pld

    event = dp_accounting.GaussianDpEvent(noise)
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, event), count)
    found = epsilon([Releases(noise, rate, count)], DELTA)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-3)


@pytest.mark.parametrize(("noise", "rate", "count"), [(1.0, 0.02, 200), (2.0, 0.2, 50)])
def test_it_agrees_with_opacus(noise, rate, count):
    """Opacus' PRV gives an interval and returns its upper end; its middle is to 1e-3 ours."""
    from opacus.accountants.analysis.prv import (
        DiscretePRV,
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        compute_safe_domain_size,
        discretize,
    )

    prv = PoissonSubsampledGaussianPRV(rate, noise)
    size = compute_safe_domain_size([prv], [count], eps_error=0.01, delta_error=DELTA / 1000)
    domain = Domain.create_aligned(-size, size, 1e-3)
    dprv = discretize(TruncatedPrivacyRandomVariable(prv, domain.t_min, domain.t_max), domain)
    composed: DiscretePRV = compose_heterogeneous([dprv], [count])
    _, middle, _ = composed.compute_epsilon(DELTA, DELTA / 1000, 0.0)
    assert epsilon([Releases(noise, rate, count)], DELTA) == pytest.approx(middle, abs=1e-3)
    upper = epsilon([Releases(noise, rate, count)], DELTA, "prv")
    assert middle <= upper <= middle + 0.02


def test_the_numbers_that_were_seen_with_the_libraries_are_seen_here():
    once = [Releases(1.0, 1.0, 1)]
    found = [epsilon(once, DELTA, name) for name in ("pld", "prv", "rdp")]
    assert found == pytest.approx([4.377, 4.387, 4.729], abs=2e-3)
    many = [Releases(1.0, 0.01, 1000)]
    assert epsilon(many, DELTA) == pytest.approx(1.828, abs=2e-3)
    assert epsilon(many, DELTA, "rdp") == pytest.approx(2.10, abs=2e-3)


def test_a_coarse_epsilon_is_no_less_and_hardly_more():
    for noise, rate, count in GRID[::3]:
        releases = [Releases(noise, rate, count)]
        fine, coarse = epsilon(releases, DELTA), epsilon(releases, DELTA, coarse=True)
        assert fine - 1e-6 <= coarse <= 1.003 * fine + 1e-6


def test_nothing_costs_nothing_and_releases_of_two_kinds_add_up():
    assert epsilon([], DELTA) == epsilon([Releases(1.0, 0.1, 0)], DELTA) == 0.0
    one, other = Releases(2.0, 0.1, 50), Releases(3.0, 1.0, 2)
    both = epsilon([one, other], DELTA)
    alone = [epsilon([each], DELTA) for each in (one, other)]
    assert max(alone) < both < sum(alone)
    halves = [Releases(2.0, 0.1, 20), Releases(2.0, 0.1, 30)]
    assert epsilon(halves, DELTA) == epsilon([one], DELTA)


@pytest.mark.parametrize(
    ("budget", "rate", "count", "accountant"),
    [(0.5, 0.05, 200, "pld"), (4.0, 0.5, 40, "pld"), (20.0, 1.0, 10, "pld"), (4.0, 0.1, 50, "rdp")],
)
def test_noise_is_the_least_that_keeps_the_budget(budget, rate, count, accountant):
    noise = noise_multiplier(budget, DELTA, rate, count, accountant)
    assert epsilon([Releases(noise, rate, count)], DELTA, accountant) <= budget
    assert epsilon([Releases(noise / 1.01, rate, count)], DELTA, accountant) > budget


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ConfigError, match=r"privacy.epsilon=1e-06: cannot be kept by"):
        noise_multiplier(1e-6, 1e-9, 1.0, 10**6)


@settings(max_examples=10)
@given(st.floats(0.5, 10.0), st.floats(0.01, 1.0), st.integers(1, 200), st.floats(1.01, 2.0))
def test_more_noise_costs_less_and_more_releases_or_a_higher_rate_cost_more(
    noise, rate, count, factor
):
    def cost(*values):
        return epsilon([Releases(*values)], DELTA, "rdp")

    base = cost(noise, rate, count)
    assert cost(noise * factor, rate, count) <= base + 1e-9
    assert cost(noise, rate, count + 1) >= base - 1e-9


def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_distribution", None)
    with pytest.raises(ModelError, match=r"pip install 'fedsys\[privacy\]'"):
        epsilon([Releases(1.2345, 0.5, 3)], DELTA)
