"""Runs that promise something to each example: budget, resuming, and what is refused."""

import json

import pytest
import torch
from torch import nn

from fedsys import runtime
from fedsys.config import compose_text, parse, with_values
from fedsys.errors import ConfigError, ModelError
from fedsys.privacy.check import check_record_model, check_record_run
from fedsys.runs.folder import RunFolder
from strategies.around import find
from strategies.budgeted import JOURNAL, figures
from strategies.private import PrivateRecords, unprotected

SMALL = {
    "num_clients": 2,
    "rounds": 3,
    "client": {"epochs": 1, "batch_size": 10},
    "data": {"examples": 60, "test_examples": 10, "shape": [1, 8, 8]},
    "privacy": {"mechanism": "record", "accountant": "rdp", "epsilon": 8.0},
}


def merged(a, b):
    both = dict(a)
    for key, value in b.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if nested else value
    return both


def told(done):
    return figures(find(done.strategy, PrivateRecords))


@pytest.fixture
def private(configure):
    """Return a function from further values to the configuration of a private run."""
    base = configure("data=synthetic", "model=cnn", "privacy=record", "model.width=4")
    return lambda **more: parse(with_values(base.text, **merged(SMALL, more)))


def test_a_run_tells_what_it_spent_each_round_and_what_that_means(private, carry_out):
    done = carry_out(private())
    spent = [row["epsilon"] for row in done.rows]
    assert spent == sorted(spent) and 0 < spent[0] < spent[-1] <= 8.0
    found = told(done)
    assert found["epsilon"] == pytest.approx(spent[-1]) and found["delta"] == 1e-5
    assert found["epsilon"] > 0.95 * 8.0
    claim = found["privacy"]
    assert (claim["unit"], claim["accountant"], claim["secure"]) == ("example", "rdp", False)
    assert "Poisson samples at rate" in claim["claim"]
    assert all("train_loss" not in row for row in done.rows)  # that would be a release


def test_a_run_ends_before_the_round_that_would_exceed_the_budget(private, carry_out):
    privacy = {"noise_multiplier": 1.5, "epsilon": 100.0}
    whole = carry_out(private(privacy=privacy))
    one, two, three = (row["epsilon"] for row in whole.rows)
    stopped = carry_out(private(privacy={**privacy, "epsilon": (two + three) / 2}))
    assert [row["round"] for row in stopped.rows] == [1, 2]
    assert told(stopped)["epsilon"] == pytest.approx(two) and one < two


def test_a_budget_that_does_not_last_for_a_round_is_refused(private, carry_out):
    with pytest.raises(ConfigError, match=r"privacy.epsilon=0.1: is spent before the first round"):
        carry_out(private(privacy={"noise_multiplier": 0.8, "epsilon": 0.1}))


def test_a_delta_above_one_over_the_examples_is_refused(private, carry_out):
    with pytest.raises(ConfigError, match=r"privacy.delta=0.05: must be below 1/54"):
        carry_out(private(privacy={"delta": 0.05}))


def test_draws_of_the_system_differ_from_run_to_run_and_spend_the_same(private, carry_out):
    runs = [carry_out(private(privacy={"secure": True}, rounds=1)) for _ in range(2)]
    assert runs[0].sha256 != runs[1].sha256
    assert told(runs[0])["epsilon"] == told(runs[1])["epsilon"]
    assert "seed" not in told(runs[0])["privacy"]["claim"]


@pytest.mark.parametrize(
    ("mechanism", "split", "warned"),
    [("record", True, True), ("record", False, False), ("cut", True, False), ("none", True, False)],
)
def test_who_sees_activations_that_nothing_protects_is_told_of(configure, mechanism, split, warned):
    found = unprotected(configure(f"privacy={mechanism}"), split=split)
    assert bool(found) is warned and ("docs/trust.md" in found) is warned


def test_a_split_run_with_a_promise_to_examples_warns_at_its_start(private, tmp_path, capsys):
    policy = {"kind": "fixed", "cut": 1, "codec": "fp32", "micro_batches": None}
    run = {"dir": str(tmp_path / "run"), "plots": False}
    runtime.run(private(policy=policy, rounds=1, run=run))
    assert "images can be read from them at any epsilon" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client.clip_norm=1"], "client.clip_norm=1.0: with privacy=record, clips mini-batches"),
        (["client.frozen=true"], "trains nothing"),
        (["pruning=snip"], "scores weights on examples"),
        (["strategy.fraction_evaluate=0.5"], "tell their scores on their examples"),
        (["privacy.secure=true", "fleet.replicate_every=2", "policy=fixed"], "released twice"),
    ],
)
def test_what_would_release_more_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_record_run(parse(compose_text(" ".join(["privacy=record", *overrides]))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.one = nn.Linear(16, 16)
        self.two = nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(self.flatten(x)))


class Twice(Tied):
    def __init__(self):
        super().__init__()
        self.two = self.one


class Loose(nn.Module):
    """A parameter that belongs to no module that is called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x.flatten(1)[:, :4], self.inner.weight)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.inner(x - x.mean(0))


def frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model[1].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), ConfigError, "model.norm=group"),
        (Tied(), ConfigError, "is shared by several modules"),
        (Twice(), (ConfigError, ModelError), "shared by several modules|called twice"),
        (frozen(), ConfigError, "model=1.bias: is frozen"),
        (Loose(), ModelError, "inner.weight: its module is never called"),
        (Mixing(), ModelError, "depends on the others of its batch"),
    ],
    ids=["batch-norm", "tied", "twice", "frozen", "loose", "mixing"],
)
def test_a_model_whose_examples_have_no_gradients_of_their_own_is_refused(model, error, words):
    with pytest.raises(error, match=words):
        check_record_model(model, (1, 4, 4))


def test_a_model_is_left_as_it_was_by_the_check():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    check_record_model(model, (1, 4, 4))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


# --------------------------------------------------------------------------------------------------
# Continuing


@pytest.mark.parametrize("secure", [False, True])
def test_what_is_done_again_after_a_crash_is_charged_again_only_with_new_noise(
    private, tmp_path, secure
):
    """The server is killed when round 2 was asked for; its journal holds what was charged."""
    folder = tmp_path / "run"
    privacy = {"secure": secure, "noise_multiplier": 2.0, "epsilon": 50.0}
    config = private(privacy=privacy, rounds=2, run={"dir": str(folder), "plots": False})
    runtime.run(config)
    first = RunFolder.open(folder).info["result"]
    journal = json.loads((folder / JOURNAL).read_text())
    assert journal["rounds"] == {"0": [1, 2], "1": [1, 2]} and journal["extra"] == {}
    # as if it had been killed behind the checkpoint of round 1
    for file in (folder / "checkpoints").glob("round-000002*"):
        file.unlink()
    runtime.run(parse(with_values(config.text, resume=str(folder))))
    again = RunFolder.open(folder).info["result"]
    assert (again["model_sha256"] == first["model_sha256"]) is not secure
    assert (again["epsilon"] > first["epsilon"]) is secure
    assert again["rounds"] == 2
