import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsys.config import ClientConfig, LearningRate
from fedsys.errors import ConfigError, ModelError
from fedsys.randomness import Address
from fedsys.training.optimizers import (
    learning_rate,
    make_optimizer,
    pack_optimizer,
    step,
    unpack_optimizer,
)

ALL = sorted(
    name.lower()
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
)
DENSE = [name for name in ALL if name not in ("optimizer", "lbfgs", "sparseadam")]


def network():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    generator = Address(3).torch("weights")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def steps(model, optimizer, first, last, do=step):
    for number in range(first, last):
        x = torch.randn(5, 4, generator=Address(4).torch("x", number))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
        do(optimizer)


def named(model):
    return dict(model.named_parameters())


def client(**values):
    return dataclasses.replace(ClientConfig(), **values)


# --------------------------------------------------------------------------------------------------
# Made by name


@pytest.mark.parametrize("name", DENSE)
def test_every_optimizer_steps_as_its_own_step_does(name):
    results = []
    for do in (step, lambda optimizer: optimizer.step()):
        model = network()
        steps(model, make_optimizer(model.parameters(), client(optimizer=name), 0.01), 0, 4, do)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], network()[0].weight)


def test_settings_reach_the_optimizers_that_have_them():
    values = client(momentum=0.5, weight_decay=0.25, optimizer_args={"nesterov": True})
    sgd = make_optimizer(network().parameters(), values, 0.125)
    assert sgd.defaults["lr"] == 0.125 and sgd.defaults["momentum"] == 0.5
    assert sgd.defaults["weight_decay"] == 0.25 and sgd.defaults["nesterov"] is True
    adam = make_optimizer(network().parameters(), client(optimizer="Adam", weight_decay=0.25), 0.1)
    assert type(adam) is torch.optim.Adam and adam.defaults["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"optimizer": "sdg"}, r"client\.optimizer=sdg: must name .*did you mean 'sgd'\? known"),
        ({"optimizer": "lbfgs"}, r"client\.optimizer=lbfgs: must name .*works on single param"),
        ({"optimizer_args": {"betas": 1}}, r"client\.optimizer_args=\{'betas': 1\}: .*betas"),
        (
            {"optimizer": "adam", "optimizer_args": {"betas": [2.0, 0.9]}},
            r"client\.optimizer_args=.*: Invalid beta parameter",
        ),
    ],
)
def test_what_no_optimizer_takes_is_refused_by_name(values, rule):
    with pytest.raises(ConfigError, match=rule):
        make_optimizer(network().parameters(), client(**values), 0.1)


# --------------------------------------------------------------------------------------------------
# State that moves


@pytest.mark.parametrize("name", DENSE)
def test_a_packed_state_goes_on_as_if_nothing_had_been(name):
    values = client(optimizer=name)
    whole = network()
    optimizer = make_optimizer(whole.parameters(), values, 0.01)
    steps(whole, optimizer, 0, 6)
    first = network()
    optimizer = make_optimizer(first.parameters(), values, 0.01)
    steps(first, optimizer, 0, 3)
    packed = pack_optimizer(optimizer, named(first))
    steps(first, optimizer, 3, 4)  # what was packed is a copy
    second = network()
    steps(second, make_optimizer(second.parameters(), values, 0.01), 0, 3)
    optimizer = make_optimizer(second.parameters(), values, 0.01)
    unpack_optimizer(optimizer, named(second), packed)
    steps(second, optimizer, 3, 6)
    assert all(map(torch.equal, whole.parameters(), second.parameters()))
    assert {key.partition("|")[0] for key in packed} <= named(whole).keys()


def test_a_state_is_named_by_parameter_and_key():
    model = network()
    optimizer = make_optimizer(model.parameters(), client(optimizer="adam"), 0.01)
    steps(model, optimizer, 0, 1)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert sorted(pack_optimizer(optimizer, named(model))) == sorted(
        f"{n}.weight|{k}" for n in "01" for k in keys
    )
    fresh = make_optimizer(model.parameters(), client(), 0.01)
    assert pack_optimizer(fresh, named(model)) == {}


def test_a_state_for_an_unknown_parameter_is_refused():
    model = network()
    optimizer = make_optimizer(model.parameters(), client(), 0.01)
    with pytest.raises(ModelError, match=r"optimizer state head\|m: there is no parameter head"):
        unpack_optimizer(optimizer, named(model), {"head|m": torch.ones(1)})


def test_an_optimizer_is_made_and_stepped_without_torchs_compiler():
    code = (
        "import sys, torch\n"
        "from fedsys.config import ClientConfig\n"
        "from fedsys.training.optimizers import make_optimizer, step\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "o = make_optimizer([p], ClientConfig(), 0.1)\n"
        "o.zero_grad(); p.sum().backward(); step(o)\n"
        "assert p.tolist() == torch.full((2,), 0.9).tolist()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --------------------------------------------------------------------------------------------------
# Learning rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRate(), [1, 1, 1, 1, 1]),
        (LearningRate("step", milestones=(1, 3), gamma=0.1), [1, 0.1, 0.1, 0.01, 0.01]),
        (LearningRate("exponential", gamma=0.5), [1, 0.5, 0.25, 0.125, 0.0625]),
        (
            LearningRate("cosine", final=0.2),
            [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * r / 4)) for r in range(5)],
        ),
        (LearningRate(warmup=2), [1 / 3, 2 / 3, 1, 1, 1]),
        (LearningRate("cosine", warmup=2), [1 / 3, 2 / 3, 1, 0.5, 0]),
        (LearningRate("step", milestones=(3,), gamma=0.5, warmup=1), [0.5, 1, 1, 0.5, 0.5]),
    ],
)
def test_the_rate_of_each_round_has_its_closed_form(schedule, expected):
    rates = [learning_rate(2.0, schedule, r, 5) for r in range(1, 6)]
    assert rates == pytest.approx([2.0 * e for e in expected], abs=1e-15)


def test_a_run_of_one_round_has_the_rate_it_asked_for():
    for kind in ("constant", "step", "exponential", "cosine"):
        assert learning_rate(0.3, LearningRate(kind), 1, 1) == 0.3
