from __future__ import annotations

import copy
import gc
import weakref

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.models import build, skeleton
from fedsys.models.layers import fill, fractions, join, layered, resolve_cut, split, stages
from fedsys.randomness import Address, drawing, key_modules, rows, seeded_default_generator

VGG5 = {"_target_": "fedsys.models.vgg.vgg5"}
IMAGE = (3, 32, 32)


def noise(*shape, seed=2):
    return torch.randn(*shape, generator=Address(seed).torch("test"))


def made(build_model):
    with seeded_default_generator(1):
        return key_modules(build_model())


def vgg5(**options):
    return build(VGG5 | options, input_shape=IMAGE, num_classes=10, seed=1)


def vgg5_on_meta():
    return skeleton(VGG5, input_shape=IMAGE, num_classes=10)


def step(parts, x, micro_batches=1):
    """Run parts one after the other as on different machines; return outputs and gradients."""
    parameters = {n: p for part in parts for n, p in part.named_parameters()}
    for p in parameters.values():
        p.grad = None
    outputs = []
    size = len(x) // micro_batches
    with drawing(Address(7, client=1, round=2), step=3, batch_size=len(x)):
        for start in range(0, len(x), size):
            with rows(start, start + size):
                # a copy, because a product may have other bits for memory at another alignment
                received, sent = [x[start : start + size].clone()], []
                for part in parts:
                    sent.append(part(received[-1]))
                    received.append(sent[-1].detach().clone().requires_grad_())
                outputs.append(sent[-1].detach())
                gradient = torch.cos(sent[-1].detach())
                for value, given_to in zip(sent[::-1], received[-2::-1], strict=True):
                    if value is not given_to:  # a stage of no units hands on
                        value.backward(gradient)
                        gradient = given_to.grad
    return torch.cat(outputs), {n: p.grad for n, p in parameters.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], tensor), name


def clones(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def restore(model, state):
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def assert_parts_train_like(model, parts, x, micro_batches=1):
    """Outputs, gradients and buffers after a training step, then outputs in evaluation."""
    before = clones(model.state_dict())
    model.train()
    outputs, gradients = step([model], x, micro_batches)
    after = clones(model.state_dict())
    restore(model, before)
    for part in parts:
        part.train()
    got_outputs, got_gradients = step(parts, x, micro_batches)
    assert torch.equal(got_outputs, outputs)
    assert_same(got_gradients, gradients)
    assert_same(join(*(part.state_dict() for part in parts)), after)
    assert_parts_evaluate_like(model, parts, x)


def assert_parts_evaluate_like(model, parts, x):
    model.eval()
    with torch.no_grad():
        expected = model(x)
        for part in parts:
            x = part.eval()(x)
    assert torch.equal(x, expected)


# --------------------------------------------------------------------------------------------------
# The chain


def test_vgg5_has_the_units_the_work_and_the_cuts_of_fedadapt():
    model = layered(vgg5_on_meta(), IMAGE)
    assert [u.name for u in model.units] == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert [u.macs for u in model.units] == [884_736, 4_718_592, 2_359_296, 524_288, 1_280]
    assert sum(u.macs for u in model.units) == 8_488_192
    assert sum(u.params for u in model.units) == 582_346
    assert model.cuts == (1, 2, 3)
    assert fractions(model) == pytest.approx([0.1042, 0.6601, 0.9381, 0.99985, 1.0], abs=5e-5)
    # smashed data at B = 100: 3.28 MB, then 1.64 MB twice
    assert [100 * u.bytes_out for u in model.units[:3]] == [3_276_800, 1_638_400, 1_638_400]
    assert [u.out_shape for u in model.units] == [(32, 16, 16), (64, 8, 8), (4096,), (128,), (10,)]


def test_the_linear_block_can_be_cut_on_request():
    assert layered(vgg5_on_meta(), IMAGE, fc_as_one=False).cuts == (1, 2, 3, 4)


def test_a_model_of_linear_layers_only_can_be_cut():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert layered(model, (4,)).cuts == (1, 2)


def test_what_multiplies_nothing_belongs_to_the_unit_before_and_at_the_start_to_the_first():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
    )
    chain = layered(key_modules(model), (3, 8, 8))
    assert [u.nodes for u in chain.units] == [("_0", "_1", "_2", "_3", "_4", "_5"), ("_6", "_7")]
    assert [u.name for u in chain.units] == ["1", "6"]
    assert chain.units[0].out_shape == (4, 4, 4)


def test_dtypes_and_tokens_are_those_of_the_model():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(40, 6)).double()
    chain = layered(model, torch.zeros(4, 5, dtype=torch.long))
    assert [(u.name, u.macs, u.bytes_out) for u in chain.units] == [("0", 0, 320), ("2", 240, 48)]
    assert layered(nn.Sequential(nn.Linear(5, 6)).double(), (5,)).units[0].bytes_out == 48


def test_nothing_crosses_a_cut_that_is_not_a_batch():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x):
            return F.linear(self.a(x).t() @ x, self.b.weight)

    assert len(layered(Summed(), (4,))) == 1


def test_a_unit_does_not_begin_by_overwriting_what_it_is_given():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            x += self.b(x.relu_())
            return x

    assert len(layered(Overwriting(), (4,))) == 1


def test_without_work_every_unit_counts_the_same():
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    assert fractions(layered(model, (4,), units=["0", "1"])) == [0.5, 1.0]


# --------------------------------------------------------------------------------------------------
# Halves


@pytest.mark.parametrize("cut", range(6))
def test_vgg5_trains_at_every_cut_as_in_one_piece(cut):
    model = vgg5(dropout=0.3)
    halves = split(layered(model, IMAGE), cut)
    assert_parts_train_like(model, halves, noise(6, *IMAGE), micro_batches=3)


def test_the_ends_of_the_chain_leave_an_empty_half():
    model = layered(vgg5(), IMAGE)
    x = noise(2, *IMAGE)
    empty, whole = split(model, 0)
    assert (
        empty(x) is x and not empty.state_dict() and list(whole.state_dict()) == list(model.names)
    )
    whole, empty = split(model, 5)
    assert (
        empty(x) is x and not empty.state_dict() and list(whole.state_dict()) == list(model.names)
    )


def head(inputs):
    linear = nn.Linear(inputs, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 4)
    return nn.Flatten(), *linear


def families():
    from torchvision import models as zoo
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.models.vgg import make_layers
    from torchvision.models.vision_transformer import VisionTransformer

    plain = {"aux_logits": False, "init_weights": False}
    return {
        "alexnet": (lambda: nn.Sequential(zoo.AlexNet().features, *head(256)), 64),
        "vgg": (lambda: nn.Sequential(make_layers([8, "M", 16, 16, "M"], True), *head(1024)), 32),
        "resnet18": (lambda: zoo.resnet18(num_classes=4), 32),
        "mobilenet_v2": (lambda: zoo.mobilenet_v2(num_classes=4, width_mult=0.25), 32),
        "mobilenet_v3": (lambda: zoo.mobilenet_v3_small(num_classes=4, width_mult=0.5), 32),
        "densenet": (lambda: zoo.DenseNet(8, (2, 2, 2, 2), 16, drop_rate=0.2), 32),
        "efficientnet_b0": (lambda: zoo.efficientnet_b0(num_classes=4), 32),
        "regnet": (lambda: zoo.regnet_y_400mf(num_classes=4), 32),
        "shufflenet": (lambda: zoo.shufflenet_v2_x0_5(num_classes=4), 32),
        "squeezenet": (lambda: zoo.squeezenet1_1(num_classes=4), 32),
        "mnasnet": (lambda: zoo.mnasnet0_5(num_classes=4), 32),
        "convnext": (lambda: ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]), 32),
        "googlenet": (lambda: zoo.googlenet(num_classes=4, **plain), 32),
        "swin": (lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], dropout=0.1), 32),
        "vit": (lambda: VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1), 32),
    }


@pytest.mark.parametrize("family", families())
def test_every_family_gives_the_same_bits_in_two_halves_and_in_many(family):
    constructor, size = families()[family]
    model = made(constructor)
    chain = layered(model, (3, size, size))
    x = noise(2, 3, size, size)
    halves = split(chain, resolve_cut(chain, 0.5))
    assert all(half.state_dict() for half in halves)
    assert join(*(h.state_dict() for h in halves), names=model.state_dict()).keys() == (
        model.state_dict().keys()
    )
    assert_parts_evaluate_like(model, halves, x)
    assert_parts_evaluate_like(model, stages(chain, chain.cuts), x)
    assert sum(u.params for u in chain.units) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["resnet18", "mobilenet_v3", "shufflenet", "mnasnet", "regnet"])
def test_families_train_in_halves_as_in_one_piece(family):
    constructor, size = families()[family]
    model = made(constructor)
    chain = layered(model, (3, size, size))
    halves = split(chain, resolve_cut(chain, 0.5))
    assert_parts_train_like(model, halves, noise(4, 3, size, size), micro_batches=2)


def test_what_draws_inside_functions_still_follows_the_mode_in_a_half():
    constructor, size = families()["densenet"]  # F.dropout(x, self.drop_rate, self.training)
    model = made(constructor).train()
    chain = layered(model, (3, size, size))
    x = noise(4, 3, size, size)
    state = clones(model.state_dict())
    with seeded_default_generator(3):
        expected = model(x)
    restore(model, state)
    with seeded_default_generator(3):
        for part in stages(chain, chain.cuts):
            x = part(x)
    assert torch.equal(x, expected)


class Block(nn.Module):
    """Residual, with parameters and buffers of its own that are used by functions."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("offset", torch.linspace(0, 1, width))
        self.register_buffer("hidden", torch.linspace(1, 2, width), persistent=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.gelu(self.one(x)))
        return x + self.scale * self.two(y) + self.offset * self.hidden


@settings(deadline=None, max_examples=12)
@given(
    kinds=st.lists(st.sampled_from(["block", "linear", "norm", "triple", "drop"]), max_size=5),
    cuts=st.lists(st.integers(0, 20), max_size=3),
)
def test_any_chain_at_any_cuts_trains_as_in_one_piece(kinds, cuts):
    makers = {
        "block": lambda: Block(4),
        "linear": lambda: nn.Linear(4, 4),
        "norm": lambda: nn.BatchNorm1d(4),
        "triple": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
        "drop": lambda: nn.Dropout(0.4),
    }
    model = made(lambda: nn.Sequential(nn.Linear(6, 4), *(makers[kind]() for kind in kinds)))
    chain = layered(model, (6,))
    parts = stages(chain, sorted(cut % (len(chain) + 1) for cut in cuts))
    names = [name for part in parts for name in part.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    assert_parts_train_like(model, parts, noise(6, 6), micro_batches=2)


def test_a_stateless_module_used_on_both_sides_is_in_both():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    model = Reusing()
    halves = split(layered(model, (4,)), 1)
    assert halves[0].act is not halves[1].act
    assert_parts_train_like(model, halves, noise(3, 4))


def tied_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class SharedConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class SharedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.table) * self.table


@pytest.mark.parametrize(
    ("model", "shape", "cuts", "says"),
    [
        (tied_weight(), (4,), (2,), r"cut 1 separates .* share 0.weight: 0 and 1; .* one of 2"),
        (SharedConvolution(), (3, 8, 8), (), r"share conv.weight: conv and conv \(2\); .* none"),
        (SharedTable(), (4,), (), r"share table: a and b"),
    ],
)
def test_a_cut_through_something_shared_is_not_offered_and_refused_by_name(
    model, shape, cuts, says
):
    chain = layered(model, shape)
    assert chain.cuts == cuts
    for refuse in (split, resolve_cut):
        with pytest.raises(ModelError, match=says):
            refuse(chain, 1)


class OneDropout(nn.Module):
    """Drops after each of three layers, by one module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for layer in self.layers:
            x = self.dropout(layer(x))
        return x


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
def test_a_dropout_that_several_units_call_draws_as_in_the_whole_model(cuts):
    """Each half drew as if it had called first, so split training gave another model.

    A GPT of lists, with one dropout for attention and perceptron, had other bits than unsplit.
    """
    model, x = key_modules(OneDropout()), torch.ones(6, 8)
    parts = stages(layered(model, (8,)), cuts)
    for start, stop in ((0, 4), (4, 6)):
        with drawing(Address(3), step=1, batch_size=6), rows(start, stop):
            expected = model(x[start:stop])
        got = x[start:stop]
        for part in parts:  # each on a machine of its own
            with drawing(Address(3), step=1, batch_size=6), rows(start, stop):
                got = part(got)
        assert torch.equal(got, expected) and (got == 0).any()
        with drawing(Address(3), step=1, batch_size=6), rows(start, stop):  # all on one
            assert torch.equal(parts[-1](model_of(parts[:-1], x[start:stop])), expected)


def model_of(parts, x):
    for part in parts:
        x = part(x)
    return x


def test_what_forward_never_uses_is_in_the_last_stage():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(nn.Identity())
    model[2].add_module("unused", nn.Linear(2, 2))
    first, last = split(layered(model, (4,)), 1)
    assert list(first.state_dict()) == ["0.weight", "0.bias"]
    assert list(last.state_dict())[2:] == ["2.unused.weight", "2.unused.bias"]


def test_a_model_may_return_more_than_a_tensor():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.body(x))
            return {"a": self.a(x), "b": [self.b(x)]}

    model = TwoHeads()
    chain = layered(model, (4,))
    assert [(u.out_shape, u.bytes_out) for u in chain.units] == [((4,), 16), ((), 20)]
    body, heads = split(chain, 1)
    x = noise(2, 4)
    assert torch.equal(heads(body(x))["b"][0], model(x)["b"][0])


def test_a_model_that_computes_nothing_is_refused():
    with pytest.raises(ModelError, match="Sequential computes nothing"):
        layered(nn.Sequential(), (4,))


def test_splitting_again_shares_the_code_and_leaves_nothing_behind():
    chain = layered(vgg5_on_meta(), IMAGE)
    generated = fx.graph_module._loader.eval_cache
    split(chain, 2)
    before = len(generated)
    again = layered(vgg5_on_meta(), IMAGE)
    assert len(generated) == before + 1  # of the trace
    device, _ = split(again, 2)
    assert len(generated) == before + 1
    fill(device, {n: vgg5().state_dict()[n] for n in device.state_dict()})
    assert torch.equal(device(x := noise(2, *IMAGE)), split(layered(vgg5(), IMAGE), 2)[0](x))


def test_equal_code_that_calls_other_functions_is_not_shared():
    def scaled(factor):
        def scale(x):
            return x * factor

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Identity()

            def forward(self, x):
                return scale(self.layer(x))

        return Scaled()

    x = noise(2, 4)
    for factor in (2.0, 3.0):
        whole, _ = split(layered(scaled(factor), (4,)), 1)
        assert torch.equal(whole(x), x * factor)


def test_a_half_can_be_copied_and_shows_its_code():
    device, _ = split(layered(vgg5(), IMAGE), 1)
    twin = copy.deepcopy(device)
    twin.conv1.conv.weight.data.zero_()
    x = noise(2, *IMAGE)
    assert not torch.equal(twin(x), device(x))
    assert "self.conv1.conv(" in device.code and "conv2" not in device.code


def test_cuts_must_ascend_within_the_chain():
    chain = layered(vgg5_on_meta(), IMAGE)
    for cuts in ([3, 2], [6], [-1]):
        with pytest.raises(ModelError, match="ascending"):
            stages(chain, cuts)


# --------------------------------------------------------------------------------------------------
# Filling and joining


def test_a_device_holds_its_half_and_nothing_of_the_other():
    chain = layered(vgg5_on_meta(), IMAGE)
    assert all(t.is_meta for t in chain.graph.state_dict().values())
    device, edge = split(chain, 1)
    source = clones(vgg5().state_dict())
    fill(device, {name: source[name] for name in device.state_dict()})
    held = sum(t.numel() * t.element_size() for t in device.state_dict().values())
    assert held == 4 * (960 + 2 * 32) + 8  # parameters, running statistics, batches tracked
    assert not any(t.is_meta for t in device.state_dict().values())
    assert all(t.is_meta for t in edge.state_dict().values())
    assert not {id(t) for t in edge.parameters()} & {id(t) for t in device.parameters()}


def test_two_devices_filled_from_one_skeleton_are_independent():
    chain = layered(vgg5_on_meta(), IMAGE)
    source = vgg5().state_dict()
    first, second = split(chain, 2)[0], split(chain, 3)[0]
    fill(first, {n: torch.zeros_like(source[n]) for n in first.state_dict()})
    fill(second, {n: torch.ones_like(source[n]) for n in second.state_dict()})
    first.eval()
    assert second.conv1.conv.training
    assert all(not t.any() for t in first.state_dict().values())
    assert all(t.all() for t in second.state_dict().values())
    assert all(t.is_meta for t in chain.graph.state_dict().values())


def test_halves_filled_from_messages_train_as_the_model_does():
    model = vgg5(dropout=0.2)
    chain = layered(skeleton(VGG5 | {"dropout": 0.2}, input_shape=IMAGE, num_classes=10), IMAGE)
    halves = stages(chain, [1, 4])
    for half in halves:
        fill(half, clones({n: model.state_dict()[n] for n in half.state_dict()}))
    x = noise(4, *IMAGE)
    outputs, gradients = step([model], x)
    got_outputs, got_gradients = step(halves, x)
    assert torch.equal(got_outputs, outputs)
    assert_same(got_gradients, gradients)
    assert_same(join(*(h.state_dict() for h in halves)), model.state_dict())


def test_a_filled_half_goes_when_it_is_dropped():
    chain = layered(vgg5_on_meta(), IMAGE)
    source = clones(vgg5().state_dict())
    device = split(chain, 3)[0]
    fill(device, {name: source.pop(name) for name in device.state_dict()})
    alive = weakref.ref(device.conv2.conv.weight)
    del device
    gc.collect()
    assert alive() is None


def test_tied_parameters_stay_one_when_a_half_is_filled():
    model = tied_weight()
    with torch.device("meta"):
        chain = layered(tied_weight(), (4,))
    half, rest = split(chain, 2)
    state = clones({n: model.state_dict()[n] for n in half.state_dict()})
    fill(half, state)
    assert half.get_submodule("0").weight is half.get_submodule("1").weight
    with pytest.raises(ModelError, match=r"1.weight and 0.weight are one tensor with two values"):
        fill(half, state | {"1.weight": torch.zeros(4, 4)})
    assert list(rest.state_dict()) == ["2.weight", "2.bias"]


def test_a_state_that_does_not_fit_is_refused_with_every_difference():
    device = split(layered(vgg5_on_meta(), IMAGE), 1)[0]
    state = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in device.state_dict().items()}
    del state["conv1.conv.bias"]
    state["fc2.linear.bias"] = torch.zeros(10)
    state["conv1.norm.bias"] = torch.zeros(32, dtype=torch.float64)
    with pytest.raises(ModelError) as refused:
        fill(device, state)
    for part in ("conv1.conv.bias: missing", "fc2.linear.bias: unexpected"):
        assert part in str(refused.value)
    assert "conv1.norm.bias: (32,) float64 instead of (32,) float32" in str(refused.value)


def test_a_tensor_that_no_message_can_bring_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("mask", torch.ones(4), persistent=False)

        def forward(self, x):
            return self.layer(x) * self.mask

    assert_parts_train_like(model := Hidden(), split(layered(model, (4,)), 1), noise(2, 4))
    with torch.device("meta"):
        chain = layered(Hidden(), (4,))
    with pytest.raises(ModelError, match=r"mask has no value .* persistent=True"):
        split(chain, 1)


def test_split_and_join_return_every_tensor_in_the_order_of_the_model():
    model = vgg5()
    chain = layered(model, IMAGE)
    for cut in range(6):
        joined = join(*(h.state_dict() for h in reversed(split(chain, cut))), names=chain.names)
        assert list(joined) == list(model.state_dict())
        assert_same(joined, model.state_dict())


def test_join_names_what_is_twice_missing_or_foreign():
    one, two = {"a": noise(1)}, {"b": noise(1)}
    assert join(one, two) == one | two and join() == {}
    with pytest.raises(ModelError, match="in more than one half: a"):
        join(one, two, one)
    with pytest.raises(ModelError, match="in no half: c"):
        join(one, two, names=["a", "b", "c"])
    with pytest.raises(ModelError, match="not part of the model: b"):
        join(one, two, names=["a"])


# --------------------------------------------------------------------------------------------------
# Which cut


@pytest.mark.parametrize(
    ("cut", "index"),
    [
        (0, 0),
        (4, 4),
        (5, 5),
        (0.0001, 1),
        (0.382, 1),
        (0.383, 2),
        (0.799, 2),
        (0.8, 3),
        (0.9999, 3),
        ("conv1", 1),
        ("fc1", 4),
        ("conv2.norm", 2),
        ("conv3.conv", 3),
    ],
)
def test_a_cut_is_an_index_a_fraction_of_the_work_or_a_name(cut, index):
    assert resolve_cut(layered(vgg5_on_meta(), IMAGE), cut) == index


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (6, r"cut=6: must be in 0 … 5.*units: conv1, "),
        (-1, r"cut=-1: must be in 0 … 5"),
        (1.0, r"cut=1.0: must be an index"),
        (0.0, r"cut=0.0: must be an index"),
        (float("nan"), r"must be an index"),
        (True, r"cut=True: must be an index"),
        ("conv4", r"cut=conv4: must be a unit .*did you mean 'conv3'\?.* units: conv1, conv2"),
        ("", r"must be a unit"),
        ("fc2", r"must leave units for the edge, .* ask for 5"),
    ],
)
def test_an_impossible_cut_is_refused_with_the_way_out(cut, says):
    with pytest.raises(ConfigError, match=says):
        resolve_cut(layered(vgg5_on_meta(), IMAGE), cut)


def test_a_fraction_of_a_model_without_useful_cuts_is_refused():
    with pytest.raises(ConfigError, match="no useful cut"):
        resolve_cut(layered(nn.Linear(4, 4), (4,)), 0.5)


def test_equally_near_cuts_give_the_later_one():
    chain = layered(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), (4,))
    assert fractions(chain) == [0.25, 0.5, 0.75, 1.0]
    assert resolve_cut(chain, 0.375) == 2


# --------------------------------------------------------------------------------------------------
# Units listed by hand


class Untraceable(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool((x > -100).all()) else x


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), Untraceable(), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) * self.factor


UNITS = ["features.0:features.1", ["features.2", "features.3"], "head"]


def test_a_model_that_cannot_be_traced_is_cut_where_its_units_are_listed():
    model = made(ByHand)
    with pytest.raises(ModelError, match=r"in features.2 \(Untraceable\)"):
        layered(model, noise(4, 6))
    for example in (noise(4, 6), (6,)):
        chain = layered(model, example, units=UNITS)
        assert [u.macs for u in chain.units] == [24, 16, 8]
        assert [u.name for u in chain.units] == ["features.0", "features.2", "head"]
        assert chain.cuts == (1, 2)
        assert_parts_train_like(model, stages(chain, [1, 2]), noise(4, 6))


def test_listed_units_work_without_values_if_no_module_looks_at_them():
    chain = layered(vgg5_on_meta(), IMAGE, units=["conv1", "conv2:conv3", "fc1:fc2"])
    assert [u.macs for u in chain.units] == [884_736, 7_077_888, 525_568]
    device, edge = split(chain, 1)
    assert list(join(device.state_dict(), edge.state_dict())) == list(chain.names)


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (["features.0", "head"], r"features.2.layer.weight, .* is in no unit"),
        (["features", "features.0", "head"], r"'features.0' is listed twice, .* 'features'"),
        (["features", "hed"], r"no module 'hed'; did you mean 'head'"),
        (["features.3:features.0", "head"], r"two children of one module"),
        ([], r"everything is in no unit|is in no unit"),
        (["head", "features"], r"head.*shape|fails at"),
    ],
)
def test_a_wrong_list_of_units_says_what_is_wrong(units, says):
    with pytest.raises(ModelError, match=says):
        layered(made(ByHand), noise(4, 6), units=units)


def test_listed_units_that_compute_something_else_are_refused():
    model = made(ByHand)
    model.factor = 2.0
    with pytest.raises(ModelError, match=r"do not compute what ByHand computes"):
        layered(model, noise(4, 6), units=UNITS)


def test_an_example_that_does_not_fit_is_refused_with_the_place():
    with pytest.raises(
        ModelError, match=r"fails at fc1.linear on an input of shape \(3, 3, 40, 40\)"
    ):
        layered(vgg5_on_meta(), (3, 40, 40))


def test_the_model_is_as_it_was():
    model = vgg5()
    before, modes = clones(model.state_dict()), {n: m.training for n, m in model.named_modules()}
    chain = layered(model, IMAGE)
    split(chain, 2)[0].eval()
    assert_same(model.state_dict(), before)
    assert {n: m.training for n, m in model.named_modules()} == modes
