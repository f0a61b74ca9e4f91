import math

import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent
from dp_accounting.pld import PLDAccountant

from fedsys.errors import ConfigError
from fedsys.privacy.cut import cut_epsilon, cut_noise, gaussian_delta
from fedsys.privacy.release import Noise


@pytest.mark.parametrize(("multiplier", "releases"), [(1.5, 1), (4.0, 7), (8.0, 40)])
def test_gaussian_releases_spend_what_dp_accounting_says(multiplier, releases):
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(multiplier / 2), releases)  # two activations are 2 C apart
    spent = cut_epsilon(Noise(1.0, multiplier), 1e-5, releases)
    assert spent == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 1), (4.0, 1), (5.0, 10)])
def test_laplace_releases_spend_what_dp_accounting_says(multiplier, releases):
    accountant = PLDAccountant()
    accountant.compose(LaplaceDpEvent(multiplier / 2), releases)
    spent = cut_epsilon(Noise(1.0, multiplier, "laplace"), 1e-5, releases)
    assert spent == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
    assert spent <= releases * 2 / multiplier


# Balle and Wang, ICML 2018: at ε = 1, δ = 1e-5 and sensitivity 1 their mechanism has this deviation
ANALYTIC = [(1.0, 1e-5, 3.730632), (0.5, 1e-6, 8.057617)]


@pytest.mark.parametrize(("epsilon", "delta", "deviation"), ANALYTIC)
def test_the_curve_is_that_of_the_analytic_gaussian_mechanism(epsilon, delta, deviation):
    assert gaussian_delta(epsilon, 1 / deviation) == pytest.approx(delta, rel=1e-2)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize(("epsilon", "releases"), [(0.5, 1), (8.0, 1), (8.0, 20), (30.0, 3)])
def test_the_noise_is_the_least_that_stays_within_the_budget(kind, epsilon, releases):
    noise = cut_noise(epsilon, 1e-5, 2.0, releases, kind=kind)
    assert cut_epsilon(noise, 1e-5, releases) <= epsilon
    less = Noise(2.0, 0.99 * noise.multiplier, kind)
    assert cut_epsilon(less, 1e-5, releases) > epsilon


def test_without_noise_everything_is_spent_and_without_releases_nothing():
    assert math.isinf(cut_epsilon(Noise(1.0, 0.0), 1e-5, 3))
    assert cut_epsilon(Noise(1.0, 1.0), 1e-5, 0) == 0.0
    assert cut_noise(1.0, 1e-5, 1.0, 0).scale == 0.0


def test_a_budget_is_left_over_where_delta_alone_covers_the_releases():
    assert cut_epsilon(Noise(1.0, 1e7), 1e-5, 1) == 0.0


def test_unknown_noise_is_refused():
    with pytest.raises(ConfigError, match="gaussian, laplace"):
        cut_noise(1.0, 1e-5, 1.0, 1, kind="uniform")
