"""FedAdapt with an agent that scores cuts: what is known, expected, scored, guarded and learned."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.assignment import Assignment
from fedsys.planning.learning.agent import load
from fedsys.planning.learning.cut_agent import CutAgent, untrained
from fedsys.planning.learning.cut_deciding import CutFedAdapt, guarded, sparing
from fedsys.planning.learning.cut_ppo import (
    Chosen,
    _networks,
    _ppo,
    _weights,
    improved,
    train,
)
from fedsys.planning.learning.device_rounds import CutEnvironment, DeviceRows
from fedsys.planning.learning.fleet_times import Lines, Others
from fedsys.planning.learning.fleets import Draws, FleetRounds
from fedsys.planning.learning.knowing import Knowledge, table_of
from fedsys.planning.learning.making import agent_for, scenario_of
from fedsys.planning.learning.options import FedAdaptOptions, Hyper, Training
from fedsys.planning.learning.outlook import outlook
from fedsys.planning.learning.run_fleet import RunFleet
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.planner import options as choices_of
from fedsys.planning.resources import Observation
from fedsys.planning.stage_table import StageTable
from fedsys.planning.virtual_clock import virtual_round
from fedsys.runs.trees import keepable
from fedsys.training.federation import layered_model

HYPER = Hyper(
    layers=(16,), lr=3e-3, gamma=0.0, gae_lambda=0.0, epochs=4, every=4, batch=128,
    environments=20, updates=3, entropy=0.0,
)  # fmt: skip
SMALL = FedAdaptOptions(training=Training(draws=Draws(devices=(2, 4), cuts=(2, 5))), ppo=HYPER)


def of_model(model, *more):
    config = parse(
        compose_text(
            f"policy=fedadapt fleet=pi_lab network=wifi_75 model={model} num_clients=5 "
            f"client.batch_size=100 schedule=pipelined {' '.join(more)}"
        )
    )
    layers = layered_model(config, (3, 32, 32), 10)
    return scenario_of(config, layers, [1000] * 5, SMALL)


@pytest.fixture(scope="module")
def base():
    return of_model("vgg5")


def rounds_of(base, count=20, seed=0, **more):
    draws = dataclasses.replace(SMALL.training.draws, **more)
    made = FleetRounds(table_of(base.load, base.shares, base.cuts), count, draws)
    made.begin(np.random.default_rng(seed))
    return made


@pytest.fixture(scope="module")
def agent(base):
    return train(rounds_of(base), HYPER, seed=3, about={"model": "vgg5"})


def measured(seconds, compute=0.0, mbit_s=75.0, edge=0.0):
    bit_s = 1e-6 / mbit_s
    return Observation(
        iteration_s=seconds, compute_s=compute, edge_s=edge, up_bit_s=bit_s, down_bit_s=bit_s,
        steps=10, seconds=10 * seconds,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What is known and expected


def known_of(works, guess=8.0):
    row, zero = np.array([works], dtype=float), np.zeros(1)
    none = np.zeros(1, dtype=np.int64)
    return Knowledge(
        np.array([guess]), row, 0 * row, zero, zero, zero, zero, none, none, zero, zero
    )


SHARES = np.array([[0.1, 0.6, 0.9, 1.0]])


@pytest.mark.parametrize(
    ("tried", "works", "unmeasured"),
    [
        ([0, 0, 0, 0], [0.8, 4.8, 7.2, 8.0], [1, 1, 1, 1]),  # as it is believed at first
        ([0, 0, 0, 5], [0.5, 3.0, 4.5, 5.0], [0.9, 0.4, 0.1, 0]),  # alone: in proportion
        ([1, 0, 0, 0], [1.0, 6.0, 9.0, 10.0], [0, 5 / 6, 8 / 9, 0.9]),  # beyond: in proportion
        ([1, 0, 0, 4.6], [1.0, 3.0, 4.2, 4.6], None),  # between the two, by what lies between
        ([1, 2, 0, 2.2], [1.0, 2.0, 2.15, 2.2], None),
        ([3, 0, 0, 2.0], [3.0, 3.0, 3.0, 3.0], None),  # noise: no part takes less than none
    ],
)
def test_work_is_what_was_measured_and_in_proportion_between(tried, works, unmeasured):
    known = known_of(tried)
    found = known.works_s(SHARES)[0]
    assert found[:3] == pytest.approx(works[:3])
    if unmeasured is not None:
        assert found == pytest.approx(works)
        assert known.unmeasured(SHARES)[0] == pytest.approx(unmeasured)


@pytest.mark.parametrize("model", ["vgg5", "vgg8"])
def test_what_a_profile_is_right_about_is_expected_as_planners_do(model):
    """The closed form for one device, by the best number of pieces, for all devices and cuts."""
    base = of_model(model)
    fleet = RunFleet(base)
    seen = outlook(*fleet.of(range(5)))
    load = base.load
    table = StageTable(load, choices_of(load))
    alone = table.alone()
    cuts = np.array([table.choices[i].cut for i in table.choice_at[:, 0]])
    for i, cut in enumerate(base.cuts):
        best = alone[:, cuts == cut].min(axis=1)
        assert seen.round_s[:, i] == pytest.approx(best, rel=0.02), cut


def test_a_mini_batch_that_is_not_full_takes_as_much_less(base):
    """Cuts were compared by what 100 images take to cross, where devices had 20 in a round."""
    few = tuple(dataclasses.replace(device, examples=20) for device in base.load.devices)
    scarce = Scenario(dataclasses.replace(base.load, devices=few), base.shares, base.cuts)
    fleet, load = RunFleet(scarce), dataclasses.replace(scarce.load, devices=few[:1])
    seen = outlook(*fleet.of([0]))
    for cut in range(len(base.cuts)):
        choices = fleet.assignments([0], np.array([cut]), seen.course[:, cut])
        played = virtual_round(load, choices)
        assert seen.round_s[0, cut] == pytest.approx(played.seconds, rel=0.05), cut


def test_devices_in_another_order_get_the_same_cuts(base, agent):
    fleet, order = RunFleet(base), [3, 0, 4, 2, 1]
    straight = agent.scores(fleet.look(*fleet.of(range(5))).seen)
    turned = agent.scores(fleet.look(*fleet.of(order)).seen)
    assert turned == pytest.approx(straight[order], rel=1e-5)


def test_iterations_of_many_fleets_are_those_of_each(base):
    """With contention for edges; and each copy differs from its fleet in what one device does."""
    made = rounds_of(base, 12)
    world = made._world
    cut = made._hoped.wished
    course = made._outlook.course[np.arange(len(cut)), cut]
    s = world.stages(cut, course)
    whole = Lines.of(world.rows).iterations_s(s)
    copies = Others.among(world.rows)
    again = copies.iterations_s(s, s)
    for k, start in enumerate(copies.starts):
        fleet = np.flatnonzero(world.rows.fleet == world.rows.fleet[k])
        assert copies.of[start : start + len(fleet)].tolist() == fleet.tolist()
        assert copies.other[start : start + len(fleet)].tolist() == (fleet == k).tolist()
        assert again[start : start + len(fleet)] == pytest.approx(whole[fleet])
    alone = Lines(
        np.arange(len(cut)), np.zeros(len(cut), dtype=np.int64), np.zeros(len(cut), dtype=np.int64),
        np.ones(len(cut), dtype=np.int64),
    ).iterations_s(s)  # fmt: skip
    assert (whole >= alone * (1 - 1e-9)).all() and (whole > alone * 1.001).any()


# --------------------------------------------------------------------------------------------------
# The environment, training, files


def test_the_environment_passes_the_checkers_of_both_libraries(base):
    from gymnasium.utils.env_checker import check_env as of_gymnasium
    from stable_baselines3.common.env_checker import check_env as of_stable_baselines3

    of_gymnasium(CutEnvironment(rounds_of(base, 2)), skip_render_check=True)
    of_stable_baselines3(CutEnvironment(rounds_of(base, 2)), warn=True)


def test_the_cut_that_was_expected_to_be_fastest_earns_nothing_beside_itself(base):
    made = rounds_of(base)
    for _ in range(3):
        earned, _ = made.step(made._hoped.wished)
        assert earned == pytest.approx(0.0)
    earned, _ = made.step(made._hoped.wished * 0 + made.legal.shape[1] - 1)
    assert earned.mean() < -0.05  # all alone


def test_where_nothing_is_known_of_a_device_only_the_whole_model_may_be_taken(base):
    made = rounds_of(base, unknown=1.0)
    assert made.legal[:, -1].all() and not made.legal[:, :-1].any()
    assert np.isfinite(made.seen).all()
    made.step(np.zeros(len(made.legal), dtype=np.int64))
    assert made.legal.sum() > 2 * len(made.legal)


def test_the_same_seed_gives_the_same_agent_whatever_else_is_drawn(base, agent):
    torch.rand(7)
    before = torch.get_rng_state()
    again = train(rounds_of(base, seed=9), HYPER, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(again.weights[n], w) for n, w in agent.weights.items())


def test_numpy_scores_as_the_networks_that_were_trained(base, agent):
    fleet = RunFleet(base)
    seen = fleet.look(*fleet.of(range(5))).seen
    networks = _networks(seen.shape[1], list(HYPER.layers), agent.weights)
    with torch.no_grad():
        wanted = networks.forward_actor(torch.from_numpy(seen).reshape(5, -1))
    assert agent.scores(seen) == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)


def test_an_agent_is_the_same_after_it_was_kept_and_serves_other_models(base, agent, tmp_path):
    agent.save(tmp_path / "a")
    kept = load(tmp_path / "a", SMALL)
    assert isinstance(kept, CutAgent) and kept.about["model"] == "vgg5"
    for model in ("vgg8", "mobilenet_v2"):
        fleet = RunFleet(of_model(model))
        seen = fleet.look(*fleet.of(range(5))).seen
        assert (kept.cuts(seen) == agent.cuts(seen)).all()
        assert np.isfinite(kept.scores(seen)).all()


def test_without_an_update_an_agent_takes_what_is_expected_to_be_fastest(base, tmp_path):
    """It is what training begins with, up to its first small weights, and needs no extra."""
    never = dataclasses.replace(SMALL, ppo=dataclasses.replace(HYPER, updates=0))
    made = agent_for(base, never, 3, folder=tmp_path, model="vgg5")
    assert made.about == {"steps": 0, "model": "vgg5"}
    fleet = RunFleet(base)
    look = fleet.look(*fleet.of(range(5)))
    cuts = load(tmp_path / "agent.safetensors", never).cuts(look.seen)
    assert cuts.tolist() == np.where(look.legal, look.outlook.round_s, np.inf).argmin(1).tolist()

    model = _ppo(DeviceRows(rounds_of(base), 0), HYPER, 0)
    begins = CutAgent(_weights(model.policy)).scores(look.seen)
    apart = np.abs(begins - made.scores(look.seen))[look.legal]
    assert apart.max() < 1.0  # as much as 12 % of the time

    with pytest.raises(ConfigError, match=r"policy\.learn=True: must be false with an agent that"):
        CutFedAdapt(base, dataclasses.replace(never, learn=True), made)
    with pytest.raises(ConfigError, match=r"updates=0: must be at least 1 with action=shares"):
        FedAdaptOptions.of({"kind": "fedadapt", "action": "shares", "ppo": {"updates": 0}})


def test_an_agent_of_another_kind_is_refused(agent, tmp_path):
    agent.save(tmp_path / "a")
    shares = dataclasses.replace(SMALL, action="shares")
    with pytest.raises(ConfigError, match=r"policy\.action=shares: must be cuts, for which"):
        load(tmp_path / "a", shares)
    data = bytearray((tmp_path / "a").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged: its checksum is not that"):
        load(tmp_path / "a")


def test_a_trained_agent_lies_in_the_run_folder_and_is_taken_from_there(base, tmp_path):
    told = []
    first = agent_for(base, SMALL, 3, folder=tmp_path, say=told.append)
    assert any("trained the agent" in text for text in told)
    never = dataclasses.replace(SMALL, ppo=dataclasses.replace(HYPER, updates=10**6))
    again = agent_for(base, never, 3, folder=tmp_path)
    assert all(np.array_equal(again.weights[n], w) for n, w in first.weights.items())


def test_an_update_makes_what_was_rewarded_more_likely(base, agent):
    fleet = RunFleet(base)
    seen = fleet.look(*fleet.of(range(5))).seen
    taken = [
        Chosen(seen, np.full(5, cut), np.full(5, earned))
        for cut, earned in ((1, 1.0), (0, 0.0), (1, 1.0), (2, 0.0))
    ]
    hyper = dataclasses.replace(HYPER, lr=1e-3, epochs=20)
    better = improved(agent, taken, hyper, seed=1)

    def likelihood(one):
        scores = np.exp(one.scores(seen) - one.scores(seen).max(axis=1, keepdims=True))
        return (scores[:, 1] / scores.sum(axis=1)).mean()

    assert likelihood(better) > likelihood(agent)
    # Networks are those of the agent: with other layers configured it ended in a traceback
    again = improved(agent, taken, dataclasses.replace(hyper, layers=(7, 5)), seed=1)
    assert all(np.array_equal(again.weights[n], w) for n, w in better.weights.items())


# --------------------------------------------------------------------------------------------------
# At work


def test_the_first_round_rests_on_the_fleet_file_or_is_alone(base):
    seen = dict.fromkeys(range(5), Observation())
    told = CutFedAdapt(base, SMALL, untrained())
    state, plan = told.plan(told.init(), seen)
    assert {plan[k].cut for k in (0, 1, 3, 4)} == {1}
    assert "the agent scores cut 1 highest, 10% of the work" in told.reasons(state, [0])[0]
    for other in (
        CutFedAdapt(base, SMALL, untrained(), told=False),
        CutFedAdapt(base, dataclasses.replace(SMALL, first="alone"), untrained()),
    ):
        state, plan = other.plan(other.init(), seen)
        assert plan == {k: Assignment(5, micro_batches=1) for k in range(5)}
        assert other.reasons(state, [0])[0] == "its first round tells what it takes"
        state, plan = other.plan(state, {k: measured(2.0, 2.0) for k in range(5)})
        assert {a.cut for a in plan.values()} == {1}


def test_a_link_that_becomes_slow_sends_a_device_home_in_the_next_round(base):
    """And a 5 Mbit/s device, whose transfers take longer than all its computing, stays there."""
    made = CutFedAdapt(base, dataclasses.replace(SMALL, spare_links=False), untrained())
    state, plan = made.plan(made.init(), {0: Observation(), 3: Observation()})
    assert [plan[k].cut for k in (0, 3)] == [1, 1]
    state, plan = made.plan(state, {0: measured(2.0, 0.1, 5.0), 3: measured(0.8, 0.4)})
    assert [plan[k].cut for k in (0, 3)] == [5, 1]
    assert "alone" in made.reasons(state, [0])[0]
    state, plan = made.plan(state, {0: measured(0.64, 0.64, 5.0), 3: measured(0.8, 0.4)})
    assert plan[0].cut == 5
    state, plan = made.plan(state, {0: measured(0.64, 0.64, 75.0), 3: measured(0.8, 0.4)})
    assert plan[0].cut == 1


def test_no_device_takes_a_cut_that_is_expected_to_be_slower_than_alone(base):
    weights = untrained().weights
    contrary = CutAgent({**weights, "line": -weights["line"]})  # takes the slowest cut
    made = CutFedAdapt(base, SMALL, contrary)
    seen = {k: Observation() for k in range(5)}
    state = made.init()
    for _ in range(3):
        state, plan = made.plan(state, seen)
        look = made._fleet.look(*made._known(state, range(5)))
        for k in range(5):
            at = base.cuts.index(plan[k].cut)
            assert look.outlook.round_s[k, at] <= 1.02 * look.outlook.round_s[k, -1]
        seen = {k: measured(3.0, 0.3, 4.0) for k in range(5)}
    assert {a.cut for a in plan.values()} == {5}
    cut = np.array([0, 0])
    legal = np.ones((2, 4), dtype=bool)
    seen = dataclasses.replace(look.outlook, round_s=np.array([[1.03, 1, 1, 1], [1.01, 1, 1, 1.0]]))
    assert guarded(seen, cut, legal, 0.02).tolist() == [3, 0]
    assert guarded(seen, cut, legal, None).tolist() == [0, 0]
    legal[:, -1] = False  # may not hold the whole model
    assert guarded(seen, cut, legal, 0.02).tolist() == [0, 0]


def test_who_is_ready_before_the_slowest_anyway_leans_on_its_link_least(base):
    """Devices were offloaded where that saved the fleet nothing, until a link dropped.

    On one of 50 unseen fleets of the benchmark the slowest devices trained alone; two others had
    cuts that made them faster than they had to be, and when the link of one fell from 75 to
    5 Mbit/s the round took 34 s instead of 14: over all rounds 5.0 % above classic training.
    """
    fleet = RunFleet(base)
    seen = fleet.look(*fleet.of(range(3))).outlook
    round_s = np.array([[9.0, 9.5, 9.0, 11.0], [5.0, 4.0, 8.0, 9.0], [1.0, 9.0, 9.0, 9.5]])
    link_s = np.array([[5.0, 3.0, 2.0, 0.0], [5.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    seen = dataclasses.replace(seen, round_s=round_s, link_s=link_s, exchange_s=0.0 * link_s)
    legal = np.ones((3, 4), dtype=bool)
    # The first sets the pace, and has an equally fast cut; the third keeps its own of equal ones
    assert sparing(seen, np.array([0, 1, 1]), legal).tolist() == [2, 3, 1]
    assert sparing(seen, np.array([3, 1, 1]), legal).tolist() == [3, 3, 3]
    heavy = dataclasses.replace(seen, exchange_s=np.array([[0.0, 1.0, 2.0, 9.0]] * 3))
    assert sparing(heavy, np.array([3, 1, 1]), legal).tolist() == [1, 1, 0]  # so is the model
    legal[1, 3] = False  # may not hold the whole model
    assert sparing(seen, np.array([0, 1, 1]), legal).tolist() == [2, 2, 1]

    made = CutFedAdapt(base, SMALL, untrained())
    state, plan = made.plan(made.init(), {0: Observation(), 3: Observation()})
    assert plan[3].cut == 1  # a Pi 3
    state, plan = made.plan(state, {0: measured(0.6, 0.1), 3: measured(0.8, 0.4)})
    state, plan = made.plan(state, {0: measured(0.64, 0.64), 3: measured(0.8, 0.4)})
    assert [plan[k].cut for k in (0, 3)] == [5, 1]
    assert "ready before the slowest" in made.reasons(state, [0])[0]


def test_an_iteration_that_was_slower_than_expected_is_believed_for_some_rounds(base):
    made = CutFedAdapt(base, SMALL, untrained())
    state, plan = made.plan(made.init(), {0: Observation()})
    assert plan[0].cut == 1
    state, plan = made.plan(state, {0: measured(2.5, 0.1)})  # a crowded edge
    assert plan[0].cut != 1
    cuts = []
    for _ in range(12):
        state, plan = made.plan(state, {0: measured(0.66, 0.64)})
        cuts.append(plan[0].cut)
    assert cuts[-1] == 1  # tried again


def test_a_machine_that_has_become_slower_is_so_at_all_cuts(base):
    made = CutFedAdapt(base, SMALL, untrained())
    state, _ = made.plan(made.init(), {2: Observation()})
    state, _ = made.plan(state, {2: measured(0.1, 0.1)})
    state, _ = made.plan(state, {2: measured(0.1, 0.02)})
    works = []
    for seconds in (0.1, 1.0):
        setup, known = made._known(state, [2])
        works.append(known.works_s(setup.share)[0])
        state, _ = made.plan(state, {2: measured(seconds, seconds)})
    setup, known = made._known(state, [2])
    works.append(known.works_s(setup.share)[0])
    assert (works[2] > 5 * works[1]).all()


def test_who_is_alone_measures_its_link_now_and_then(base):
    made = CutFedAdapt(base, dataclasses.replace(SMALL, probe_every=3), untrained())
    state, _ = made.plan(made.init(), {0: Observation()})
    alone, due = Observation(iteration_s=0.64, compute_s=0.64, steps=10, seconds=6.4), []
    state, plan = made.plan(state, {0: measured(3.0, 0.1, 3.0)})
    for _ in range(6):
        assert plan[0].cut == 5
        due.append(bool(made.unmeasured(state, [0])))
        got = measured(0.64, 0.64, 3.0) if due[-1] else alone
        state, plan = made.plan(state, {0: got})
    assert due == [False, False, False, True, False, False]
    due = []
    for _ in range(8):  # links that no probe can measure
        state, plan = made.plan(state, {0: alone})
        due.append(bool(made.unmeasured(state, [0])))
    assert due == [True, False, False, False, True, False, False, False]
    never = CutFedAdapt(base, dataclasses.replace(SMALL, probe_every=0), untrained())
    assert never.unmeasured(state, [0]) == []


def test_a_device_too_small_for_the_model_never_has_it_whole(base):
    for told in (True, False):
        made = CutFedAdapt(base, SMALL, untrained(), forced=True, told=told)
        state, plan = made.plan(made.init(), {0: Observation()})
        for _ in range(3):
            assert plan[0].cut < 5
            state, plan = made.plan(state, {0: measured(90.0, 0.01, 1.0)})


@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3), st.floats(0.01, 1e6))
@settings(max_examples=25, deadline=None)
def test_whatever_is_measured_all_is_finite_and_repeats(base, seconds, mbit_s):
    made = CutFedAdapt(base, SMALL, untrained())
    seen = {k: measured(s, s / 2, mbit_s, s / 3) for k, s in enumerate(seconds)}
    state, _ = made.plan(made.init(), dict.fromkeys(range(3), Observation()))
    for _ in range(3):
        before = copy.deepcopy(state)
        state, plan = made.plan(state, seen)
        assert (state, plan) == made.plan(before, seen)
        assert keepable(state) and np.isfinite(np.array(list(state["devices"].values()))).all()


def test_an_agent_that_goes_on_learning_repeats_and_changes_its_weights(base, agent):
    options = dataclasses.replace(SMALL, learn=True, learn_every=3)
    ends = []
    for _ in range(2):
        made = CutFedAdapt(base, options, agent, seed=5)
        state, seen = made.init(), dict.fromkeys(range(3), Observation())
        cuts = []
        for number in range(6):
            state, plan = made.plan(state, seen)
            state = copy.deepcopy(state)  # as through a checkpoint
            cuts.append([plan[k].cut for k in range(3)])
            seen = {k: measured(0.3 + 0.1 * k + 0.01 * number, 0.2) for k in range(3)}
        ends.append((cuts, state["learning"]["weights"]))
        assert keepable(state)
    assert ends[0] == ends[1]
    assert ends[0][1]["line"] != agent.weights["line"].tolist()


@pytest.mark.slow
def test_a_trained_agent_saves_time_on_fleets_that_it_has_not_seen(base):
    """Mean time of the slowest device over alone, on the fleets that agents of shares are held to.

    Those reach 0.80 after a short training, the optimum is 0.633. An agent of this kind begins with
    the cut that is expected to be the fastest and reaches 0.734 without an update, 0.737 with ten:
    so this holds what the policy comes to with all that stands around the agent, and not what
    training adds.
    """
    from fedsys.planning.learning.scenarios import draw

    hyper = dataclasses.replace(
        HYPER, layers=(32, 32), every=8, updates=10, environments=64, batch=512
    )
    made = CutFedAdapt(base, SMALL, train(rounds_of(base, 64), hyper, seed=0))
    random, saved = np.random.default_rng(77), []
    for _ in range(12):
        scenario = draw(base, random)
        count = len(scenario.load.devices)
        state, seen = made.init(), {k: Observation() for k in range(count)}
        for _ in range(6):
            state, plan = made.plan(state, seen)
            played = virtual_round(scenario.load, [plan[k] for k in range(count)])
            seen = {
                k: Observation(**dataclasses.asdict(s), steps=1, seconds=1.0)
                for k, s in enumerate(played.seen)
            }
        saved.append(max(s.iteration_s for s in played.seen) / max(scenario.baseline_s))
    assert max(saved) <= 1.02
    assert float(np.mean(saved)) < 0.75
