"""The contextual bandit: its regression against closed forms, and what it does on fleets."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.errors import ConfigError
from fedsys.planning.arms import Arms, Guess, best_pieces, expected
from fedsys.planning.bandit import Bandit, BanditOptions
from fedsys.planning.bandit_table import BanditClient, BanditTable, table_of
from fedsys.planning.costs import frame_bytes
from fedsys.planning.measured_rates import Links
from fedsys.planning.resources import Measured, Observation
from fedsys.transport.network import Network
from tests.planning.wrong_fleets import best_s, drawn, lab, native_s, of, rounds

LAYERS, LOAD = lab()
ARMS = Arms.of(LOAD, LAYERS)
COUNT = len(ARMS.cuts)


def test_arms_are_the_legal_cuts_with_their_work_and_bits():
    assert ARMS.cuts == (*LOAD.cuts, LOAD.units)
    assert ARMS.device[-1] == 1.0 and (np.diff(ARMS.device) >= 0).all()
    first = LOAD.crossings[ARMS.cuts[0] - 1]
    assert ARMS.up_bits[0] == 8 * frame_bytes(first, 100, "fp32", labels=True)
    assert ARMS.up_bits[-1] == ARMS.down_bits[-1] == 0
    rates, latency = np.array([[1e6, 2e6]]), np.array([0.01])
    moved = ARMS.up_bits[0] / 1e6 + ARMS.down_bits[0] / 2e6 + 0.02
    assert ARMS.link_s(rates, latency)[0] == pytest.approx(
        [moved, *ARMS.link_s(rates, latency)[0, 1:]]
    )
    assert ARMS.link_s(rates, latency)[0, -1] == 0.0
    assert ARMS.least_s(rates)[0, 0] == max(ARMS.up_bits[0] / 1e6, ARMS.down_bits[0] / 2e6)
    small = Arms.of(dataclasses.replace(LOAD, codecs=("fp32", "int8")), LAYERS)
    assert small.codec == "int8"


def one_device(tried, guess):
    link = np.where(np.arange(COUNT) < COUNT - 1, 0.2, 0.0)[None]
    contexts = ARMS.contexts(link, np.ones((1, COUNT)))
    return contexts, expected(ARMS, contexts, tried, np.array([0]), guess)


def test_weights_are_those_of_a_ridge_regression_and_tried_arms_are_as_measured():
    guess = Guess(own=0.2, noise=0.01)
    tried = np.zeros((1, COUNT, 4))
    tried[0, -1] = (1, 1.0, 0.0, 1.0)
    tried[0, 0] = (4, 0.7, 0.2, 1.0)
    contexts, (mean, spread, weights) = one_device(tried, guess)
    x, y = contexts[0, [0, -1]], np.array([0.7, 1.0])
    noise = (0.2 * ARMS.device[[0, -1]]) ** 2 + 0.01**2 / np.array([4, 1])
    prior = np.diag(1 / np.square(guess.spread))
    precision = prior + x.T @ np.diag(1 / noise) @ x
    right = prior @ np.array(guess.mean) + x.T @ (y / noise)
    assert weights[0] == pytest.approx(np.linalg.solve(precision, right))
    assert mean[0, 0] == pytest.approx(0.7, abs=0.05) and spread[0, 0] < 0.05
    assert mean[0, -1] == pytest.approx(1.0, abs=0.01) and spread[0, -1] < 0.02
    assert spread[0, 1] > 3 * spread[0, 0]


arm_records = st.lists(
    st.tuples(st.integers(0, COUNT - 1), st.integers(1, 5), st.floats(0.05, 5.0)), max_size=6
)


@given(arm_records, st.integers(0, COUNT - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_measured_never_makes_less_certain(records, arm):
    tried = np.zeros((1, COUNT, 4))
    for at, rounds_, took in records:
        tried[0, at] = (rounds_, took, 0.2 if at < COUNT - 1 else 0.0, 1.0)
    more = tried.copy()
    more[0, arm, 0] += 1
    if tried[0, arm, 0] == 0:
        more[0, arm, 1:] = (1.0, 0.2 if arm < COUNT - 1 else 0.0, 1.0)
    link = np.where(np.arange(COUNT) < COUNT - 1, 0.2, 0.0)[None]
    contexts = ARMS.contexts(link, np.ones((1, COUNT)))
    before, after = (
        expected(ARMS, contexts, table, np.array([0]), Guess())[1] for table in (tried, more)
    )
    assert (after <= before + 1e-9).all()


def test_what_others_of_a_kind_saw_counts_less_and_that_of_other_kinds_nothing():
    tried = np.zeros((3, COUNT, 4))
    tried[0, 0] = (5, 3.0, 0.2, 1.0)
    contexts = ARMS.contexts(np.full((3, COUNT), 0.2), np.ones((3, COUNT)))
    mean, spread, _ = expected(ARMS, contexts, tried, np.array([0, 0, 1]), Guess())
    alone = expected(ARMS, contexts[2:], tried[2:], np.array([0]), Guess())
    assert mean[2] == pytest.approx(alone[0][0]) and spread[2] == pytest.approx(alone[1][0])
    assert mean[0, 0] > mean[1, 0] > mean[2, 0]
    assert spread[0, 0] < spread[1, 0] < spread[2, 0]


def test_what_a_piece_takes_is_learned_from_devices_that_computed_many():
    """On digits the bandit lost 90 % for ever: it believed in 0.2 % of the baseline for a piece."""
    guess, tried = Guess(), np.zeros((3, len(ARMS.cuts), 6))
    for k, (pieces, computed) in enumerate(((50.0, 3.0), (1.0, 0.06), (50.0, 0.2))):
        tried[k, 0] = (1.0, 1.0, 0.1, 1.0, ARMS.device[0] + computed, pieces)
    zeros = np.zeros(3)
    table = BanditTable(
        [0, 1, 2], np.zeros(3, dtype=np.int64), [None] * 3, zeros + 1, tried, *[zeros] * 8
    )
    known, unknown, cheap = table.pieces_s(ARMS, guess)
    assert known == pytest.approx(0.03, rel=0.02) and cheap == pytest.approx(0.002, rel=0.1)
    assert guess.piece < unknown < 0.03  # one piece tells little
    assert table.pieces_s(ARMS, dataclasses.replace(guess, piece_spread=1e-9)) == pytest.approx(
        guess.piece
    )


def test_of_states_of_before_what_was_not_kept_is_unknown():
    known = {0: BanditClient((1e6, 1e6), 0.0, 1, "pi", 0)}
    line = [[1.0, 0.5, 0.1, 1.0]] * len(ARMS.cuts)
    state = {name: {} for name in ("base", "rates", "alone", "choices", "moves")}
    table = table_of(state | {"arms": {0: line}}, [0], known, ARMS)
    assert table.tried[0, 0].tolist() == [1.0, 0.5, 0.1, 1.0, 0.0, 0.0]
    assert table.pieces_s(ARMS, Guess())[0] == pytest.approx(Guess().piece)


def test_pieces_are_those_of_the_closed_form_of_planners():
    device = LOAD.devices[-1]
    link = np.array([[device.network.up_bits_s, device.network.down_bits_s]])
    several = dataclasses.replace(LOAD, micro_batches=(1, 5, 20, 50))
    arm, latency = np.array([0]), np.array([device.network.latency_s])
    base = np.array([sum(device.costs.seconds(100))])
    found = best_pieces(
        ARMS, arm, link, latency, base, np.array([0.05]), several, np.array([0.002])
    )
    assert found[0] > 1
    sequential = dataclasses.replace(several, schedule="sequential")
    one = best_pieces(
        ARMS, arm, link, latency, base, np.array([0.05]), sequential, np.array([0.002])
    )
    assert one == [1]  # nothing is saved by pieces that wait for each other


@pytest.mark.parametrize("seed", range(8))
def test_after_a_while_it_is_not_slower_than_native_and_rests(seed):
    believed, truth = drawn(LOAD, seed)
    done = list(rounds(Bandit(of(believed)), LAYERS, truth, 16))
    native = native_s(truth)
    assert done[0][0] == pytest.approx(native)  # the first round is the baseline
    assert done[-1][0] <= 1.02 * native
    assert done[-1][1] == done[-2][1] == done[-3][1] == done[-4][1]
    legal = {*LOAD.cuts, LOAD.units}
    assert all(choice.cut in legal for _, choices, *_ in done for choice in choices)


def test_over_several_fleets_it_comes_near_the_optimum_without_any_profile():
    """By the mean: a device that shares an edge learns what it takes there, not what is best."""
    regrets = []
    for seed in range(10):
        believed, truth = drawn(LOAD, seed, most_devices=3)
        *_, (seconds, *_) = rounds(Bandit(of(believed)), LAYERS, truth, 12)
        regrets.append(seconds / best_s(truth) - 1)
    assert np.mean(regrets) <= 0.05 and max(regrets) <= 0.35


def test_costs_of_the_fleet_file_are_not_looked_at():
    believed, truth = drawn(LOAD, 2)
    wrong = dataclasses.replace(
        believed,
        devices=tuple(dataclasses.replace(d, costs=d.costs.slower(50.0)) for d in believed.devices),
    )
    plans = [
        [choices for _, choices, *_ in rounds(Bandit(of(load)), LAYERS, truth, 5)]
        for load in (believed, wrong)
    ]
    assert plans[0] == plans[1]


def test_a_device_whose_transfers_take_longer_than_all_else_never_tries_them():
    _, truth = drawn(LOAD, 4, most_devices=2)
    slow = Network(1e5, 1e5, 0.01)
    truth = dataclasses.replace(
        truth, devices=tuple(dataclasses.replace(d, network=slow) for d in truth.devices)
    )
    for _, choices, *_ in rounds(Bandit(of(truth)), LAYERS, truth, 6):
        assert {choice.cut for choice in choices} == {LOAD.units}


def test_it_reacts_in_the_first_round_after_a_link_broke_down():
    believed, truth = drawn(LOAD, 1)
    policy = Bandit(of(believed))
    *_, (_, choices, state, seen) = rounds(policy, LAYERS, truth, 10)
    away = next(k for k, choice in enumerate(choices) if choice.cut < LOAD.units)
    broken = seen | {
        away: dataclasses.replace(seen[away], up_bit_s=1e-4, down_bit_s=1e-4, iteration_s=1e3)
    }
    state, after = policy.plan(state, broken)
    assert after[away].cut == LOAD.units


def test_it_goes_on_from_its_state_and_says_why():
    believed, truth = drawn(LOAD, 1)
    whole = [choices for _, choices, *_ in rounds(Bandit(of(believed)), LAYERS, truth, 6)]
    *_, (_, _, state, seen) = rounds(Bandit(of(believed)), LAYERS, truth, 3)
    again = Bandit(of(believed))
    nodes = range(len(truth.devices))
    first = again.plan(again.init(LAYERS, nodes), dict.fromkeys(nodes, Observation()))[0]
    assert set(again.reasons(first, nodes).values()) == {"trains alone, to know what that takes"}
    rest = list(rounds(again, LAYERS, truth, 3, state, seen))
    assert [choices for _, choices, *_ in rest] == whole[3:]
    told = again.reasons(rest[-1][2], list(nodes))
    assert set(told) == set(nodes) and all("s alone" in sentence for sentence in told.values())


def test_a_model_too_large_for_its_devices_is_never_trained_alone():
    believed, truth = drawn(LOAD, 3)
    for _, choices, *_ in rounds(Bandit(of(believed), most_bytes=9), LAYERS, truth, 4):
        assert all(choice.cut < LOAD.units for choice in choices)


def test_only_some_of_many_devices_change_in_a_round():
    slow = dataclasses.replace(
        LOAD.devices[0], costs=LOAD.devices[0].costs.slower(8.0), network=Network(1e8, 1e8)
    )
    many = dataclasses.replace(
        LOAD, devices=tuple(dataclasses.replace(slow, name=f"d{k}") for k in range(40))
    )
    cuts = [
        [c.cut for c in choices] for _, choices, *_ in rounds(Bandit(of(many)), LAYERS, many, 6)
    ]
    changes = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in pairwise(cuts)]
    assert 0 < max(changes) <= 10


def test_rates_of_the_configuration_are_believed_again_after_some_rounds_alone():
    load = dataclasses.replace(LOAD, devices=LOAD.devices[:1])
    network = load.devices[0].network
    told = {"drift": 0.2, "forget": 2}
    links = Links().informed(load, [7], {7: Measured(up_bit_s=1e-6)}, {7: True}, **told)
    assert links.rates == {7: [1e6, network.down_bits_s]}
    assert links.applied(load, [7]).devices[0].network.up_bits_s == 1e6
    for _ in range(2):
        links = links.informed(load, [7], {7: Measured()}, {7: False}, **told)
        assert links.rates[7][0] == 1e6
    links = links.informed(load, [7], {7: Measured()}, {7: False}, **told)
    assert links.rates[7][0] == network.up_bits_s and links.alone == {}


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ({"patience": 0}, r"policy\.patience=0: must be from 1"),
        ({"movers": 2.0}, r"policy\.movers=2\.0: must be from 0"),
        ({"guess": {"mean": [1.0]}}, r"policy\.guess\.mean=\[1\.0\]: must be four numbers"),
        ({"guess": {"noise": 0.0}}, r"policy\.guess\.noise=0\.0: must be above 0"),
        ({"guess": {"shared": 2.0}}, r"policy\.guess=.*must have spreads above 0"),
        ({"cut": 1}, r"policy\.cut"),
    ],
)
def test_options_that_cannot_be_used_are_refused(spec, names):
    with pytest.raises(ConfigError, match=names):
        BanditOptions.of({"kind": "bandit", **spec})
