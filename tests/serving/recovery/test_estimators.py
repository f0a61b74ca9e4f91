"""What was not measured is estimated from what was, and how far off that is, is said."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fedsys.config import compose_text, parse
from fedsys.errors import RunError
from fedsys.models import build, layered
from fedsys.models.resilient import exit_chain, resilient
from fedsys.pruning.portfolio import PARENT, Portfolio
from fedsys.runs.resilience import Resilience
from fedsys.serving.recovery.downtime import BuildSample, BuildTimes, DowntimeParts
from fedsys.serving.recovery.opening import OtherWays, _ways
from fedsys.serving.recovery.path_accuracy import AccuracyEstimator
from fedsys.serving.recovery.regression import Estimator, fit_linear, held_out
from fedsys.serving.recovery.unit_latency import (
    FEATURES,
    WORK,
    LatencyEstimator,
    UnitSample,
    unit_features,
    unit_samples,
)
from fedsys.serving.routes import WHOLE
from fedsys.training.resilience import ExitScore, PathScores, SkipScore

SHAPE = (3, 16, 16)


def chain(name="resnet.resnet32", **options):
    spec = {"_target_": f"fedsys.models.{name}", **options}
    model = build(spec, input_shape=SHAPE, num_classes=5, seed=1)
    return layered(model.eval(), SHAPE)


def invented(layers, device="pi", rows=1, noise=0.0):
    """Return samples of a machine that obeys a law: so much for each kind of work and element."""
    generator = np.random.default_rng(0)
    law = dict.fromkeys(FEATURES, 0.0)
    law |= {"conv_macs": 1e-9, "pointwise_macs": 2e-9, "depthwise_macs": 8e-9, "linear_macs": 3e-9,
            "norm_out": 1e-8, "nodes": 2e-6}  # fmt: skip
    return [
        UnitSample(device, kind, values, float(np.dot(values, list(law.values())))
                   * math.exp(noise * generator.standard_normal()))
        for kind, values in unit_features(layers, SHAPE, rows)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def samples():
    models = [
        chain(width=4), chain(width=6), chain(width=10), chain("mobilenet.mobilenet_v2"),
        chain("vgg.vgg5", norm="none"),
    ]  # fmt: skip
    batches = [invented(layers, rows=rows) for layers in models for rows in (1, 3)]
    return [sample for batch in batches for sample in batch]


@pytest.fixture(scope="module")
def estimator(samples):
    return LatencyEstimator(samples)


# --------------------------------------------------------------------------------------------------
# Latency


def test_features_say_what_a_unit_is_made_of():
    layers = chain(width=4)
    found = unit_features(layers, SHAPE, rows=2)
    assert [kind for kind, _ in found] == ["conv"] * 16 + ["linear"]
    stem, block = (dict(zip(FEATURES, found[i][1], strict=True)) for i in (0, 1))
    assert stem["elements_in"] == 2 * 3 * 256
    assert stem["macs"] == stem["conv_macs"] == 2 * 3 * 4 * 9 * 256
    assert block["conv_macs"] == 2 * layers.units[1].macs
    assert block["norm_out"] == 2 * 2 * 4 * 256  # two norms, two images, four channels
    kinds = {kind for kind, _ in unit_features(chain("mobilenet.mobilenet_v2"), SHAPE)}
    assert kinds == set(WORK)


def test_a_machine_that_obeys_a_law_is_estimated_where_nothing_was_measured(samples, estimator):
    errors = estimator.errors["pi"]
    assert errors.ours <= errors.linear < 0.02 < errors.macs
    assert errors.samples == len(samples)
    unseen = chain(width=8)
    truth = [sample.seconds for sample in invented(unseen)]
    told = estimator.seconds("pi", unseen, SHAPE)
    assert not any(measured for _, measured in told)
    assert [seconds for seconds, _ in told] == pytest.approx(truth, rel=0.05)
    costs = estimator.costs("pi", unseen, SHAPE)
    assert costs.seconds(1, 0, len(unseen))[0] == pytest.approx(sum(truth), rel=0.05)


def test_what_was_measured_wins(samples):
    seen = chain(width=4)
    slow = [dataclasses.replace(s, seconds=3 * s.seconds) for s in invented(seen)]
    told = LatencyEstimator([*(s for s in samples if s.features != slow[0].features), *slow])
    assert told.seconds("pi", seen, SHAPE)[0] == (slow[0].seconds, True)


def test_the_head_of_an_exit_is_estimated_like_any_unit(estimator):
    ours = resilient(chain(width=8), SHAPE, 5, seed=1)
    path = exit_chain(ours, 6)
    truth = sum(sample.seconds for sample in invented(path))
    told = estimator.costs("pi", path, SHAPE)
    assert told.seconds(1, 0, len(path))[0] == pytest.approx(truth, rel=0.05)


def test_samples_of_this_machine_are_kept_in_a_file_and_give_the_same_estimates(tmp_path):
    layers = chain(width=4)
    measured = unit_samples(layers, torch.randn(2, *SHAPE), repeats=3)
    assert [s.features for s in measured] == [f for _, f in unit_features(layers, SHAPE, 2)]
    assert all(0 < s.seconds < 60 for s in measured)
    first = LatencyEstimator(measured)
    first.save(tmp_path / "latency.json")
    again = LatencyEstimator.load(tmp_path / "latency.json")
    other = chain(width=6)
    assert again.seconds("here", other, SHAPE) == first.seconds("here", other, SHAPE)
    assert again.samples == first.samples
    stored = json.loads((tmp_path / "latency.json").read_text())["held_out"]["here"]
    assert stored["samples"] == first.errors["here"].samples
    with pytest.raises(RunError, match="nothing was measured on pi; there are samples of here"):
        again.seconds("pi", other, SHAPE)


@pytest.mark.parametrize("body", ["{", '{"format": 1, "features": [], "samples": []}', "[]"])
def test_a_file_that_is_none_is_refused(tmp_path, body):
    (tmp_path / "latency.json").write_text(body)
    with pytest.raises(RunError, match="no latencies can be read"):
        LatencyEstimator.load(tmp_path / "latency.json")


# --------------------------------------------------------------------------------------------------
# Regression


def test_no_weight_is_negative_so_more_work_never_takes_less():
    features = np.array([[1.0, 5.0], [2.0, 4.0], [3.0, 1.0], [4.0, 2.0]])
    predict = fit_linear(features, np.array([1.0, 2.0, 3.0, 4.0]))
    steps = predict(np.array([[1.0, 1.0], [2.0, 1.0], [2.0, 9.0]]))
    assert steps[0] <= steps[1] <= steps[2]


def test_equal_samples_are_held_out_together_and_tell_the_noise():
    """A block that occurs five times would be estimated from its twins, with no error at all."""
    features = np.repeat(np.arange(1.0, 13.0)[:, None], 2, axis=0)
    values = np.repeat(np.random.default_rng(1).uniform(1, 2, 12), 2)
    errors = held_out(features, values)
    assert errors.noise == 0.0
    assert errors.ours > 0.05
    assert math.isnan(held_out(features[:10], values[:10]).ours)


def test_a_bend_that_a_line_cannot_follow_is_corrected_where_it_was_measured():
    x = np.linspace(1, 1000, 60)[:, None]
    estimator = Estimator(["unit"] * 60, x, np.sqrt(x[:, 0]))
    assert estimator.errors.ours < 0.5 * estimator.errors.linear


# --------------------------------------------------------------------------------------------------
# Accuracy and downtime


def scores(longest=3, units=12):
    alone = [0.0, 0.05, 0.02, 0.01, 0.08, 0.02, 0.01, 0.01, 0.03, 0.01, 0.01]

    def without(first, last):
        return 0.9 - sum(alone[first:last]) * (1 + 0.1 * (last - first - 1))

    skips = [
        SkipScore((f, g), without(f, g), 100 * (units - (g - f)))
        for f in range(1, units - 1)
        for g in range(f + 1, min(units, f + longest + 1))
    ]
    exits = [ExitScore(b, 0.3 + 0.05 * b, 100 * b) for b in range(1, units)]
    return PathScores(0.9, 100 * units, tuple(exits), tuple(skips), 1000), without


def test_accuracy_that_was_measured_is_told_as_it_was_and_the_rest_is_estimated():
    found, without = scores()
    estimator = AccuracyEstimator(found)
    assert estimator.skip(2, 4) == (without(2, 4), True)
    value, measured = estimator.skip(2, 7)
    assert not measured
    assert value == pytest.approx(without(2, 7), abs=0.03)
    assert estimator.skip_errors.ours < 0.5 < estimator.skip_errors.macs
    some = dataclasses.replace(found, exits=tuple(e for e in found.exits if e.after != 5))
    assert AccuracyEstimator(some).exit(5) == (pytest.approx(0.55), False)
    assert estimator.exit(5) == (0.3 + 0.05 * 5, True)
    assert estimator.exit_errors.ours == pytest.approx(0.0, abs=1e-9)


def test_with_few_skips_the_cost_is_the_sum_and_no_error_is_claimed():
    found, without = scores(longest=1)
    estimator = AccuracyEstimator(found)
    assert estimator.skip(2, 4)[0] == pytest.approx(without(2, 3) + without(3, 4) - 0.9)
    assert estimator.skip_errors.samples == 0
    assert math.isnan(estimator.skip_errors.ours)


def test_downtime_is_the_sum_of_its_parts_and_building_grows_with_what_is_sent():
    assert DowntimeParts(0.04, 0.001, 0.0, 0.002).seconds == pytest.approx(0.043)
    built = [
        BuildSample(units, 10**6 * size, 0.05 + 0.01 * units + 0.02 * size)
        for units in (3, 6, 9, 12) for size in (0, 1, 5)
    ]  # fmt: skip
    times = BuildTimes(built)
    assert times.seconds(7, 3 * 10**6) == pytest.approx(0.05 + 0.07 + 0.06, rel=0.02)
    assert times.errors.ours < 0.05 < times.errors.macs


def test_a_chain_may_skip_more_units_than_were_measured_at_once_and_says_that_it_is_a_guess():
    """Hosts with more units than `resilience.longest` could not be skipped at all."""
    ours = resilient(chain(width=4), SHAPE, 5, seed=1)
    run = (7, 11)
    alone = tuple(SkipScore((u, u + 1), 0.8 - 0.01 * u, 1) for u in range(1, 16))
    found = _ways(Resilience(ours, PathScores(0.9, 17, (), alone, 100)))
    assert found.skips[run] == 0
    assert found.skips[5, 8] == 1  # block 6 needs its adapter
    assert "skip:7-8" in found.measured
    assert "skip:7-11" not in found.measured
    assert 0.0 <= found.accuracy["skip:7-11"] < found.accuracy["skip:7-8"]


def test_units_are_measured_here_only_for_machines_that_are_not_described(portfolio_folder):
    """They were measured in the first second in any case, and that was thrown away where all
    machines are described."""
    portfolio = Portfolio.load(portfolio_folder)
    layers = layered(portfolio.module(PARENT), portfolio.about.input_shape)
    config = parse(compose_text("hosts=device_edge_cloud"))
    described = OtherWays(config, layers, portfolio, PARENT)
    hosts = described.problem(WHOLE).hosts
    assert "units" not in described.ways.errors
    slow, fast = (hosts[i].costs.seconds(1)[0] for i in (0, 1))
    assert slow > fast
    listed = tuple(dataclasses.replace(one, machine="") for one in config.hosts.list)
    unknown = dataclasses.replace(config, hosts=dataclasses.replace(config.hosts, list=listed))
    measured = OtherWays(unknown, layers, portfolio, PARENT)
    assert measured.problem(WHOLE).hosts[0].costs.seconds(1)[0] > 0
    assert measured.ways.errors["units"]["samples"] >= 0
