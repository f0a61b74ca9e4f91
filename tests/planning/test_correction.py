"""The regression that corrects profiles: against closed forms, and what may never happen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.planning.assignment import Assignment
from fedsys.planning.correction import (
    Doubt,
    Factors,
    Side,
    changed,
    conditioned,
    kind_factors,
    noted,
    own_speeds,
    ratio_of,
    scaled,
)
from fedsys.planning.costs import MachineClass
from fedsys.planning.misjudged import misjudged
from fedsys.planning.virtual_clock import virtual_round
from tests.planning.wrong_fleets import drawn, lab

LAYERS, LOAD = lab()
UNITS = LOAD.units
DOUBT = Doubt()
DEVICE = Side.of(LOAD, LOAD.devices[0].costs, edge=False)
EDGE = Side.of(LOAD, LOAD.edges[0], edge=True)
EXACT = Doubt(unit=0.5, machine=0.1, noise=1e-6)

records = st.dictionaries(
    st.sampled_from([*LOAD.cuts, UNITS]),
    st.tuples(st.floats(0.1, 5.0), st.floats(0.05, 20.0)).map(list),
)


def test_one_ratio_of_one_unit_is_weighed_against_the_prior_by_precision():
    prior = Factors(np.ones(1), np.array([[0.25]]))
    after = conditioned(prior, np.ones((1, 1)), np.array([2.0]), np.array([0.05]))
    precision = 1 / 0.25 + 1 / 0.05
    assert after.mean == pytest.approx([(1 / 0.25 + 2 / 0.05) / precision])
    assert after.covariance == pytest.approx(np.array([[1 / precision]]))


def test_several_ratios_give_what_the_normal_equations_give():
    random = np.random.default_rng(1)
    rows, values = random.uniform(size=(7, 3)), random.uniform(size=7)
    variances, covariance = random.uniform(0.1, 1, 7), DOUBT.covariance(3)
    after = conditioned(Factors(np.ones(3), covariance), rows, values, variances)
    precision = np.linalg.inv(covariance) + rows.T @ np.diag(1 / variances) @ rows
    right = np.linalg.inv(covariance) @ np.ones(3) + rows.T @ (values / variances)
    assert after.mean == pytest.approx(np.linalg.solve(precision, right))
    assert after.covariance == pytest.approx(np.linalg.inv(precision))


@given(st.lists(records, min_size=1, max_size=4), records)
@settings(max_examples=40, deadline=None)
def test_what_is_measured_never_makes_less_certain(before, more):
    first = kind_factors(DEVICE, before, [1.0] * len(before), DOUBT)
    second = kind_factors(DEVICE, [*before, more], [1.0] * (len(before) + 1), DOUBT)
    lost = np.linalg.eigvalsh(first.covariance - second.covariance)
    assert lost.min() > -1e-9
    assert np.linalg.eigvalsh(second.covariance).min() > -1e-9


@given(st.lists(records, min_size=1, max_size=4), st.floats(0, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_corrected_costs_can_be_planned_with(measured, optimism, edge):
    """Sums of known parts had units of negative seconds between them."""
    side, costs = (EDGE, LOAD.edges[0]) if edge else (DEVICE, LOAD.devices[0].costs)
    factors = kind_factors(side, measured, [1.0] * len(measured), DOUBT)
    made = side.corrected(costs, factors, optimism)
    assert all(seconds >= 0 for row in (*made.forward_s, *made.backward_s) for seconds in row)
    assert len(made) == UNITS


def test_all_sums_measured_exactly_give_the_factors_of_all_units_that_compute():
    factors = np.random.default_rng(2).uniform(0.5, 2.0, UNITS)
    for side in (DEVICE, EDGE):
        cuts = [c for c in range(UNITS + 1) if side.parts()[c].sum() > 0]
        exact = {c: [float(side.shares([c])[0] @ factors), 1.0] for c in cuts}
        found = kind_factors(side, [exact], [1.0], EXACT)
        assert found.mean[side.seconds > 0] == pytest.approx(factors[side.seconds > 0], rel=1e-3)


def test_equal_ratios_of_two_machines_count_as_one_of_twice_the_rounds():
    one = kind_factors(DEVICE, [{2: [1.5, 3.0]}, {2: [1.5, 1.0]}], [1.0, 1.0], DOUBT)
    two = kind_factors(DEVICE, [{2: [1.5, 4.0]}], [1.0], DOUBT)
    assert one.mean == pytest.approx(two.mean) and one.covariance == pytest.approx(two.covariance)


def test_at_a_cut_that_was_measured_costs_are_those_that_were_measured():
    factors = kind_factors(DEVICE, [{2: [1.7, 20.0]}], [1.0], EXACT)
    costs = LOAD.devices[0].costs
    made = DEVICE.corrected(costs, factors, optimism=1.0)
    operations = 2 * costs.operation_s
    was, now = (sum(c.seconds(100, 0, 2)) - operations for c in (costs, made))
    assert now == pytest.approx(1.7 * was, rel=1e-3)
    rest, hoped = (sum(c.seconds(100, 2)) - operations for c in (costs, made))
    assert hoped < rest  # untried units may be faster


def test_what_the_clock_shows_of_a_misjudged_fleet_is_the_ratio_of_its_units():
    believed, truth = drawn(LOAD, 5)
    cut = LOAD.cuts[0]
    choices = [Assignment(cut, 0, micro_batches=5) for _ in truth.devices]
    seen = virtual_round(truth, choices).seen
    for device, real, got in zip(believed.devices, truth.devices, seen, strict=True):
        side = Side.of(believed, device.costs, edge=False)
        factors = np.array(real.costs.forward_s[0]) / np.array(device.costs.forward_s[0])
        expected = float(side.shares([cut])[0] @ factors)
        ratio = ratio_of(believed, device, choices[0], got.compute_s, edge=False)
        assert ratio == pytest.approx(expected, rel=1e-6)
        there = Side.of(believed, believed.edges[0], edge=True)
        factors = np.array(truth.edges[0].forward_s[0]) / np.array(believed.edges[0].forward_s[0])
        ratio = ratio_of(believed, device, choices[0], got.edge_s, edge=True)
        assert ratio == pytest.approx(float(there.shares([cut])[0] @ factors), rel=1e-6)


def test_a_machine_that_is_not_like_its_kind_is_found_and_the_others_are_left_alone():
    measured = [{2: [1.2, 5.0]}, {2: [1.2, 5.0]}, {2: [3.6, 5.0]}, {}]
    speeds = own_speeds(DEVICE, measured, DOUBT, drift=0.2)
    assert speeds[0] == speeds[1] == speeds[3] == 1.0
    assert speeds[2] == pytest.approx(3.0, rel=0.1)
    assert own_speeds(DEVICE, [{2: [3.6, 5.0]}, {}], DOUBT, drift=0.2) == [1.0, 1.0]


def test_ratios_are_means_of_rounds_and_guesses_after_a_change():
    own = noted(noted({}, 2, 1.0), 2, 2.0)
    assert own == {2: [1.5, 2.0]}
    guess = changed(own, 4.0)
    assert guess[2][0] == 6.0 and guess[2][1] < 0.1 and own == {2: [1.5, 2.0]}
    assert noted(guess, 2, 8.0)[2][0] == pytest.approx(8.0, rel=0.05)


def test_kinds_are_misjudged_alike_by_name_and_seed_and_within_bounds():
    costs = MachineClass("pi", 1e9, params_per_s=1e9).costs(LAYERS)
    other = dataclasses.replace(costs, name="jetson")
    made = misjudged(costs, 2.0, seed=1)
    factors = (
        np.array(made.forward_s[0])[DEVICE.seconds > 0]
        / np.array(costs.forward_s[0])[DEVICE.seconds > 0]
    )
    assert factors.min() >= 0.5 and factors.max() <= 2.0 and len(set(factors.round(6))) > 2
    assert misjudged(costs, 2.0, seed=1) == made != misjudged(costs, 2.0, seed=2)
    assert misjudged(other, 2.0, seed=1).forward_s != made.forward_s
    assert misjudged(costs, 1.0, seed=1) is costs
    assert scaled(costs, np.ones(UNITS)) == costs
