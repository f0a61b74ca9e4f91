"""Early exits and skips: what a model computes on a path is what its units compute."""

import copy

import pytest
import torch
from torch import nn

from fedsys.errors import ModelError
from fedsys.models import build, layered, split
from fedsys.models.exits import adapter, allowed_skips, exit_head, steps_past
from fedsys.models.resilient import exit_chain, exit_path, resilient, skip_chain, skip_path
from fedsys.randomness import Address, drawing

SHAPE = (3, 16, 16)


def backbone(name="resnet.resnet32", **options):
    spec = {"_target_": f"fedsys.models.{name}", **options}
    return build(spec, input_shape=SHAPE, num_classes=5, seed=1)


def images():
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet():
    return backbone(width=4).eval()


@pytest.fixture(scope="module")
def model(resnet):
    return resilient(layered(resnet, SHAPE), SHAPE, 5, seed=1)


# --------------------------------------------------------------------------------------------------
# Without exits and skips


def test_its_output_and_its_gradients_are_those_of_the_backbone():
    plain = backbone(width=4, dropout=0.5)
    ours = resilient(layered(copy.deepcopy(plain), SHAPE), SHAPE, 5, seed=1)
    assert ours.training
    for either in (plain, ours):
        with drawing(Address(7), 0, 3):
            either(images()).square().sum().backward()
    gradients = dict(ours.named_parameters())
    assert all(torch.equal(p.grad, gradients[n].grad) for n, p in plain.named_parameters())
    for name, value in plain.state_dict().items():  # the statistics of BatchNorm moved alike
        assert torch.equal(value, ours.state_dict()[name])
    assert torch.equal(plain.eval()(images()), ours.eval()(images()))


def test_its_state_is_that_of_the_backbone_and_parts_with_names_of_their_own(resnet, model):
    own = [n for n in model.state_dict() if not n.startswith(("exits.", "adapters."))]
    assert own == list(resnet.state_dict())


def test_what_is_drawn_for_exits_depends_on_the_seed_alone(resnet, model):
    torch.manual_seed(5)
    again = resilient(layered(resnet, SHAPE), SHAPE, 5, seed=1).state_dict()
    other = resilient(layered(resnet, SHAPE), SHAPE, 5, seed=2).state_dict()
    name = "exits.3.linear.weight"
    assert torch.equal(model.state_dict()[name], again[name])
    assert not torch.equal(again[name], other[name])


def test_a_model_with_a_part_called_exits_is_refused():
    odd = nn.Sequential()
    odd.add_module("exits", nn.Linear(4, 4))
    odd.add_module("last", nn.Linear(4, 2))
    with pytest.raises(ModelError, match="exits"):
        resilient(layered(odd, (4,)), (4,), 2, seed=0)


# --------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize("name", ["resnet.resnet32", "mobilenet.mobilenet_v2", "small.cnn"])
def test_an_exit_path_computes_the_units_before_the_exit_and_its_head(name):
    layers = layered(backbone(name).eval(), SHAPE)
    boundary = len(layers) // 2
    ours = resilient(layers, SHAPE, 5, seed=1, boundaries=[boundary])
    with torch.no_grad():
        expected = ours.exits[str(boundary)](split(layers, boundary)[0](images()))
        assert torch.equal(exit_path(ours, boundary)(images()), expected)
        assert torch.equal(ours.outputs(images())[boundary], expected)


@pytest.mark.parametrize("run", [(1, 2), (2, 5), (7, 11), (12, 15)])
def test_a_skip_path_is_the_model_with_these_units_replaced_by_nothing(resnet, model, run):
    replaced = copy.deepcopy(resnet)
    for unit in range(*run):  # unit k is block k
        setattr(replaced, f"block{unit}", nn.Identity())
    with torch.no_grad():
        assert torch.equal(skip_path(model, *run)(images()), replaced(images()))
        assert torch.equal(model.outputs(images(), run)[len(model.layers)], replaced(images()))


def test_a_unit_that_changes_the_shape_is_replaced_by_its_adapter(resnet, model):
    replaced = copy.deepcopy(resnet)
    replaced.block5, replaced.block6 = nn.Identity(), model.adapters["6"]
    with torch.no_grad():
        assert torch.equal(skip_path(model, 5, 7)(images()), replaced(images()))


def test_a_path_is_a_chain_that_hosts_can_divide(model):
    chain = skip_chain(model, 5, 7)
    units = [unit.name for unit in model.layers.units]
    assert [unit.name for unit in chain.units] == [*units[:5], "adapters.6", *units[7:]]
    out = images()
    with torch.no_grad():
        for half in split(chain, 6):
            out = half(out)
        assert torch.equal(out, chain.graph(images()))
    early = exit_chain(model, 3)
    assert [unit.name for unit in early.units] == [*units[:3], "exits.3"]
    assert early.units[-1].macs == 4 * 5  # width times classes: pooling and norm multiply nothing
    assert early.names[-1] == "exits.3.linear.bias"
    assert not [n for n in early.names if n.startswith("block3")]


def test_an_exit_behind_a_skip_sees_what_the_skip_hands_on(model):
    with torch.no_grad():
        found = model.outputs(images(), (2, 4))
        z = model.unit(1, model.unit(0, images()))
        assert torch.equal(found[4], model.exits["4"](z))
    assert 3 not in found and set(found) == {*model.boundaries, len(model.layers)} - {3}


# --------------------------------------------------------------------------------------------------
# What is allowed


def test_the_first_and_the_last_unit_are_never_left_out(model):
    runs = model.skips()
    assert {first for first, _ in runs} == set(range(1, 16))
    assert {last for _, last in runs} == set(range(2, 17))
    assert max(last - first for first, last in model.skips(longest=2)) == 2
    for run in ((0, 1), (16, 17), (3, 3), (5, 4), (1, 18)):
        with pytest.raises(ModelError, match="cannot be left out"):
            skip_path(model, *run)
    with pytest.raises(ModelError, match="no exit behind 17"):
        exit_path(model, 17)
    with pytest.raises(ModelError, match="behind 40 units; it can behind 1, 2"):
        resilient(model.layers, SHAPE, 5, seed=0, boundaries=[40])


def test_without_adapters_only_runs_between_equal_shapes_are_left_out(model):
    """Block 6 halves the map, block 11 too, and what follows block 15 is pooled."""
    layers = model.layers
    runs = allowed_skips(layers)
    same = [{1, 2, 3, 4, 5}, {7, 8, 9, 10}, {12, 13, 14}]
    assert all(any(set(range(*run)) <= stage for stage in same) for run in runs)
    assert len(runs) == sum(len(stage) * (len(stage) + 1) // 2 for stage in same)
    assert steps_past(layers, (6,), 4, 8) == (6,)
    assert steps_past(layers, (6,), 4, 12) is None


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ((4, 8, 8), (8, 4, 4)),
        ((4, 9, 9), (8, 5, 5)),
        ((4, 8, 8), (6, 3, 3)),
        ((4, 2, 2), (2, 4, 4)),
        ((4, 8, 8), (4,)),
        ((4, 8, 8), (9,)),
        ((4,), (9,)),
    ],
)
def test_an_adapter_makes_the_shape_that_is_wanted(before, behind):
    x = torch.randn(3, *before)
    for norm in ("batch", "group"):
        assert adapter(before, behind, norm)(x).shape == (3, *behind)


def test_a_head_pools_maps_and_tokens_and_nothing_else():
    assert exit_head((6, 4, 4), 5)(torch.randn(2, 6, 4, 4)).shape == (2, 5)
    tokens = torch.randn(2, 7, 6)
    places = exit_head((6, 4, 4), 5, pool=2)
    assert places.linear.in_features == 24 and places(torch.randn(2, 6, 4, 4)).shape == (2, 5)
    assert exit_head((6, 1, 3), 5, pool=2).linear.in_features == 6
    head = exit_head((7, 6), 5)
    assert torch.equal(head(tokens), head[1:](tokens.mean(1)))
    assert exit_head((2, 3, 4, 5), 5) is None
    assert adapter((7, 6), (3, 6)) is None
