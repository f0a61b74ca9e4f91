from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.errors import ConfigError, ModelError
from fedsys.models import build
from fedsys.pruning import scores
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.sparsify import (
    METHODS,
    gradual,
    one_shot,
    prune,
    synflow_masks,
)
from fedsys.randomness import Address
from fedsys.training import plain as training
from fedsys.training.masks import Masks, held, prunable
from fedsys.training.optimizers import pack_optimizer
from tests.pruning.rewinding import Ticket, Trained, levels, prune_level, prune_share

SHAPE = (1, 8, 8)
ADDRESS = Address(seed=3)


def network(name: str = "small.cnn", seed: int = 1, **arguments: object) -> nn.Module:
    spec = {"_target_": f"fedsys.models.{name}", "norm": "batch", "init": None, **arguments}
    return build(spec, input_shape=SHAPE, num_classes=10, seed=seed)


def tiny(seed: int = 1) -> nn.Module:
    return network(width=4, hidden=16, seed=seed)


def examples(batches: int = 3, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.rand((size, *SHAPE), generator=draw), torch.randint(10, (size,), generator=draw))
        for _ in range(batches)
    ]


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    draw = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=draw)
        layer.bias.data = torch.randn(layer.bias.shape, generator=draw)
    return nn.Sequential(*layers)


def pruned_values(model: nn.Module, masks: Masks) -> Tensor:
    named = dict(model.named_parameters())
    return torch.cat([named[name].detach()[~mask] for name, mask in masks.items()])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --------------------------------------------------------------------------------------------------
# Masks


def test_only_weights_of_convolutions_and_linear_layers_have_masks() -> None:
    model = tiny()
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert list(Masks.dense(model)) == names
    assert Masks.dense(model).figures().sparsity == 0.0


@pytest.mark.parametrize("leave", [["fc2"], ["fc2.linear"], ["fc2.linear.weight"], ["fc2.*"]])
def test_layers_left_alone_have_no_mask(leave: list[str]) -> None:
    model = tiny()
    assert list(Masks.dense(model)) == [*Masks.dense(model, leave), "fc2.linear.weight"]


def test_a_name_that_fits_no_layer_is_refused_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"leave=fc2.linaer.*did you mean 'fc2.linear'"):
        Masks.dense(tiny(), ["fc2.linaer"])
    with pytest.raises(ConfigError, match="must leave"):
        Masks.dense(tiny(), ["*"])


def test_a_weight_that_layers_share_has_one_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable(model)) == ["0.weight"]


def test_applying_makes_zero_of_anything() -> None:
    model = nn.Linear(3, 1)
    model.weight.data = torch.tensor([[math.nan, -math.inf, -2.0]])
    Masks({"weight": torch.tensor([[False, False, True]])}).apply(model)
    assert model.weight.tolist() == [[0.0, 0.0, -2.0]]
    assert not model.weight.signbit()[0, :2].any()


def test_masks_that_do_not_fit_are_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ConfigError, match="masks=other: must be the name"):
        Masks({"other": torch.ones(1, dtype=torch.bool)}).apply(model)
    with pytest.raises(ConfigError, match=r"shape=\(3, 1\): must be \(1, 3\)"):
        Masks({"weight": torch.ones((3, 1), dtype=torch.bool)}).apply(model)
    with pytest.raises(ConfigError, match="must be of bool"):
        Masks({"weight": torch.ones(1, 3)})


def test_figures_count_weights_and_dead_channels() -> None:
    one = torch.tensor([[True, False], [False, False]])
    figures = Masks({"a.weight": one, "b.weight": torch.ones((2, 3), dtype=torch.bool)}).figures()
    assert (figures.weights, figures.kept) == (10, 7)
    assert figures.sparsity == pytest.approx(0.3)
    assert figures.dead_channels == 0.25
    assert (figures.layers[0].sparsity, figures.layers[0].dead_channels) == (0.75, 1)


def test_masks_come_back_from_their_file_and_equal_masks_make_equal_files(tmp_path: Path) -> None:
    masks = one_shot("random", tiny(), 0.7, address=ADDRESS)
    masks.save(tmp_path / "one")
    Masks(dict(masks)).save(tmp_path / "two")
    assert Masks.load(tmp_path / "one") == masks
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "masks"
    Masks.dense(model).save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x00")
    with pytest.raises(ModelError, match="checksum"):
        Masks.load(path)
    for damage in (good[:-9], b"", b"no such format", good.replace(b"sha256", b"sha257")):
        path.write_bytes(damage)
        with pytest.raises(ModelError, match="damaged"):
            Masks.load(path)
    with pytest.raises(ModelError, match="cannot read"):
        Masks.load(tmp_path / "absent")
    Ticket.start(model).save(path)
    with pytest.raises(ModelError, match="of the kind fedsys-ticket-1"):
        Masks.load(path)


# --------------------------------------------------------------------------------------------------
# Training under masks

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step_whatever_the_optimizer_remembers(
    name: str,
) -> None:
    model = tiny()
    optimizer = OPTIMIZERS[name](model)
    training.train(model, optimizer, examples(), ADDRESS)  # momentum in all weights
    masks = one_shot("magnitude", model, 0.8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with held(masks, model, optimizer):
        for batch in examples(4, seed=1):
            training.train(model, optimizer, [batch], ADDRESS, micro_batches=2, clip_norm=1.0)
            assert not pruned_values(model, masks).any()
    state = pack_optimizer(optimizer, dict(model.named_parameters()))
    for key, tensor in state.items():
        weight = key.rpartition("|")[0]
        if weight in masks and tensor.shape == masks[weight].shape:
            assert not tensor[~masks[weight]].any(), key
    for weight, mask in masks.items():
        assert not torch.equal(model.get_parameter(weight)[mask], before[weight][mask])


def test_a_proximal_term_anchored_in_the_masked_model_keeps_zeros() -> None:
    model = tiny()
    masks = one_shot("magnitude", model, 0.8)
    optimizer = OPTIMIZERS["sgd"](model)
    with held(masks, model, optimizer):
        anchor = training.Proximal.at(model, 0.1)
        training.train(model, optimizer, examples(), ADDRESS, anchor=anchor)
        assert not pruned_values(model, masks).any()


def test_what_moves_pruned_weights_is_an_error_and_hooks_do_not_outlive_the_block() -> None:
    model = tiny()
    masks = one_shot("magnitude", model, 0.8)
    with pytest.raises(ModelError, match=r"conv1.*moved 1 pruned"), held(masks, model):
        weight = model.get_parameter(next(iter(masks)))
        weight.data[tuple((~masks[next(iter(masks))]).nonzero()[0])] = 1.0
    training.train(model, OPTIMIZERS["sgd"](model), examples(), ADDRESS)
    assert pruned_values(model, masks).any()


def test_a_half_trains_under_its_part_of_the_masks() -> None:
    model = tiny()
    masks = one_shot("magnitude", model, 0.8)
    half = nn.Module()
    half.add_module("conv1", model.get_submodule("conv1"))
    part = masks.part(name for name, _ in half.named_parameters())
    assert list(part) == [name for name in masks if name.startswith("conv1.")]
    with held(part, half):
        assert not pruned_values(half, part).any()
    with pytest.raises(ConfigError, match=r"\.part\(names\)"), held(masks, half):
        pass


# --------------------------------------------------------------------------------------------------
# The decision


def brute_force(masks: Masks, score: dict[str, Tensor], count: int) -> set[int]:
    """Places of the pruned weights, by sorting (score, place) as a person would."""
    flat = torch.cat([score[n].flatten() for n in masks]).tolist()
    kept = torch.cat([m.flatten() for m in masks.values()]).tolist()
    gone = {i for i, k in enumerate(kept) if not k}
    rest = sorted((flat[i], i) for i in range(len(flat)) if i not in gone)
    return gone | {i for _, i in rest[: max(0, count - len(gone))]}


def places(masks: Masks) -> set[int]:
    return set((~torch.cat([m.flatten() for m in masks.values()])).nonzero().flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    gone=st.sets(st.integers(0, 11), max_size=4),
    sparsity=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.66, 0.75]),
)
def test_exactly_the_lowest_go_and_the_first_of_equals(
    values: list[int], gone: set[int], sparsity: float
) -> None:
    score = {"a": torch.tensor(values[:8]).float().view(2, 4), "b": torch.tensor([values[8:]]) / 1}
    kept = torch.tensor([i not in gone for i in range(12)])
    masks = Masks({"a": kept[:8].view(2, 4), "b": kept[8:].view(1, 4)})
    expected = brute_force(masks, score, math.floor(sparsity * 12 + 0.5))
    if set(range(8)) <= expected or set(range(8, 12)) <= expected:
        with pytest.raises(ModelError, match="leave none"):
            prune(masks, score, sparsity)
    else:
        assert places(prune(masks, score, sparsity)) == expected


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.951])
def test_the_number_of_pruned_weights_is_exact(scope: str, sparsity: float) -> None:
    model = tiny()
    figures = one_shot("random", model, sparsity, scope=scope, address=ADDRESS).figures()
    assert figures.weights - figures.kept == math.floor(sparsity * figures.weights + 0.5)
    if scope == "layer":
        for layer in figures.layers:
            assert abs(layer.weights - layer.kept - sparsity * layer.weights) <= 1


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_more_pruning_keeps_what_was_pruned_and_less_changes_nothing(scope: str) -> None:
    model = tiny()
    half = one_shot("random", model, 0.5, scope=scope, address=ADDRESS)
    more = one_shot("magnitude", model, 0.8, masks=half, scope=scope)
    assert places(half) < places(more)
    assert one_shot("magnitude", model, 0.3, masks=half, scope=scope) == half


def test_a_layer_left_alone_stays_whole_and_does_not_count() -> None:
    masks = one_shot("magnitude", tiny(), 0.9, leave=["fc2", "conv1"])
    assert not any(name.startswith(("fc2", "conv1")) for name in masks)
    assert masks.figures().sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_layer_that_would_lose_all_is_named_unless_channels_are_kept() -> None:
    model = tiny()
    score = scores.magnitude(model)
    first = next(iter(score))
    score[first] = torch.full_like(score[first], -1.0)
    masks = Masks.dense(model)
    with pytest.raises(ModelError, match=rf"{first}: .*keep_channels=1"):
        prune(masks, score, 0.9)
    kept = prune(masks, score, 0.9, keep_channels=2)
    assert kept[first].flatten(1).any(1).sum() == 2 == kept[first].sum()
    figures = kept.figures()
    assert figures.weights - figures.kept == math.floor(0.9 * figures.weights + 0.5)
    with pytest.raises(ConfigError, match="keep_channels=99"):
        prune(masks, score, 0.999, keep_channels=99)


def test_bad_arguments_are_refused_before_anything_is_done() -> None:
    model = tiny()
    masks, score = Masks.dense(model), scores.magnitude(model)
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match=r"pruning\.sparsity"):
            prune(masks, score, sparsity)
    with pytest.raises(ConfigError, match=r"scope=globl.*did you mean 'global'"):
        prune(masks, score, 0.5, scope="globl")
    with pytest.raises(ConfigError, match=r"keep_channels=-1"):
        prune(masks, score, 0.5, keep_channels=-1)
    with pytest.raises(ConfigError, match="must have one for"):
        prune(masks, {}, 0.5)
    with pytest.raises(ConfigError, match="the shape of the mask"):
        prune(masks, {name: s.flatten() for name, s in score.items()}, 0.5)
    with pytest.raises(ModelError, match="NaN"):
        prune(masks, {name: s * math.nan for name, s in score.items()}, 0.5)
    with pytest.raises(ConfigError, match=r"method=sinp.*did you mean 'snip'"):
        one_shot("sinp", model, 0.5)
    with pytest.raises(ConfigError, match="at least 1 mini-batch"):
        one_shot("snip", model, 0.5)
    with pytest.raises(ConfigError, match="input_shape"):
        one_shot("synflow", model, 0.5)
    with pytest.raises(ConfigError, match=r"pruning\.mix=1\.5"):
        one_shot("magnitude_channel", model, 0.5, mix=1.5)
    with pytest.raises(ConfigError, match=r"pruning\.steps=0"):
        gradual(0.5, 0)


# --------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("method", METHODS)
def test_every_method_repeats_itself_and_leaves_the_model_as_it_was(method: str) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def masks() -> Masks:
        return one_shot(
            method, model, 0.8, batches=examples(), input_shape=SHAPE, address=ADDRESS,
            iterations=5, own=scores.magnitude,
        )  # fmt: skip

    first = masks()
    torch.rand(7)  # the process-wide generator has no part in it
    assert masks() == first
    assert same(dict(model.state_dict()), before)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_scores_of_the_users_decide_and_are_refused_where_they_do_not_fit() -> None:
    model = tiny()

    def largest_go(model: nn.Module) -> scores.Scores:
        return {name: -w.abs() for name, w in prunable(model).items()}

    pruned = one_shot("own", model, 0.5, own=largest_go)
    assert same(dict(pruned), dict(prune(Masks.dense(model), largest_go(model), 0.5)))
    for said in ({}, None, dict.fromkeys(prunable(model))):
        with pytest.raises(ConfigError, match=r"pruning\.score=.*must return a tensor"):
            one_shot("own", model, 0.5, own=lambda model, said=said: said)
    with pytest.raises(ConfigError, match="own=None: must be a function of the model"):
        one_shot("own", model, 0.5)


def test_random_scores_follow_from_the_address() -> None:
    one, other = tiny(1), tiny(2)
    assert same(scores.random(one, ADDRESS), scores.random(other, ADDRESS))
    assert not same(scores.random(one, ADDRESS), scores.random(one, Address(seed=4)))


def test_channel_norms_are_means_over_filters_and_over_coupled_filters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[1.0, -3.0], [0.0, 1.0]])
    model[1].weight.data = torch.tensor([[5.0, 7.0], [-1.0, 1.0]])
    plain = scores.channel_norm(model)
    assert plain["0.weight"].tolist() == [[2.0, 2.0], [0.5, 0.5]]
    square = scores.channel_norm(model, order=2)["0.weight"]
    torch.testing.assert_close(square[:, 0], torch.tensor([5.0, 0.5]).sqrt())
    coupled = scores.channel_norm(model, groups=[("0", "1")])
    assert coupled["0.weight"].tolist() == coupled["1.weight"].tolist() == [[4.0] * 2, [0.75] * 2]
    mixed = scores.magnitude_channel(model, mix=0.25)["0.weight"]
    torch.testing.assert_close(mixed, torch.tensor([[1.25, 2.75], [0.125, 0.875]]))


def test_layers_of_residual_sums_are_coupled_and_die_together() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.relu(x + self.branch(x))
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    model = Residual()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    groups = scores.coupled_layers(model, SHAPE)
    assert groups == (("stem", "branch"),)
    masks = one_shot(
        "magnitude_channel", model, 0.4, mix=1.0, groups=groups, leave=["head"], keep_channels=1
    )
    dead = [~masks[f"{layer}.weight"].flatten(1).any(1) for layer in groups[0]]
    both = int((dead[0] & dead[1]).sum())
    assert both >= 2
    report = shrink(model, SHAPE, masks=masks).report
    assert report.channels == report.channels_before - 2 * both


def test_snip_is_the_gradient_times_the_weight() -> None:
    model = tiny()
    batch = examples(1, 16)
    reference = copy.deepcopy(model)
    reference.get_submodule("fc2.dropout").p = 0.0
    model.get_submodule("fc2.dropout").p = 0.0
    F.cross_entropy(reference(batch[0][0]), batch[0][1]).backward()  # type: ignore[no-untyped-call]
    for name, score in scores.snip(model, batch, ADDRESS).items():
        weight = reference.get_parameter(name)
        assert weight.grad is not None
        torch.testing.assert_close(score, (weight * weight.grad).abs().detach())


def test_snip_and_grasp_are_of_the_mean_over_all_batches() -> None:
    model = chain(64, 6, 10)
    batches = [(x.flatten(1), y) for x, y in examples(3, 8)]
    batches[2] = (batches[2][0][:3], batches[2][1][:3])
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    for score in (scores.snip, scores.grasp):
        parts, at_once = score(model, batches, ADDRESS), score(model, whole, ADDRESS)
        for name in parts:
            torch.testing.assert_close(parts[name], at_once[name], rtol=1e-4, atol=1e-7)


def test_grasp_is_the_weight_times_hessian_times_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    x = torch.randn((7, 3), generator=draw, dtype=torch.float64)
    y = torch.randint(2, (7,), generator=draw)
    weights = prunable(model)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in weights.values()])  # type: ignore[no-untyped-call]
        own = {n: p.view_as(w) for (n, w), p in zip(weights.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, own, (x,)) / 3.0, y)

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    score = scores.grasp(model, [(x[:3], y[:3]), (x[3:], y[3:])], ADDRESS, temperature=3.0)
    got = torch.cat([s.flatten() for s in score.values()])
    torch.testing.assert_close(got, flat * (hessian @ gradient))


def test_grasp_keeps_what_the_gradient_flow_needs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn((9, 3), generator=draw, dtype=torch.float64)
    y = torch.randint(2, (9,), generator=draw)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)

    def squared_norm() -> float:
        loss = F.cross_entropy(model(x), y)
        return sum(
            float(g.pow(2).sum()) for g in torch.autograd.grad(loss, list(prunable(model).values()))
        )

    score = scores.grasp(model, [(x, y)], ADDRESS, temperature=1.0)["0.weight"]
    before, weight, share = squared_norm(), model[0].weight, 1e-6
    for place in [(0, 0), (1, 2), (3, 1)]:
        value = float(weight.data[place])
        weight.data[place] = value * (1 - share)
        lost = (before - squared_norm()) / share
        weight.data[place] = value
        assert float(score[place]) == pytest.approx(lost / 2, rel=1e-3, abs=1e-9)


def synflow(model: nn.Module, input_shape: tuple[int, ...]) -> scores.Scores:
    return scores.flow(scores.linear_copy(model), input_shape)


def test_synflow_on_a_chain_is_the_product_of_sums_over_paths() -> None:
    model = chain(3, 4, 5, 2)
    a, b, c = (layer.weight.detach().double().abs() for layer in model)
    score = synflow(model, (3,))
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(score["0.weight"], a * (c @ b).sum(0)[:, None] * ones)
    torch.testing.assert_close(score["1.weight"], b * c.sum(0)[:, None] * (a @ ones))
    torch.testing.assert_close(score["2.weight"], c * (b @ a @ ones))
    total = (c @ b @ a @ ones).sum()
    for each in score.values():  # what flows through every layer is the same
        torch.testing.assert_close(each.sum(), total)


def test_synflow_is_the_same_with_any_batch_norm_bias_sign_and_activation() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 2))
    bent = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU6(), nn.Flatten())
    bent.append(nn.Linear(108, 2))
    draw = torch.Generator().manual_seed(0)
    for one, other in zip(prunable(plain).values(), prunable(bent).values(), strict=True):
        one.data = torch.randn(one.shape, generator=draw) * 9
        other.data = -one.data
    norm = bent[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean += 5.0
    norm.weight.data *= -3.0
    expected = list(synflow(plain, SHAPE).values())
    got = list(synflow(bent, SHAPE).values())
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_synflow_in_steps_spares_layers_that_one_step_kills() -> None:
    model = chain(64, 100, 4, 100, 10)
    score = synflow(model, (64,))
    with pytest.raises(ModelError, match="leave none"):
        prune(Masks.dense(model), score, 0.99)
    masks = synflow_masks(model, (64,), Masks.dense(model), 0.99)
    assert masks.figures().sparsity == pytest.approx(0.99, abs=1e-3)
    assert all(layer.kept for layer in masks.figures().layers)


def test_a_flow_beyond_float64_is_an_error() -> None:
    model = chain(2, 2, 2)
    for layer in model:
        layer.double().weight.data.fill_(1e200)
    with pytest.raises(ModelError, match="exceeds float64"):
        synflow(model, (2,))


def test_gradual_sparsities_rise_by_equal_shares_of_what_is_left() -> None:
    steps = gradual(0.936, 3)
    assert steps[-1] == 0.936
    assert steps == pytest.approx([0.6, 0.84, 0.936])


# --------------------------------------------------------------------------------------------------
# Dead channels and dense models


def trained_network() -> nn.Module:
    model = network("vgg.vgg5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training.train(model, optimizer, examples(6, 16), ADDRESS)
    return model.eval()


def test_a_mixed_score_leaves_more_dead_channels_and_both_become_dense_models() -> None:
    model = trained_network()
    x = examples(1, 16, seed=9)[0][0]
    parameters, dead = {}, {}
    for method in ("magnitude", "magnitude_channel"):
        masks = one_shot(method, model, 0.9, leave=["*.linear"], keep_channels=1, mix=0.9)
        assert masks.figures().sparsity == pytest.approx(0.9, abs=1e-4)
        dead[method] = masks.figures().dead_channels
        small = shrink(model, SHAPE, masks=masks)
        parameters[method] = small.report.parameters
        masked = copy.deepcopy(model)
        masks.apply(masked)
        with torch.no_grad():
            torch.testing.assert_close(small.model(x), masked(x), rtol=1e-5, atol=1e-5)
    assert dead["magnitude_channel"] > max(0.3, 2 * dead["magnitude"])
    assert parameters["magnitude_channel"] < parameters["magnitude"]


# --------------------------------------------------------------------------------------------------
# Levels


def train_level(model: nn.Module, ticket: Ticket) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with held(ticket.masks, model, optimizer):
        training.train(model, optimizer, examples(), Address(3, round=ticket.level))


def test_levels_prune_a_fifth_of_the_survivors_nest_and_rewind_exactly() -> None:
    model = tiny()
    start = Ticket.start(model, leave=["fc2"])
    survivors = start.masks.figures().kept
    before: set[int] = set()
    seen = 0
    for trained in levels(start, model, train_level, last=6):
        ticket = trained.ticket
        assert ticket.level == seen
        assert ticket.masks.figures().kept == survivors
        assert before <= places(ticket.masks)
        for name, mask in ticket.masks.items():
            assert not trained.weights[name][~mask].any()
        rewound = tiny(seed=7)
        ticket.rewound(rewound)
        for name, tensor in rewound.state_dict().items():
            kept = ticket.masks.get(name)
            expected = start.rewind[name]
            assert torch.equal(tensor, expected if kept is None else expected * kept)
        survivors, before, seen = survivors * 4 // 5, places(ticket.masks), seen + 1
    assert seen == 7
    assert trained.following is None


def test_levels_resumed_from_a_file_give_the_same_bits(tmp_path: Path) -> None:
    def run(ticket: Ticket, seed: int) -> list[Trained]:
        return list(levels(ticket, tiny(seed), train_level, last=3))

    whole = run(Ticket.start(tiny()), 1)
    for trained in whole[:-1]:
        assert trained.following is not None
        trained.following.save(tmp_path / "ticket")
        resumed = run(Ticket.load(tmp_path / "ticket"), seed=5)  # another model to train in
        for one, other in zip(whole[trained.ticket.level + 1 :], resumed, strict=True):
            assert one.ticket.masks == other.ticket.masks
            assert same(dict(one.weights), dict(other.weights))
    again = levels(Ticket.start(tiny()), tiny(), train_level, last=1)
    for one, other in zip(whole, again, strict=False):
        assert same(dict(one.weights), dict(other.weights))


def test_pruning_a_level_is_a_function_of_ticket_and_weights(tmp_path: Path) -> None:
    model = tiny()
    ticket = Ticket.start(model)
    first, second = prune_level(ticket, model), prune_level(ticket, model)
    assert first.masks == second.masks and ticket.masks == Masks.dense(model)
    first.save(tmp_path / "one")
    second.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    layerwise = prune_level(ticket, model, scope="layer", sparsity_per_level=0.3).masks.figures()
    assert [x.weights - x.kept for x in layerwise.layers] == [
        -(-3 * x.weights // 10) for x in layerwise.layers
    ]


def test_levels_refuse_what_does_not_fit() -> None:
    model = tiny()
    ticket = Ticket.start(model)
    with pytest.raises(ModelError, match="another model"):
        ticket.rewound(network(width=5, hidden=16))
    with pytest.raises(ConfigError, match="must be at least 2"):
        next(levels(Ticket(2, ticket.masks, ticket.rewind), model, train_level, last=1))
    with pytest.raises(ConfigError, match=r"^sparsity_per_level=1"):
        prune_share(ticket.masks, scores.magnitude(model), 1.0)


# --------------------------------------------------------------------------------------------------
# Between the rounds of federated training


def test_a_server_prunes_between_rounds_and_averages_stay_exactly_zero() -> None:
    server = tiny()
    masks = Masks.dense(server)
    for round_, target in enumerate(gradual(0.9, 3), start=1):
        masks = one_shot("magnitude", server, target, masks=masks)
        masks.apply(server)
        replies = []
        for client in range(2):
            model = copy.deepcopy(server)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            with held(masks, model, optimizer):
                batches = examples(2, seed=client)
                training.train(model, optimizer, batches, Address(3, client, round_))
            replies.append(dict(model.named_parameters()))
        with torch.no_grad():
            for name, parameter in server.named_parameters():
                parameter.copy_(0.25 * replies[0][name] + 0.75 * replies[1][name])
        assert not pruned_values(server, masks).any()
    assert masks.figures().sparsity == pytest.approx(0.9, abs=1e-3)
