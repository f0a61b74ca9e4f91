"""Costs of channels, and scores that are weighed against them."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsys.config import pruning as settings
from fedsys.config.pruning import COSTS, METHODS, PruningConfig
from fedsys.errors import ConfigError, ModelError
from fedsys.models import build
from fedsys.models.graph import trace
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.scores import coupled_layers, group_norm, magnitude_channel, per_cost
from fedsys.pruning.sparsify import gradual, one_shot, prune
from fedsys.pruning.structure import channel_costs, normed_blocks, structure
from fedsys.training.masks import Masks, last_layer
from fedsys.training.penalty import channel_scales

SHAPE = (3, 8, 8)


class Parts(nn.Module):
    """A sum, a depthwise layer, a concatenation, maps that are flattened, and grouped filters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(4)
        self.side = nn.Conv2d(4, 2, 1)
        self.pool = nn.MaxPool2d(2)
        self.reader = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 16, 1, groups=2)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.norm(self.depthwise(x + self.branch(x))))
        x = self.pool(torch.cat([x, self.side(x)], 1))
        out: Tensor = self.head(torch.flatten(self.grouped(self.reader(x)), 1))
        return out


def network(name: str = "vgg.vgg5", seed: int = 1, **arguments: object) -> nn.Module:
    spec = {"_target_": f"fedsys.models.{name}", "norm": "batch", "init": None, **arguments}
    model = build(spec, input_shape=(3, 32, 32), num_classes=10, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.weight.shape, generator=draw)
    return model


# --------------------------------------------------------------------------------------------------
# Costs


def test_costs_of_channels_are_those_of_their_group_and_its_readers() -> None:
    costs = channel_costs(Parts(), SHAPE, "macs")
    # stem, branch and depthwise have channels together; branch, side and reader read them
    stem, branch, depthwise, side = 108 * 64, 16 * 64, 36 * 64, 8 * 64
    reader, grouped, head = 48 * 16, 64 * 16, 5 * 256
    together = stem + 2 * branch + depthwise + side + reader * 4 / 6
    assert costs["stem"] == costs["branch"] == costs["depthwise"] == pytest.approx(together / 4)
    assert costs["side"] == pytest.approx((side + reader * 2 / 6) / 2)
    # a grouped layer goes with what it reads: two of its channels with one of them
    assert costs["reader"] == pytest.approx((reader + grouped + head) / 8)
    assert costs["grouped"] == pytest.approx((reader + grouped + head) / 16)
    assert costs["head"] == head / 5
    params = channel_costs(Parts(), SHAPE, "params")
    assert params["stem"] == pytest.approx((108 + 2 * 16 + 36 + 8 + 48 * 4 / 6) / 4)


def test_elements_are_those_of_all_maps_that_a_channel_writes() -> None:
    costs = channel_costs(Parts(), SHAPE, "elements")
    # of 64: stem, branch, their sum, depthwise, ReLU, and what is joined; pooled there are 16
    assert costs["stem"] == costs["branch"] == costs["depthwise"] == 6 * 64 + 16
    assert costs["side"] == 2 * 64 + 16  # itself, joined, and pooled
    # a grouped layer writes two maps for each that it reads
    assert costs["reader"] == (8 * 16 + 16 * 16) / 8 and costs["grouped"] == costs["reader"] / 2
    assert costs["head"] == 1


def test_depthwise_channels_of_large_maps_go_first_by_elements() -> None:
    """MACs see nine weights in a depthwise channel: at equal parameters 1,835 of them stayed in a
    MobileNetV2 where Torch-Pruning keeps 374, and batches took 1.6 times as long."""
    model, kept = network("mobilenet.mobilenet_v2"), {}
    for cost in ("none", "elements"):
        masks = masks_of(model, 0.6, cost=cost, start=Masks.dense(model, last_layer(model)))
        plan = shrink(model, (3, 32, 32), masks=masks, verify=False).plan
        maps = {op.name: math.prod(op.shape[2:]) for op in plan.reading.ops.values()}
        deep = [e for e in plan.edits if "depthwise" in e.name]
        kept[cost] = sum(e.after * maps[e.name] for e in deep)
    assert 2 * kept["elements"] < kept["none"]


@pytest.mark.parametrize("cost", ["macs", "params", "elements"])
@pytest.mark.parametrize("name", ["vgg.vgg5", "resnet.resnet18"])
def test_costs_do_not_depend_on_weights_and_add_up(name: str, cost: str) -> None:
    model = network(name)
    costs = channel_costs(model, (3, 32, 32), cost)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(costs) == set(layers)
    groups = coupled_layers(model, (3, 32, 32))
    for group in groups:
        assert len({costs[layer] for layer in group}) == 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.get_parameter("conv1.conv.weight" if "vgg" in name else "stem.conv.weight").zero_()
    assert channel_costs(model, (3, 32, 32), cost) == costs
    assert model.training
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
        if not name.endswith("conv.weight")
    )


def test_the_share_of_a_channel_in_a_plain_chain_is_what_removing_it_saves() -> None:
    model = network()
    costs = channel_costs(model, (3, 32, 32), "macs")
    masks = {n: torch.ones_like(m, dtype=torch.bool) for n, m in Masks.dense(model).items()}
    masks["conv2.conv.weight"][3] = False
    report = shrink(model, (3, 32, 32), masks=masks).report
    assert report.macs_before - report.macs == costs["conv2.conv"]


class Normed(nn.Sequential):
    """Two convolutions, each before a GroupNorm of its own size of groups."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
        )  # fmt: skip


@pytest.mark.parametrize("method", ["group_norm", "magnitude_channel"])
def test_channels_that_are_normalised_together_go_together(method: str) -> None:
    """Channels went one by one, wherever they were small. One of zeros still counts in the mean and
    the variance of its group, so nothing could be removed: the portfolio of a private model, which
    has GroupNorm, held variants that were as large as their parent."""
    torch.manual_seed(0)
    model = Normed().eval()
    assert normed_blocks(model, SHAPE) == {"0": 4, "3": 8}
    pruning = PruningConfig(method=method)
    known = structure(pruning, model, SHAPE)
    masks = one_shot(method, model, 0.5, leave=("8",), mix=1.0, **known)
    for name, size in (("0.weight", 4), ("3.weight", 8)):
        alive = masks[name].flatten(1).any(1).reshape(-1, size)
        assert (alive.all(1) | ~alive.any(1)).sum() >= len(alive) - 1  # the last may go in part
    report = shrink(model, SHAPE, masks=masks).report
    assert report.parameters < 0.7 * report.parameters_before


def test_costs_that_cannot_be_found_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pruning\.cost=mac: .*did you mean 'macs'"):
        channel_costs(network(), (3, 32, 32), "mac")
    with pytest.raises(ModelError, match="fails at"):
        channel_costs(network(), (1, 32, 32), "macs")


# --------------------------------------------------------------------------------------------------
# Scores weighed against costs


norms = st.lists(st.integers(1, 1000).map(float), min_size=2, max_size=12)


def as_scores(**layers: list[float]) -> dict[str, Tensor]:
    """Return scores of whole channels with three weights each."""
    return {f"{n}.weight": torch.tensor(v).unsqueeze(1).expand(-1, 3) for n, v in layers.items()}


@given(norms, norms, st.floats(0.01, 1e6), st.floats(0.01, 1e6), st.floats(0.0, 2.0))
def test_costs_change_the_order_among_layers_and_not_within_one(
    one: list[float], other: list[float], first: float, second: float, weight: float
) -> None:
    weighed = per_cost(as_scores(a=one, b=other), {"a": first, "b": second}, weight)
    for values, got in ((one, weighed["a.weight"]), (other, weighed["b.weight"])):
        assert got.shape == (len(values), 3) and bool((got == got[:, :1]).all())
        pairs = zip(values, got[:, 0].tolist(), strict=True)
        ascending = [share for _, share in sorted(pairs, key=lambda pair: pair[0])]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(ascending))


@given(norms, norms, st.floats(0.01, 1e6), st.floats(0.0, 2.0), st.integers(-9, 9))
def test_only_ratios_of_costs_and_of_the_scores_of_a_layer_count(
    one: list[float], other: list[float], cost: float, weight: float, power: int
) -> None:
    plain = per_cost(as_scores(a=one, b=other), {"a": cost, "b": 1.0}, weight)
    larger = [2.0**power * value for value in one]
    costs = {"a": 7.0 * cost, "b": 7.0}
    scaled = per_cost(as_scores(a=larger, b=other), costs, weight)
    for name, expected in plain.items():
        torch.testing.assert_close(scaled[name], expected, rtol=1e-9, atol=0.0)


def test_of_equal_channels_the_dear_ones_go_first_and_the_last_of_a_layer_is_dearest() -> None:
    scores = as_scores(a=[1.0] * 4, b=[1.0] * 4)
    weighed = per_cost(scores, {"a": 16.0, "b": 1.0}, 0.5)
    assert float(weighed["b.weight"][0, 0] / weighed["a.weight"][0, 0]) == pytest.approx(4.0)
    # equal channels of a layer have equal shares; of unequal ones each has what is left behind it
    shares = per_cost(as_scores(a=[3.0, 1.0, 2.0]), {"a": 5.0}, 1.0)["a.weight"][:, 0]
    torch.testing.assert_close(shares, torch.tensor([1.0, 1 / 14, 4 / 13], dtype=torch.float64))


def test_a_weight_of_zero_ignores_costs_and_layers_without_a_cost_are_of_the_mean() -> None:
    scores = as_scores(a=[1.0, 2.0], b=[3.0, 1.0], c=[1.0, 1.0])
    free = per_cost(scores, {}, 1.0)
    ignored = per_cost(scores, {"a": 9.0, "b": 1.0, "c": 4.0}, 0.0)
    assert all(torch.equal(free[name], ignored[name]) for name in scores)
    some = per_cost(scores, {"a": 9.0, "b": 1.0}, 1.0)  # the geometric mean is 3
    assert torch.equal(some["c.weight"], free["c.weight"])
    torch.testing.assert_close(some["a.weight"], free["a.weight"] / 3)
    torch.testing.assert_close(some["b.weight"], free["b.weight"] * 3)


def test_dead_channels_and_dead_layers_have_no_worth_and_do_not_change_that_of_others() -> None:
    alive = per_cost(as_scores(a=[1.0, 2.0]), {"a": 1.0}, 1.0)["a.weight"]
    both = per_cost(as_scores(a=[0.0, 1.0, 2.0, 0.0], b=[0.0, 0.0]), {"a": 1.0, "b": 1.0}, 1.0)
    assert torch.equal(both["a.weight"][1:3], alive)
    assert not both["a.weight"][[0, 3]].any() and not both["b.weight"].any()


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_an_exponent_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"pruning\.cost_weight=.*must be at least 0 and finite"):
        per_cost(as_scores(a=[1.0]), {"a": 1.0}, weight)
    with pytest.raises(ConfigError, match=r"pruning\.cost_weight=.*must be at least 0 and finite"):
        settings.check(PruningConfig("group_norm", cost="macs", cost_weight=weight))


@pytest.mark.parametrize("cost", [0.0, -1.0, math.inf, math.nan])
def test_a_cost_out_of_range_is_refused(cost: float) -> None:
    with pytest.raises(ConfigError, match=r"costs\[a\.weight\]=.*must be above 0 and finite"):
        per_cost(as_scores(a=[1.0]), {"a": cost}, 1.0)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {*settings.CHANNEL_METHODS, "own"}))
def test_a_score_of_single_weights_has_no_cost(method: str) -> None:
    words = rf"pruning\.cost=macs: must be none for pruning\.method={method}.*try pruning\.method="
    with pytest.raises(ConfigError, match=words):
        settings.check(PruningConfig(method, cost="macs"))
    with pytest.raises(ConfigError, match="must be none for"):
        one_shot(method, network(), 0.5, input_shape=(3, 32, 32), costs={})


def test_layers_that_are_not_compared_have_no_cost() -> None:
    words = r"pruning\.cost=params: must be none with pruning\.scope=layer.*scope=global"
    with pytest.raises(ConfigError, match=words):
        settings.check(PruningConfig("group_norm", cost="params", scope="layer"))
    with pytest.raises(ConfigError, match=r"did you mean 'macs'"):
        settings.check(PruningConfig("group_norm", cost="mac"))
    settings.check(PruningConfig("none", cost="macs"))


# --------------------------------------------------------------------------------------------------
# Masks


def masks_of(model: nn.Module, sparsity: float, start: Masks | None = None, **more: Any) -> Masks:
    chosen = PruningConfig(**{"method": "group_norm", **more})
    settings.check(chosen)
    known = structure(chosen, model, (3, 32, 32))
    masks = Masks.dense(model, ["fc2"]) if start is None else start
    return one_shot(chosen.method, model, sparsity, masks=masks, keep_channels=1, **known)


@pytest.mark.parametrize("method", settings.CHANNEL_METHODS)
def test_without_a_cost_masks_are_those_of_the_score_alone(method: str) -> None:
    model = network()
    groups = coupled_layers(model, (3, 32, 32))
    score = (
        group_norm(model, groups=groups, scales=channel_scales(trace(model)))
        if method == "group_norm"
        else magnitude_channel(model, groups=groups)
    )
    expected = prune(Masks.dense(model, ["fc2"]), score, 0.6, keep_channels=1)
    assert masks_of(model, 0.6, method=method, cost_weight=3.0) == expected
    assert masks_of(model, 0.6, method=method, cost="macs") != expected


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("method", settings.CHANNEL_METHODS)
def test_with_costs_the_number_of_pruned_weights_is_exact_and_repeats(
    method: str, cost: str
) -> None:
    model = network(seed=2)
    masks = masks_of(model, 0.5, method=method, cost=cost)
    figures = masks.figures()
    assert figures.weights - figures.kept == math.floor(0.5 * figures.weights + 0.5)
    assert masks_of(model, 0.5, method=method, cost=cost) == masks


def test_the_more_the_cost_weighs_the_fewer_multiply_accumulates_stay() -> None:
    model = network()
    reports = [
        shrink(
            model,
            (3, 32, 32),
            masks=masks_of(model, 0.4, cost="macs", cost_weight=weight),
        ).report
        for weight in (0.0, 0.4, 0.8)
    ]
    macs = [report.macs for report in reports]
    assert macs == sorted(macs, reverse=True) and macs[2] < 0.5 * macs[0]


def test_pruned_in_steps_without_training_between_it_is_the_same_as_at_once() -> None:
    model = network("resnet.resnet18")
    masks = Masks.dense(model, ["head"])
    at_once = masks_of(model, 0.5, masks, cost="macs")
    for target in gradual(0.5, 3):
        masks = masks_of(model, target, masks, cost="macs")
        masks.apply(model)
    differing = sum(int((masks[name] != at_once[name]).sum()) for name in masks)
    # but for the channel at the threshold of a step, whose weights went in part
    assert differing <= 0.01 * at_once.figures().weights


def test_no_cost_strips_a_layer_and_the_model_still_answers() -> None:
    for name in ("vgg.vgg5", "resnet.resnet18"):
        model = network(name)
        leave = ["fc2"] if "vgg" in name else ["head"]
        masks = masks_of(model, 0.6, Masks.dense(model, leave), cost="macs", cost_weight=0.5)
        plan = shrink(model, (3, 32, 32), masks=masks).plan
        assert min(edit.after for edit in plan.edits) >= 2


# --------------------------------------------------------------------------------------------------
# Runs


def test_a_run_prunes_by_costs_as_the_plain_function_does(configure: Any, carry_out: Any) -> None:
    overrides = ("data=synthetic", "model=cnn", "num_clients=2", "client.epochs=1", "rounds=1",
                 "data.examples=40", "data.test_examples=10", "pruning=group_norm",
                 "pruning.start=0", "pruning.steps=1", "pruning.sparsity=0.5")  # fmt: skip
    from fedsys.training import federation
    from strategies.around import find
    from strategies.pruned import Pruned

    kept = {}
    for cost in ("none", "macs"):
        config = configure(*overrides, f"pruning.cost={cost}", "pruning.cost_weight=0.7")
        assert config.pruning.cost == cost and config.pruning.cost_weight == 0.7
        dataset = federation.federation(config).dataset
        model = federation.build_model(config, dataset)
        known = structure(config.pruning, model, dataset.input_shape)
        leave = ["fc2"]
        expected = one_shot("group_norm", model, 0.5, leave=leave, keep_channels=1, **known)
        kept[cost] = find(carry_out(config).strategy, Pruned).kept()
        assert kept[cost] == expected
    assert kept["none"] != kept["macs"]
    assert dataclasses.replace(config.pruning, cost="none") != config.pruning
