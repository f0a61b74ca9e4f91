"""Rounds of a policy at the level of plans: what it sees, and when rounds begin."""

from __future__ import annotations

import pytest

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.assignment import Assignment
from fedsys.planning.options import machines_of, run_workload
from fedsys.planning.planner import plan
from fedsys.planning.policy_rounds import decided_rounds
from fedsys.planning.resources import Observation
from fedsys.planning.virtual_clock import virtual_round
from fedsys.training.federation import layered_model
from strategies.policies import build_policy

RUN = (
    "model=cnn fleet=nominal fleet.devices=[pi3,pi3] num_clients=2 "
    "client.batch_size=20 client.epochs=1 schedule=pipelined network=ethernet "
)


def run_of(more="", policy="auto"):
    config = parse(compose_text(f"{RUN} policy={policy} {more}"))
    layers = layered_model(config, (1, 8, 8), 10)
    truth = run_workload(config, layers, machines_of(config, layers), [60, 100])
    return config, layers, truth


class Notes:
    """A policy that keeps what it was shown."""

    def __init__(self, cut):
        self.cut, self.seen = cut, []

    def init(self, layers, nodes):
        return 0

    def plan(self, state, seen):
        self.seen.append(dict(seen))
        return state + 1, {node: Assignment(self.cut, edge=7) for node in seen}


def test_a_policy_sees_what_the_round_before_took():
    _, layers, truth = run_of()
    notes = Notes(2)
    first, second = decided_rounds(notes, layers, truth, 2)
    assert notes.seen[0] == {0: Observation(), 1: Observation()}
    played = virtual_round(truth, first.choices)
    assert first.played == played and first.choices[0] == Assignment(2, 0, micro_batches=1)
    for node in (0, 1):
        seen = notes.seen[1][node]
        assert seen.iteration_s == played.seen[node].iteration_s > 0
        assert seen.up_bit_s == pytest.approx(1e-9)
        assert seen.seconds == played.device_s[node]
    assert notes.seen[1][1].steps == 5
    assert (first.number, second.number, second.state) == (1, 2, 2)
    assert second.start_s == first.played.seconds


def test_networks_are_those_of_the_round_and_of_the_moment():
    by_rounds = run_of("network.trace=[[1,5,5]] network.trace_by=rounds")[2]
    layers = run_of()[1]
    first, second, third = decided_rounds(Notes(1), layers, by_rounds, 3)
    assert first.played.seconds < second.played.seconds == pytest.approx(third.played.seconds)
    moment = first.played.seconds
    by_seconds = run_of(f"network.trace=[[{moment},5,5]]")[2]
    early, late = decided_rounds(Notes(1), layers, by_seconds, 2)
    assert early.played.seconds == pytest.approx(first.played.seconds)
    assert late.played.seconds == pytest.approx(second.played.seconds)


def test_a_planning_policy_goes_on_as_in_a_run():
    """It offloads otherwise from the round after the network fails, as if it had been told."""
    config, layers, truth = run_of("network.trace=[[2,0.02,0.02]] network.trace_by=rounds")
    policy = build_policy(config.policy, 1, config, [60, 100])
    cuts = [
        [choice.cut for choice in done.choices] for done in decided_rounds(policy, layers, truth, 5)
    ]
    told = [[c.cut for c in plan(truth.at_round(n)).choices] for n in (1, 5)]
    assert told[0] != told[1]
    assert cuts == [told[0]] * 3 + [told[1]] * 2


def test_raw_inputs_that_leave_a_device_are_not_timed():
    _, layers, truth = run_of()
    with pytest.raises(ConfigError, match="raw inputs are not timed"):
        next(decided_rounds(Notes(0), layers, truth, 1))
