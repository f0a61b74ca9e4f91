"""The virtual clock: the time of rounds on a fleet, and what policies are told of it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import RELEASE_MACS, Crossing, MachineCosts
from fedsys.planning.hardware import hardware
from fedsys.planning.options import run_workload
from fedsys.planning.planner import evaluate
from fedsys.planning.resources import RESOURCES
from fedsys.planning.virtual_clock import predicted_iterations, virtual_round
from fedsys.planning.workload import Device, Menu, Workload
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run
from fedsys.training.federation import layered_model
from fedsys.transport.network import Network
from strategies.virtual_time import RoundClock, virtual_totals

ONE = MachineCosts("m", (1,), ((0.1, 0.2, 0.3),), ((0.2, 0.4, 0.6),), (0.0,) * 3)
CROSSINGS = tuple(Crossing(n, 1) for n in (300, 100, 10))


def load_of(*examples, network=None, **given):
    network = network or Network(1e5, 2e5, 0.01)
    devices = [Device(str(i), ONE, network, n) for i, n in enumerate(examples)]
    return Workload(CROSSINGS, (40, 80, 8), (1, 2), 4, tuple(devices), (ONE,), (1, 2), **given)


def test_a_round_alone_is_all_that_a_device_computes_and_exchanges():
    load = load_of(10, epochs=3)  # 2 mini-batches of four examples and one of two in an epoch
    played = virtual_round(load, [Assignment(3, micro_batches=1)])
    bits = 8 * (40 + 80 + 8)
    exchange = bits / 1e5 + bits / 2e5 + 0.02
    assert played.seconds == pytest.approx(3 * 10 * 1.8 + exchange)
    assert played.idle["edge"] == 1.0
    assert played.idle["device"] == pytest.approx(exchange / played.seconds)
    seen = played.seen[0]
    assert seen.compute_s == pytest.approx(10 * 1.8 / 3)
    assert seen.iteration_s == pytest.approx(seen.compute_s)
    assert (seen.up_bit_s, seen.down_bit_s) == pytest.approx((1e-5, 5e-6))


def test_a_slow_device_makes_the_others_wait():
    load = load_of(4, 40)
    played = virtual_round(load, [Assignment(1, micro_batches=2), Assignment(1, micro_batches=2)])
    assert played.device_s[1] == played.seconds > 5 * played.device_s[0]
    assert set(played.idle) == set(RESOURCES)
    assert all(0 <= share <= 1 for share in played.idle.values())
    assert played == virtual_round(
        load, [Assignment(1, micro_batches=2), Assignment(1, micro_batches=2)]
    )


def test_a_long_round_is_played_in_part_and_takes_nearly_the_same_time():
    load, plan = load_of(400, 200), [Assignment(1, micro_batches=2), Assignment(2, micro_batches=2)]
    whole = virtual_round(load, plan)
    part = virtual_round(load, plan, most=200)
    assert len(part.timeline.events) < len(whole.timeline.events) / 2
    assert part.device_s == pytest.approx(whole.device_s, rel=0.03)


def test_rates_are_those_of_the_moment_of_the_round():
    network = Network(trace=((0.0, 1e6, 1e6), (100.0, 1e4, 1e4)))
    early = virtual_round(load_of(8, network=network), [Assignment(1, micro_batches=2)])
    late = virtual_round(load_of(8, network=network), [Assignment(1, micro_batches=2)], 200.0)
    assert late.seconds > early.seconds
    assert early.seen[0].up_bit_s == pytest.approx(1e-6)
    assert late.seen[0].up_bit_s == pytest.approx(1e-4)


def test_iterations_are_predicted_for_every_schedule():
    plan = [Assignment(1, micro_batches=2)]
    ((pipelined,),) = predicted_iterations(load_of(4), plan)
    ((bounded,),) = predicted_iterations(load_of(4, schedule="bounded", depth=2), plan)
    ((one_by_one,),) = predicted_iterations(load_of(4, schedule="sequential"), plan)
    assert pipelined == pytest.approx(bounded)
    assert one_by_one > pipelined


@pytest.mark.parametrize("schedule", ["pipelined", "sequential"])
def test_norms_of_private_steps_are_waited_for_where_a_model_is_split(schedule):
    """Plans for privacy by example did without their way there and back, and their seconds."""
    plain = load_of(8, schedule=schedule, exchange=False)
    load = dataclasses.replace(plain, norm_bytes=500.0)
    way_s = 8 * 500 / 1e5 + 8 * 500 / 2e5 + 2 * 0.01
    split, whole = [Assignment(1, micro_batches=2)], [Assignment(3, micro_batches=2)]
    (steps,) = predicted_iterations(load, split)
    before = predicted_iterations(plain, split)[0]
    assert steps == pytest.approx([step + way_s for step in before])
    assert virtual_round(load, split).seconds == pytest.approx(sum(steps))
    assert predicted_iterations(load, whole) == predicted_iterations(plain, whole)


def test_plans_are_for_private_work_where_examples_have_a_promise(configure):
    given = ["fleet=pi_lab", "num_clients=2", "policy=auto", "model.norm=group"]
    plain, private = configure(*given), configure(*given, "privacy=record")
    layers = layered_model(plain, (1, 8, 8), 10)
    loads = [run_workload(c, layers, hardware(c, layers), [100]) for c in (plain, private)]
    (own, _), (there, _) = ([d.costs for d in load.devices] for load in loads)
    assert there == own.private() and loads[1].edges[0] == loads[0].edges[0].private()
    assert there.backward_s[0][0] > 2 * own.backward_s[0][0] and there.forward_s == own.forward_s
    assert loads[0].norm_bytes == 0 and loads[1].norm_bytes >= 8 * private.client.batch_size


@pytest.mark.parametrize("pieces", [1, 4])
def test_noise_at_the_cut_is_charged_to_the_device_in_plans_and_on_the_clock(configure, pieces):
    """It was free: the earliest cut, with the most numbers to make noisy, looked the best."""
    given = ["fleet=pi_lab", "num_clients=1", "policy=auto", "model.norm=group"]
    plain, noisy = configure(*given), configure(*given, "privacy=cut")
    layers = layered_model(plain, (1, 8, 8), 10)
    loads = [run_workload(c, layers, hardware(c, layers), [100]) for c in (plain, noisy)]
    device = loads[1].devices[0].costs
    per_number = device.release_s[0] / math.prod(layers.units[0].out_shape)
    mac_s = sum(device.forward_s[-1]) / device.rows[-1] / sum(u.macs for u in layers.units)
    assert per_number == pytest.approx(RELEASE_MACS["gaussian"] * mac_s)
    for cut in range(1, len(layers)):
        choice = [Assignment(cut, micro_batches=pieces)]
        before, after = (predicted_iterations(load, choice)[0][0] for load in loads)
        size = loads[0].batch_size
        assert after - before == pytest.approx(size * device.release_s[cut - 1])
        menus = [Menu(load, choice).stages(load.devices[0]) for load in loads]
        added = menus[1].forward[0] - menus[0].forward[0]
        assert added * pieces == pytest.approx(size * device.release_s[cut - 1])
    whole = [Assignment(len(layers), micro_batches=pieces)]
    assert predicted_iterations(loads[0], whole) == predicted_iterations(loads[1], whole)


@pytest.mark.parametrize("schedule", ["pipelined", "sequential"])
@pytest.mark.parametrize(
    "choice",
    [
        Assignment(3, micro_batches=2),
        Assignment(1, micro_batches=2),
        Assignment(2, micro_batches=1),
    ],
)
@pytest.mark.parametrize("examples", [2, 6, 9, 10])
def test_what_is_left_of_an_epoch_is_predicted_as_it_is_played(examples, choice, schedule):
    """A last mini-batch counted as a full one: of two examples, a device took twice too long."""
    machine = dataclasses.replace(ONE, operation_s=0.01, load_s=0.02, update_s=(0.01, 0.0, 0.02))
    load = load_of(examples, epochs=2, schedule=schedule, exchange=False)
    load = dataclasses.replace(load, devices=(dataclasses.replace(load.devices[0], costs=machine),))
    (steps,) = predicted_iterations(load, [choice])
    played = virtual_round(load, [choice])
    assert len(steps) == load.iterations(load.devices[0])
    # pieces of unlike size (five examples in two) are taken to be of one
    close = 0.02 if examples == 9 else 1e-6
    assert sum(steps) == pytest.approx(played.seconds, rel=close)
    if schedule == "pipelined":
        assert evaluate(load, [choice]).round_s[0] == pytest.approx(sum(steps))


def test_totals_are_weighted_by_time():
    rows = [
        {"round": 1.0, "virtual_s": 1.0, **{f"idle_{k}": 0.0 for k in RESOURCES}},
        {"round": 2.0, "virtual_s": 3.0, **{f"idle_{k}": 1.0 for k in RESOURCES}},
    ]
    told = virtual_totals(rows)
    assert told["virtual_s"] == 4.0 and told["prediction_error"] is None
    assert told["idle"] == pytest.approx(dict.fromkeys(RESOURCES, 0.75))
    assert virtual_totals([{"round": 1.0}]) == {}


EMULATED = (
    "fleet=nominal", "fleet.devices=[pi3]", "fleet.emulate=true", "network=ethernet",
    "network.emulate=true", "num_clients=2", "rounds=2", "data=synthetic", "data.examples=60",
    "data.test_examples=10", "data.shape=[1,8,8]", "model=cnn", "model.width=4", "model.hidden=16",
    "client.batch_size=10", "client.epochs=1", "json=true",
)  # fmt: skip


@pytest.mark.parametrize("policy", ["policy=none", "policy=fixed policy.cut=4"])
def test_every_round_in_real_time_says_how_far_the_prediction_was_off(policy, configure, tmp_path):
    """Devices with the whole model measured nothing, and so nothing was said of them."""
    run(configure(*EMULATED, *policy.split(), f"run.dir={tmp_path / 'run'}"))
    rows = RunFolder.open(tmp_path / "run").rounds()
    assert [row["prediction_error"] >= 0 for row in rows] == [True, True]


def test_what_is_predicted_is_compared_with_what_was_measured(configure):
    config = configure(*EMULATED, "policy=none")
    layers = layered_model(config, (1, 8, 8), 10)
    clock = RoundClock(config, layers, [60, 60], None)
    assert "prediction_error" not in clock.row([0, 1])  # neither measured anything
    machines = hardware(config, layers)
    load = run_workload(config, layers, machines, [60, 60])
    takes = predicted_iterations(load, [Assignment(len(layers), micro_batches=1)] * 2)
    row = clock.row([0, 1], {k: steps[1] / 1.5 for k, steps in enumerate(takes)})
    assert row["prediction_error"] == pytest.approx(0.5)


def test_a_run_tells_its_virtual_time_and_plans_anew_when_the_network_fails(configure, tmp_path):
    options = (
        "policy=auto", "schedule=pipelined", "fleet=nominal", "fleet.devices=[pi3]",
        "network=ethernet", "network.trace=[[0.1,0.2,0.2]]", "num_clients=2", "rounds=3",
        "data=synthetic", "data.examples=400", "model=cnn", "client.batch_size=16",
        "client.epochs=1",
    )  # fmt: skip
    results = []
    for workers in (1, 2):
        given = (*options, f"runtime.workers={workers}", f"run.dir={tmp_path / str(workers)}")
        run(configure(*given))
        results.append(RunFolder.open(tmp_path / str(workers)).info["result"])
    ours = [[row[k] for k in ("virtual_s", "idle", "prediction_error")] for row in results]
    assert ours[0] == ours[1]  # whoever works, and however fast
    assert results[0]["model_sha256"] == results[1]["model_sha256"]
    # Offloaded while the network was fast, and alone at the end
    assert results[0]["edge_steps"] > 0
    assert all(cut["device_share"] == 1.0 for cut in results[0]["cuts"].values())


def test_each_way_takes_as_long_as_its_own_codec_makes_it(configure, tmp_path):
    """The clock took the codec of activations for gradients, too: int8 up made both ways fast."""
    options = (
        "policy=fixed", "policy.cut=1", "fleet=nominal", "fleet.devices=[pi3]", "network=4g",
        "num_clients=1", "rounds=1", "data=synthetic", "data.examples=32", "model=cnn",
        "client.batch_size=16", "client.epochs=1",
    )  # fmt: skip
    took = {}
    for up, down in (("fp32", "fp32"), ("int8", "fp32"), ("fp32", "int8"), ("int8", "int8")):
        folder = tmp_path / f"{up}-{down}"
        given = (*options, f"policy.codec={{up:{up},down:{down}}}", f"run.dir={folder}")
        run(configure(*given))
        took[up, down] = RunFolder.open(folder).info["result"]["virtual_s"]
    saved_up = took["fp32", "fp32"] - took["int8", "fp32"]
    saved_down = took["fp32", "fp32"] - took["fp32", "int8"]
    assert saved_up > 1.5 * saved_down > 0  # the uplink of 4G is slower
    both = took["fp32", "fp32"] - took["int8", "int8"]
    assert saved_up + saved_down == pytest.approx(both)
