import dataclasses
import json

import pytest

from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.planning.leakage import (
    LeakageLimit,
    allowed_cuts,
    leakage_limit,
    leakage_note,
    without_limit,
)
from fedsys.training.federation import federation, layered_model

ROWS = [
    ("none", None, 1, "conv1", 0.95),
    ("none", None, 2, "conv2", 0.60),
    ("cut", 8.0, 1, "conv1", 0.40),
    ("cut", 8.0, 2, "conv2", 0.30),
    ("cut", 100.0, 1, "conv1", 0.80),
]


@pytest.fixture
def audit(tmp_path):
    """A file as the audit leaves it, of the default model."""
    names = ("mechanism", "epsilon", "cut", "after", "ssim")
    rows = [dict(zip(names, row, strict=True)) for row in ROWS]
    path = tmp_path / "leakage.json"
    shapes = {"conv1": [16, 8, 8], "conv2": [512], "fc1": [64], "fc2": [10]}
    units = list(shapes.items())
    path.write_text(json.dumps({"version": 1, "units": units, "cuts": rows}))
    return path


def of(configure, *overrides):
    config = configure(*overrides)
    dataset = federation(config).dataset
    return config, layered_model(config, dataset.input_shape, dataset.num_classes)


def test_cuts_above_the_limit_and_cuts_that_were_not_measured_may_not_be_chosen():
    limit = LeakageLimit(0.6, {1: 0.7, 2: 0.6})
    assert [limit.allows(cut) for cut in (1, 2, 3)] == [False, True, False]
    assert limit.reason([2]) == ""
    assert limit.reason([1, 2, 3]) == (
        "not at cut 1 (SSIM 0.70) or 3 (not measured): policy.max_leakage=0.6"
    )


def test_without_the_options_nothing_is_limited(configure):
    config, layers = of(configure, "policy=auto", "fleet=pi_lab")
    assert leakage_limit(config, layers) is None
    assert allowed_cuts(config, layers, (1, 2)) == (1, 2)
    assert leakage_note(config, layers) == ""
    assert "max_leakage" not in without_limit(config.policy)


def test_with_noise_at_the_cut_the_figures_of_no_stronger_noise_count(configure, audit):
    limit = ["policy=auto", "policy.max_leakage=0.7", f"policy.leakage={audit}"]
    config, layers = of(configure, *limit, "model.norm=group")
    assert leakage_limit(config, layers).measured == {1: 0.95, 2: 0.6}

    def measured(mechanism, epsilon):
        privacy = dataclasses.replace(config.privacy, mechanism=mechanism, epsilon=epsilon)
        return leakage_limit(dataclasses.replace(config, privacy=privacy), layers).measured

    assert measured("cut", 8.0) == {1: 0.4, 2: 0.3}
    assert measured("cut", 2.0) == {1: 0.4, 2: 0.3}
    assert measured("cut", 9.0) == {1: 0.8}  # cut 2 was not measured with so little
    assert measured("cut", 101.0) == {1: 0.95, 2: 0.6}
    assert measured("record", 1.0) == {1: 0.95, 2: 0.6}  # it does not touch activations


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["policy.max_leakage=0.5"], "policy.leakage=None: must be the file of an audit"),
        (["policy.leakage={audit}"], "policy.max_leakage=None: must be an SSIM"),
        (["policy.leakage={audit}", "policy.max_leakage=2"], "policy.max_leakage=2"),
        (["policy.leakage={audit}x", "policy.max_leakage=0.5"], "cannot be read: No such file"),
        (
            ["policy.leakage={audit}", "policy.max_leakage=0.5", "model=vgg5"],
            "must be of this model",
        ),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(overrides, told, configure, audit):
    given = [o.format(audit=audit) for o in overrides]
    with pytest.raises(ConfigError) as refused:
        leakage_limit(*of(configure, "policy=auto", *given))
    assert told in str(refused.value)


def test_a_file_of_something_else_is_refused(configure, tmp_path):
    path = tmp_path / "leakage.json"
    path.write_text('{"cuts": [{"ssim": 1}]}')
    given = ["policy=auto", "policy.max_leakage=0.5", f"policy.leakage={path}"]
    with pytest.raises(ConfigError, match=r"must be the leakage\.json of an audit"):
        leakage_limit(*of(configure, *given))


def test_a_plan_takes_the_best_cut_that_leaks_little_and_says_so(audit, capsys):
    call = ["plan", "policy=auto", "fleet=pi_lab", "network=wifi", "policy.offload=forced"]
    limit = ["policy.max_leakage=0.7", f"policy.leakage={audit.parent}"]

    def planned(*more):
        assert main([*call, *more, "json=true"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    free, limited = planned(), planned(*limit)
    assert {device["cut"] for device in limited["devices"]} == {2}
    assert limited["predicted_s"] >= free["predicted_s"]
    assert "not at cut 1 (SSIM 0.95)" in limited["why"] and "cut 1" not in free["why"]


@pytest.mark.parametrize("kind", ["auto", "exhaustive", "pipar", "splitfed", "bandit"])
def test_every_policy_keeps_to_the_limit_and_says_so_in_its_decisions(kind, audit, tmp_path):
    folder = tmp_path / "run"
    call = ["train", f"policy={kind}", "fleet=pi_lab", "num_clients=2", "rounds=2"]
    limit = ["policy.max_leakage=0.7", f"policy.leakage={audit}"]
    small = ["data.max_examples=60", "client.epochs=1", "run.plots=false", "run.oracle=false"]
    assert main([*call, *limit, *small, f"run.dir={folder}"]) == 0
    lines = (folder / "decisions.csv").read_text().splitlines()
    names = lines[0].split(",")
    for line in lines[1:]:
        assert line.split(",")[names.index("cut")] != "1"
        assert "not at cut 1 (SSIM 0.95): policy.max_leakage=0.7" in line


def test_a_fixed_cut_that_leaks_is_refused(audit, tmp_path, capsys):
    call = ["train", "policy=fixed", "policy.cut=1", "num_clients=2", "rounds=1"]
    limit = ["policy.max_leakage=0.7", f"policy.leakage={audit}", "run.plots=false"]
    assert main([*call, *limit, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "chose a cut that leaks: not at cut 1 (SSIM 0.95)" in capsys.readouterr().err
