"""Policies that plan: when they plan anew, and when they keep to what they have."""

from __future__ import annotations

import dataclasses

import pytest

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.models.layers import fractions
from fedsys.planning.assignment import Assignment
from fedsys.planning.options import PlanOptions, machines_of, run_workload
from fedsys.planning.virtual_clock import virtual_round
from fedsys.runs.reasons import beside_alone
from fedsys.training.federation import layered_model
from strategies.policies import build_policy
from strategies.policies.planned import Planned
from strategies.policies.policy import Observation

CONFIG = parse(
    compose_text(
        "policy=auto policy.objective=iteration schedule=pipelined fleet=pi3_lab network=wifi "
        "model=vgg5 num_clients=2 client.batch_size=100"
    )
)
LAYERS = layered_model(CONFIG, (3, 32, 32), 10)
FOUR = (
    "policy=auto schedule=pipelined fleet=pi_lab network=wifi model=vgg5 num_clients=4 "
    "client.batch_size=100"
)
NOTHING = {0: Observation(), 1: Observation()}


def policy(**options):
    config = dataclasses.replace(CONFIG, policy={**CONFIG.policy, **options})
    made = Planned(config, [1000, 1000])
    return made, made.init(LAYERS, range(2))


def seen(up_mbit_s=50.0, down_mbit_s=50.0, **values):
    values = {"iteration_s": 1.0, **values}
    return Observation(up_bit_s=1e-6 / up_mbit_s, down_bit_s=1e-6 / down_mbit_s, **values)


def test_what_is_as_expected_changes_nothing():
    made, state = policy()
    state, first = made.plan(state, NOTHING)
    assert first[0].cut == 1 and first[0].micro_batches > 1
    state, again = made.plan(state, {0: seen(55.0), 1: seen(45.0)})  # within 20 %
    assert again == first and state["plans"] == 1 and state["beliefs"] == {}


def test_a_link_that_breaks_down_brings_the_device_home_in_the_next_round():
    made, state = policy()
    state, first = made.plan(state, NOTHING)
    state, second = made.plan(state, {0: seen(1.0, 1.0), 1: seen()})
    assert second[0].cut == len(LAYERS) and second[1].cut == first[1].cut
    assert state["beliefs"][0] == pytest.approx([1e6, 1e6, 1.0])


def test_gradients_that_come_without_zeros_are_planned_so():
    """Whole gradients were predicted behind a ReLU, of which a third was never sent."""
    made, state = policy()
    state, first = made.plan(state, NOTHING)
    whole = made.predicted(state, [0, 1])
    state, again = made.plan(state, {0: seen(gradient_share=0.9), 1: seen(gradient_share=0.9)})
    assert again == first and state["shares"] == {1: 0.9} and state["plans"] == 1
    state, _ = made.plan(state, {0: seen(gradient_share=0.5), 1: seen(gradient_share=0.4)})
    assert state["shares"] == {1: pytest.approx(0.45)} and state["plans"] == 2
    half = made.predicted(state, [0, 1])
    assert half.round_s < whole.round_s
    assert state["beliefs"] == {}


def test_shares_that_creep_are_planned_with_in_the_end():
    """Each round was compared with the one before, so that half of a gradient went unnoticed."""
    made, state = policy()
    state, _ = made.plan(state, NOTHING)
    for share in (0.9, 0.8, 0.73):
        state, _ = made.plan(state, {0: seen(gradient_share=share), 1: seen(gradient_share=share)})
    assert state["shares"] == {1: 0.9} and state["plans"] == 1
    state, _ = made.plan(state, {0: seen(gradient_share=0.65), 1: seen(gradient_share=0.65)})
    assert state["shares"] == {1: 0.65} and state["plans"] == 2


@pytest.mark.parametrize(("kind", "depth"), [("sequential", 1), ("bounded", 2)])
@pytest.mark.parametrize("pieces", [[10], [1, 4, 20]])
def test_plans_are_predicted_by_the_schedule_that_runs(kind, depth, pieces):
    """A list of numbers was timed as if pipelined: plans were promised that took longer than none.

    And without a list, plans for a bounded schedule had the whole mini-batch in flight.
    """
    schedule = dataclasses.replace(CONFIG.schedule, kind=kind, depth=depth)
    made = Planned(
        dataclasses.replace(
            CONFIG, schedule=schedule, policy={**CONFIG.policy, "micro_batches": pieces}
        ),
        [100, 100],
    )
    state, chosen = made.plan(made.init(LAYERS, range(2)), NOTHING)
    load = run_workload(
        made._config, LAYERS, machines_of(made._config, LAYERS), [100], PlanOptions()
    )
    load = dataclasses.replace(load, exchange=False, epochs=1)
    choices = [
        Assignment(a.cut, a.edge, a.codec_up, a.codec_up, a.micro_batches or 1)
        for a in chosen.values()
    ]
    alone = virtual_round(load, [Assignment(len(LAYERS), micro_batches=1)] * 2)
    round_ = virtual_round(load, choices)
    expected = made.predicted(state, [0, 1]).iteration_s
    assert expected == pytest.approx(round_.device_s)
    assert round_.seconds <= alone.seconds


def test_a_bounded_schedule_is_planned_with_more_pieces_than_are_in_flight():
    schedule = dataclasses.replace(CONFIG.schedule, kind="bounded", depth=2)
    made = Planned(dataclasses.replace(CONFIG, schedule=schedule), [1000, 1000])
    _, chosen = made.plan(made.init(LAYERS, range(2)), NOTHING)
    assert chosen[0].cut < len(LAYERS) and chosen[0].micro_batches > 2


def test_a_new_plan_must_save_enough():
    # At 35 instead of 50 Mbit/s another number of pieces is better, by less than a tenth
    patient, state = policy(hysteresis=0.5)
    state, first = patient.plan(state, NOTHING)
    state, second = patient.plan(state, {0: seen(35.0), 1: seen(35.0)})
    assert second == first and state["plans"] == 2


def test_a_slow_device_and_a_slow_edge_are_believed():
    made, state = policy()
    state, _ = made.plan(state, NOTHING)
    before = made.predicted(state, [0, 1])
    state, _ = made.plan(state, {0: seen(compute_s=10.0), 1: seen(edge_s=5.0)})
    assert state["beliefs"][0][2] > 2 and state["edges"][0] > 2
    assert made.predicted(state, [0, 1]).seconds > before.seconds


@pytest.mark.parametrize("learn", [False, True])
def test_plans_settle_where_an_edge_is_slow_because_much_is_planned_for_it(learn):
    """A whole life at full width went to and fro between edge servers and home, round by round.

    The more was computed on the machine of the edges, the slower they were, so that they were
    believed to be slow while they were used, and fast while they were not.
    """
    config = parse(compose_text(f"{FOUR} policy.learn={str(learn).lower()}"))
    done = [0.0, *fractions(LAYERS)]
    made, clients = build_policy(config.policy, 4, config, [1000] * 4), range(4)
    truth = run_workload(config, LAYERS, machines_of(config, LAYERS), [1000] * 4)
    state, told, cuts = made.init(LAYERS, clients), dict.fromkeys(clients, Observation()), []
    for _ in range(9):
        state, chosen = made.plan(state, told)
        cuts.append([chosen[client].cut for client in clients])
        away = sum(1 - done[cut] for cut in cuts[-1])
        busy = tuple(edge.slower(1 + 100 * away) for edge in truth.edges)
        played = virtual_round(dataclasses.replace(truth, edges=busy), list(chosen.values()))
        told = {k: Observation(**dataclasses.asdict(s)) for k, s in enumerate(played.seen)}
    assert cuts[-4:] == [cuts[-1]] * 4


@pytest.mark.parametrize("examples", [20, 130, 1000])
def test_what_is_measured_on_the_fleet_that_is_believed_changes_no_belief(examples):
    """Measured were mini-batches as they came, expected full ones, with the edge's optimizer."""
    options = {**CONFIG.policy, "drift": 1e-3, "offload": "forced"}
    made = Planned(dataclasses.replace(CONFIG, policy=options), [examples])
    state, plan = made.plan(made.init(LAYERS, range(2)), NOTHING)
    load = run_workload(CONFIG, LAYERS, machines_of(CONFIG, LAYERS), [examples])
    choices = [
        Assignment(a.cut, a.edge, a.codec_up, a.codec_up, a.micro_batches) for a in plan.values()
    ]
    played = virtual_round(load, choices)
    told = {k: Observation(**dataclasses.asdict(s)) for k, s in enumerate(played.seen)}
    state, _ = made.plan(state, told)
    assert (state["beliefs"], state["edges"], state["plans"]) == ({}, {}, 1)


def test_a_device_that_trains_alone_tries_its_link_again():
    made, state = policy(forget=2)
    state, first = made.plan(state, NOTHING)
    state, plan = made.plan(state, {0: seen(1.0, 1.0), 1: seen()})
    cuts = []
    for _ in range(3):
        state, plan = made.plan(state, {0: Observation(), 1: seen()})
        cuts.append(plan[0].cut)
    assert cuts[0] == len(LAYERS) and cuts[-1] == first[0].cut


def test_what_a_device_computes_at_home_is_not_forgotten_with_its_link():
    """It tells how fast it computes in every round alone; only its link is no longer measured."""
    made, state = policy(forget=2)
    state, _ = made.plan(state, NOTHING)
    state, plan = made.plan(state, {0: seen(1.0, 1.0), 1: seen()})
    assert plan[0].cut == len(LAYERS)
    whole = sum(made.predicted(state, [0]).iteration_s)
    home = Observation(iteration_s=2 * whole, compute_s=2 * whole)  # loading is next to nothing
    state, _ = made.plan(state, {0: home, 1: seen()})
    assert state["beliefs"][0] == pytest.approx([1e6, 1e6, 2.0], rel=0.01)
    state, _ = made.plan(state, {0: home, 1: seen()})
    state, _ = made.plan(state, {0: home, 1: seen()})
    assert state["beliefs"][0] == pytest.approx([50e6, 50e6, 2.0], rel=0.01)


def test_a_round_is_compared_with_training_alone_in_words():
    """It said 0.1 times faster, and 1.0 times slower."""
    told = [beside_alone(round_s, 5.0) for round_s in (2.0, 12.5, 5.1, 4.9, 0.0)]
    faster, slower, same = (
        "times faster than alone",
        "times slower than alone",
        "about as fast as alone",
    )
    assert told == [f"2.5 {faster}", f"2.5 {slower}", same, same, f"many {faster}"]


def test_models_too_large_for_a_device_are_offloaded_whatever_it_takes():
    slow = dataclasses.replace(CONFIG.network, up_mbit_s=0.1, down_mbit_s=0.1)
    alone = Planned(dataclasses.replace(CONFIG, network=slow), [1000])
    _, plan = alone.plan(alone.init(LAYERS, range(2)), NOTHING)
    assert plan[0].cut == len(LAYERS)
    small = dataclasses.replace(CONFIG.client, max_model_bytes=1000)
    forced = Planned(dataclasses.replace(CONFIG, network=slow, client=small), [1000])
    state, plan = forced.plan(forced.init(LAYERS, range(2)), NOTHING)
    assert plan[0].cut < len(LAYERS)
    assert "times slower than alone" in forced.reasons(state, [0])[0]  # it said 0.1 times faster


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"codec": ["fp32", "zip"]}, r"policy\.codec=zip: must be one of .* or a list"),
        (
            {"codec": {"up": "int8", "down": "fp32"}},
            r"policy\.codec=.*: must be one of .* or a list",
        ),
        ({"micro_batches": [0]}, r"policy\.micro_batches=\[0\]: must be whole numbers"),
        ({"micro_batches": [200]}, r"micro_batches=200: must be from 1 to client.batch_size=100"),
        ({"offload": "never"}, r"policy\.offload=never: must be free or forced"),
        ({"objective": "cost"}, r"policy\.objective=cost: must be round or iteration"),
        ({"drift": 2}, r"policy\.drift=2: must be a share"),
        ({"forget": 0}, r"policy\.forget=0: must be a number of rounds"),
        ({"patience": 1}, r"policy\.patience=1: must be a known key"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, names):
    with pytest.raises(ConfigError, match=names):
        policy(**options)


def test_a_fleet_without_machines_and_a_private_label_are_refused():
    local = parse(compose_text("policy=auto"))
    with pytest.raises(ConfigError, match=r"fleet\.devices=\[\]: must name machines"):
        build_policy(local.policy, 1, local, [10]).init(LAYERS, [0])
    private = dataclasses.replace(CONFIG.client, label_private=True)
    with pytest.raises(ConfigError, match=r"must be fixed with client\.label_private=true"):
        Planned(dataclasses.replace(CONFIG, client=private), [10])


def test_a_state_of_a_checkpoint_from_before_is_planned_on_with():
    """Choices are kept as lists, with nothing for a codec down that is that of the way up."""
    made, state = policy()
    kept = {0: [2, 4, "int8", 0, ""], 1: [3, 2, "fp16", 0, "fp32"]}
    state = state | {"choices": kept, "clients": [0, 1], "plans": 1}
    state, chosen = made.plan(state, NOTHING)
    assert chosen == {
        0: Assignment(2, 0, "int8", "int8", 4),
        1: Assignment(3, 0, "fp16", "fp32", 2),
    }
    assert (state["choices"], state["plans"]) == (kept, 1)
    again, _ = made.plan(state | {"clients": []}, NOTHING)
    assert {type(value) for choice in again["choices"].values() for value in choice} == {int, str}
