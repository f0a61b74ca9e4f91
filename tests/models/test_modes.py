"""Parts of a model that stay in evaluation, or are set in other ways, stay so in its halves.

A model whose ``train()`` kept a BatchNorm in evaluation (the usual way to fine-tune) was trained
split as if it had no such method: its running mean was 0.0000 in plain training and 0.2382 split.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.errors import ModelError
from fedsys.models.graph import trace, trace_evaluation
from fedsys.models.layers import layered, stages
from fedsys.models.modes import Modes, observed
from fedsys.randomness import Address, drawing, key_modules, seeded_default_generator
from tests.models.partly import KINDS, Partly

HERE = Address(3, 1, 1)
SHAPE = (2, 6, 6)


def made(frozen: str) -> Partly:
    with seeded_default_generator(1):
        model = Partly(input_shape=SHAPE, num_classes=3, frozen=frozen)
        return key_modules(model)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, *SHAPE, generator=Address(2).torch("images"))


def trained(model: nn.Module, parts: list[nn.Module]) -> dict[str, Tensor]:
    """Do two steps, an evaluation and a third step, as rounds do; return the state."""
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(3):
        for part in parts:
            part.train()
        with drawing(HERE, step, 5):
            out = images()
            for part in parts:
                out = part(out)
            F.cross_entropy(out, torch.tensor([0, 1, 2, 1, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            for part in parts:
                part.eval()
            with torch.no_grad():
                out = images()
                for part in parts:
                    out = part(out)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("frozen", KINDS)
def test_halves_and_graphs_train_as_the_model_does_whatever_it_freezes(frozen: str) -> None:
    whole = made(frozen)
    expected = trained(whole, [whole])
    for cut in (0, 1, 2):
        model = made(frozen)
        got = trained(model, list(stages(layered(model, SHAPE), [cut])))
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    for graph_of in (trace, lambda m: copy.deepcopy(trace(m)), lambda m: trace(trace(m))):
        model = made(frozen)
        graph = graph_of(model)
        got = trained(graph, [graph])
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    moves = torch.count_nonzero(expected["norm.running_mean"])
    assert bool(moves) == (frozen not in ("root", "class", "forward"))


@pytest.mark.parametrize("frozen", KINDS)
def test_a_chain_listed_by_hand_follows_the_modes_too(frozen: str) -> None:
    """The list names modules, so neither the root's train() nor its forward is in the chain."""

    class Listed(Partly):
        def forward(self, x: Tensor) -> Tensor:
            if self.frozen == "forward":
                self.norm.eval()
            return self.fc(self.drop(self.flat(self.pool(self.conv(self.norm(self.stem(x)))))))

    def model() -> nn.Module:
        with seeded_default_generator(1):
            listed = Listed(input_shape=SHAPE, num_classes=3, frozen=frozen)
        listed.late, listed.pool, listed.flat = None, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return key_modules(listed)

    if frozen in ("root", "parameters", "momentum"):
        Listed.train = lambda self, mode=True: (  # `late` is not there
            nn.Module.train(self, mode),
            self.norm.train(mode and frozen != "root"),
            self,
        )[2]
    whole = model()
    expected = trained(whole, [whole])
    split = model()
    units = ["stem", "norm", ["conv", "pool", "flat", "drop"], "fc"]
    got = trained(split, list(stages(layered(split, images(), units=units), [2])))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_model_without_such_parts_has_no_modes_of_its_own() -> None:
    assert not trace(made("none")).modes
    assert not observed(made("none"), images())
    assert trace(made("root")).modes == Modes(
        {"norm": {"training": False}, "late": {"training": False}}, {}
    )


def test_observing_leaves_the_model_as_it_was() -> None:
    model = made("forward")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = observed(model, images())
    assert seen.training["norm"] == {"training": False}
    assert model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------
# What cannot be followed is refused by name


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.calls = self.trained = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


class AfterManySteps(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 500:
            self.norm.eval()
        return super().forward(x)


class EverySecondStep(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.train(self.training and self.calls % 2 == 0)
        self.calls += 1
        return super().forward(x)


class AfterTheFirstStep(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.norm.eval()
        return out


class AfterSomeRounds(Base):
    def train(self, mode: bool = True) -> Base:
        super().train(mode)
        self.trained += mode
        self.norm.train(mode and self.trained < 50)
        return self


class Annealed(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1.0 / self.calls)


class ByData(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.train(bool(x.mean() > 0))
        return super().forward(x)


class TwoModesInOnePass(Base):
    def forward(self, x: Tensor) -> Tensor:
        once = self.norm.eval()(self.conv(x))
        again = self.norm.train()(self.conv(x))
        return self.fc((once + again).mean((2, 3)))


class Replaced(Base):
    def train(self, mode: bool = True) -> Base:
        super().train(mode)
        if not mode:
            self.norm = nn.BatchNorm2d(4).eval()
        return self


class CountedInABuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (AfterManySteps, "norm: what it does depends on how often .*calls"),
        (EverySecondStep, "norm: what it does depends on how often .*calls"),
        (AfterTheFirstStep, "norm: what it does depends on how often .*norm.training"),
        (AfterSomeRounds, "norm: what it does depends on how often .*trained"),
        (Annealed, "Annealed: what it does depends on how often .*calls"),
        (ByData, "ByData cannot be traced .*mean"),
        (TwoModesInOnePass, "norm is called several times .* something else each time"),
        (Replaced, "norm is another module in training than in evaluation"),
        (CountedInABuffer, "steps: forward of CountedInABuffer changes it"),
    ],
)
def test_modes_that_depend_on_what_came_before_are_refused_by_name(model, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        trace(model())


def test_a_counter_that_decides_nothing_is_no_reason_to_refuse() -> None:
    class Counting(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    assert not trace(Counting()).modes


def test_a_norm_that_trains_in_evaluation_is_followed_but_not_pruned() -> None:
    """Its answers depend on the other examples of the batch: no dense model can give them."""

    class Adapting(Base):
        def train(self, mode: bool = True) -> Base:
            super().train(mode)
            self.norm.train()
            return self

    model = Adapting().eval()
    x = images()
    graph = trace(model).eval()
    assert graph.norm.training and torch.equal(graph(x), Adapting.forward(model, x))
    with pytest.raises(ModelError, match=r"norm \(BatchNorm2d\) stays in training"):
        trace_evaluation(copy.deepcopy(model))
