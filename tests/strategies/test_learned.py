"""Policies that learn, in a run: what is believed of machines is not what they are."""

from __future__ import annotations

import dataclasses

import pytest

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.hardware import hardware
from fedsys.planning.learned import LearnedPlanner
from fedsys.planning.misjudged import misjudged
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.training.federation import layered_model
from strategies.policies import build_policy
from strategies.policies.planned import Planned
from strategies.policies.policy import Explains, Observation, Predicts
from tests.planning.wrong_fleets import best_s, rounds

LINE = (
    "policy=auto schedule=pipelined fleet=pi_lab network=wifi model=vgg5 num_clients=3 "
    "client.batch_size=100 'policy.micro_batches=[1,5]' "
)


def run(more=""):
    config = parse(compose_text(LINE + more))
    return config, layered_model(config, (3, 32, 32), 10)


def test_without_learning_nothing_is_different():
    config, layers = run()
    policy = build_policy(config.policy, 1, config, [1000])
    assert isinstance(policy, Planned)
    assert machines_of(config, layers) == hardware(config, layers)


@pytest.mark.parametrize("kind", ["auto", "exhaustive", "pipar", "splitfed"])
def test_every_planner_learns_if_it_is_told_to(kind):
    config, layers = run(f"policy={kind} policy.learn=true")
    policy = build_policy(config.policy, 1, config, [1000])
    assert isinstance(policy, LearnedPlanner)
    assert isinstance(policy, Predicts) and isinstance(policy, Explains)
    _, plan = policy.plan(policy.init(layers, range(3)), dict.fromkeys(range(3), Observation()))
    assert set(plan) == {0, 1, 2}


def test_a_misjudged_fleet_is_believed_by_the_policy_and_played_as_it_is():
    config, layers = run("policy.learn=true fleet.misjudged=2 seed=3")
    believed, real = machines_of(config, layers), hardware(config, layers)
    assert believed.devices == tuple(misjudged(c, 2.0, 3) for c in real.devices)
    truth = run_workload(config, layers, real, [1000], PlanOptions.of(config.policy))
    policy = build_policy(config.policy, 1, config, [1000])
    seconds = [s for s, *_ in rounds(policy, layers, truth, 6)]
    assert seconds[-1] <= 1.05 * best_s(truth)


def test_single_machines_are_believed_to_be_others():
    config, layers = run("'+fleet.believed.pi4={macs_per_s: 1.0e9}'")
    believed, real = machines_of(config, layers), hardware(config, layers)
    same = [a == b for a, b in zip(believed.devices, real.devices, strict=True)]
    assert same == [False, False, True]  # two Pi 4 and a Jetson
    assert believed.edges == real.edges


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("'+fleet.believed.pi5={macs_per_s: 1.0e9}'", r"fleet\.believed\.pi5=.*machines.*pi4"),
        ("'+fleet.believed.pi4={macs_per_s: -1}'", r"fleet\.believed\.pi4\.macs_per_s=-1"),
        ("fleet.misjudged=0.5", r"fleet\.misjudged=0\.5: must be from 1"),
        ("policy.learn=2", r"policy\.learn=2: must be true or false"),
        ("policy.learn=true policy.doubt=0", r"policy\.doubt=0: must be above 0"),
        ("policy.learn=true policy.optimism=-1", r"policy\.optimism=-1: must be above 0"),
        (
            "policy.learn=true client.label_private=true",
            r"must be fixed with client\.label_private",
        ),
    ],
)
def test_what_cannot_be_believed_is_refused(more, names):
    with pytest.raises(ConfigError, match=names):
        config, layers = run(more)
        build_policy(config.policy, 1, config, [10]).init(layers, [0])


def test_a_model_that_is_too_large_for_a_device_is_offloaded():
    config, layers = run("policy.learn=true network.up_mbit_s=0.1 network.down_mbit_s=0.1")
    small = dataclasses.replace(
        config, client=dataclasses.replace(config.client, max_model_bytes=9)
    )
    for told, whole in ((config, True), (small, False)):
        policy = build_policy(told.policy, 1, told, [1000])
        _, plan = policy.plan(policy.init(layers, [0]), {0: Observation()})
        assert (plan[0].cut == len(layers)) == whole
