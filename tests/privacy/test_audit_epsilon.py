import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from fedsys.errors import ConfigError
from fedsys.privacy.audit_canaries import canary_bound, release_bound
from fedsys.privacy.audit_epsilon import (
    Rates,
    epsilon_of_guesses,
    epsilon_of_rates,
    guess_chance,
)
from fedsys.privacy.cut import cut_noise
from fedsys.privacy.release import Noise
from fedsys.randomness import Address


def exact(side, count, trials, confidence):
    found = binomtest(count, trials, alternative=side)
    return found.proportion_ci(1 - (1 - confidence) / 2, method="exact")


@pytest.mark.parametrize(("hits", "alarms"), [(990, 10), (400, 5), (1000, 0), (995, 600)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.01])
def test_a_test_gives_the_ratio_of_the_bounds_of_clopper_and_pearson(hits, alarms, delta):
    hit = exact("greater", hits, 1000, 0.95).low
    alarm = exact("less", alarms, 1000, 0.95).high
    first = math.log((hit - delta) / alarm)
    second = math.log((1 - alarm - delta) / (1 - hit))
    assert epsilon_of_rates(Rates(hits, alarms, 1000), delta) == pytest.approx(
        max(first, second, 0)
    )


def test_a_test_that_guesses_tells_nothing():
    assert epsilon_of_rates(Rates(500, 500, 1000), 1e-5) == 0.0
    assert epsilon_of_rates(Rates(0, 0, 10), 1e-5) == 0.0
    assert epsilon_of_rates(Rates(0, 1000, 1000), 0.0) == 0.0


@pytest.mark.parametrize(("correct", "guesses"), [(100, 100), (90, 100), (70, 100), (9, 10)])
def test_without_delta_the_bound_is_where_the_binomial_tail_is_what_may_go_wrong(correct, guesses):
    epsilon = epsilon_of_guesses(correct, guesses, 500, 0.0)
    assert epsilon > 0
    tail = binom.sf(correct - 1, guesses, 1 / (1 + math.exp(-epsilon)))
    assert tail == pytest.approx(0.05, abs=1e-4)


def test_delta_takes_from_the_bound_and_the_number_of_canaries_with_it():
    pure = epsilon_of_guesses(100, 100, 1000, 0.0)
    some, more = (epsilon_of_guesses(100, 100, m, 1e-5) for m in (1000, 10_000))
    assert pure > some > more > 0


def test_the_chance_with_delta_is_that_of_the_theorem_term_by_term():
    correct, guesses, canaries, epsilon, delta = 8, 10, 40, 0.7, 1e-3
    chance = 1 / (1 + math.exp(-epsilon))
    tail = binom.sf(correct - 1, guesses, chance)
    slopes = [
        (binom.cdf(correct - 1, guesses, chance) - binom.cdf(correct - i - 1, guesses, chance)) / i
        for i in range(1, correct + 1)
    ]
    expected = tail + 2 * canaries * delta * max(slopes)
    assert guess_chance(correct, guesses, canaries, epsilon, delta) == pytest.approx(expected)


@given(st.integers(0, 30), st.floats(0, 6), st.sampled_from([0.0, 1e-5, 1e-2]))
@settings(deadline=None)
def test_the_chance_grows_with_epsilon(correct, epsilon, delta):
    low = guess_chance(correct, 30, 60, epsilon, delta)
    assert low <= guess_chance(correct, 30, 60, epsilon + 0.5, delta) + 1e-12


@pytest.mark.parametrize("numbers", [(5, 4, 10), (4, 11, 10), (-1, 4, 10)])
def test_impossible_guesses_are_refused(numbers):
    with pytest.raises(ConfigError, match="guesses="):
        epsilon_of_guesses(*numbers, 1e-5)


def canaries(epsilon, seed, models=2, count=2000):
    """Return scores that show each coin by randomised response of ε, the most that ε allows."""
    draw = np.random.default_rng(seed)
    members = draw.random((models, count)) < 0.5
    lies = draw.random((models, count)) >= 1 / (1 + math.exp(-epsilon))
    return (members ^ lies) + 1e-3 * draw.random((models, count)), members


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_canaries_that_tell_as_much_as_a_claim_allows_do_not_refute_it(epsilon):
    bounds = [canary_bound(*canaries(epsilon, seed), 0.0) for seed in range(20)]
    assert max(bounds) <= epsilon


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_canaries_that_tell_more_refute_a_claim(epsilon):
    """The scores of two models are compared, which blurs both: so these tell twice as much."""
    assert canary_bound(*canaries(2 * epsilon + 2, 7), 0.0) > epsilon


def test_canaries_of_which_nothing_is_told_give_nothing():
    draw = np.random.default_rng(3)
    scores, members = draw.random((4, 200)), draw.random((4, 200)) < 0.5
    assert canary_bound(scores, members, 1e-5) < 0.3


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("releases", [1, 5])
def test_what_is_released_tells_much_and_no_more_than_is_claimed(kind, releases):
    noise = cut_noise(4.0, 1e-5, 3.0, releases, kind=kind)
    bound = release_bound(noise, releases, 1e-5, 4000, Address(1))
    assert 1.0 < bound <= 4.0


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_a_quarter_of_the_noise_is_found_out(kind):
    """So an error of the scale, or of the distance of two activations, would be seen."""
    noise = cut_noise(4.0, 1e-5, 3.0, 5, kind=kind)
    less = Noise(3.0, noise.multiplier / 4, kind)
    assert release_bound(less, 5, 1e-5, 4000, Address(1)) > 4.0
