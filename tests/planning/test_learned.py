"""The planner that learns: it finds the optimum on fleets that it misjudges, and then rests."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.planning.learned import LearnedPlanner, LearningOptions
from fedsys.planning.planner import options, plan
from tests.planning.wrong_fleets import best_s, drawn, lab, native_s, of, rounds

LAYERS, LOAD = lab()


def learner(load, **options):
    return LearnedPlanner(of(load), LearningOptions(**options))


@pytest.mark.parametrize("seed", range(20))
def test_on_a_misjudged_fleet_it_is_within_5_percent_of_the_optimum_after_10_rounds(seed):
    believed, truth = drawn(LOAD, seed)
    best = best_s(truth)
    seconds = [s for s, *_ in rounds(learner(believed), LAYERS, truth, 13)]
    assert max(seconds[10:]) <= 1.05 * best


@given(st.integers(100, 10_000), st.sampled_from(["auto", "pipar", "splitfed"]))
@settings(max_examples=8, deadline=None)
def test_plans_are_legal_come_to_rest_and_are_not_worse_than_none(seed, method):
    believed, truth = drawn(LOAD, seed, most_devices=3)
    done = list(rounds(learner(believed, method=method), LAYERS, truth, 12))
    legal = {(choice.cut, choice.edge) for choice in options(truth)}
    for _, choices, _, _ in done:
        assert {(choice.cut, choice.edge) for choice in choices} <= legal
    assert done[-1][1] == done[-2][1] == done[-3][1]
    if method == "auto":
        assert done[-1][0] <= 1.02 * native_s(truth)


def test_what_is_believed_rightly_is_planned_as_without_learning_in_the_end():
    _, truth = drawn(LOAD, 3)
    *_, (seconds, *_) = rounds(learner(truth), LAYERS, truth, 8)
    assert seconds <= 1.02 * best_s(truth)
    made = plan(truth, "auto")
    *_, (_, _, state, _) = rounds(learner(truth), LAYERS, truth, 8)
    nodes = range(len(truth.devices))
    assert learner(truth).init(LAYERS, nodes)["plans"] == 0 < state["plans"] < 8
    assert seconds <= 1.02 * made.seconds


def test_a_device_that_is_throttled_is_noticed_and_its_kind_is_not_blamed():
    believed, truth = drawn(LOAD, 1)
    like = dataclasses.replace(
        believed, devices=(believed.devices[0], dataclasses.replace(believed.devices[0], name="e"))
    )
    real = dataclasses.replace(
        truth, devices=(truth.devices[0], dataclasses.replace(truth.devices[0], name="e"))
    )
    policy = learner(like)
    *_, (_, _, state, seen) = rounds(policy, LAYERS, real, 6)
    hot = dataclasses.replace(
        real,
        devices=(
            dataclasses.replace(real.devices[0], costs=real.devices[0].costs.slower(3.0)),
            real.devices[1],
        ),
    )
    before = policy.predicted(state, [0, 1])
    done = list(rounds(policy, LAYERS, hot, 8, state, seen))
    seconds, _, state, _ = done[-1]
    after = policy.predicted(state, [0, 1])
    assert seconds <= 1.05 * best_s(hot)
    assert after.seconds == pytest.approx(seconds, rel=0.1)
    assert after.round_s[1] <= 1.3 * before.round_s[1]


def test_it_goes_on_from_its_state_and_says_why():
    believed, truth = drawn(LOAD, 7)
    whole = [choices for _, choices, *_ in rounds(learner(believed), LAYERS, truth, 6)]
    *_, (_, _, state, seen) = rounds(learner(believed), LAYERS, truth, 3)
    again = learner(believed)
    again.init(LAYERS, range(len(truth.devices)))
    rest = list(rounds(again, LAYERS, truth, 3, state, seen))
    assert [choices for _, choices, *_ in rest] == whole[3:]
    nodes = list(range(len(truth.devices)))
    told = again.reasons(rest[-1][2], nodes)
    assert set(told) == set(nodes)
    assert all("times its profile" in sentence for sentence in told.values())
