from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedsys.errors import ConfigError, ModelError
from fedsys.models import (
    build,
    convert_norm,
    skeleton,
    torchvision_classifier,
    torchvision_names,
)
from fedsys.models.norm import groups_for
from fedsys.randomness import Address, KeyedDropout, check_keyed, drawing

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
OTHERS = {"gpt", "mlp", "own"}  # of other examples than images: test_text.py
SPECS = {name: spec for name, spec in FILES.items() if name not in OTHERS}
OWN = sorted(SPECS.keys() - {"torchvision", "variant"})
TORCHVISION = "fedsys.models.torchvision_classifier"


def small(name: str) -> dict[str, Any]:
    """The model `name` with fewer channels where it has such an argument: the same code, faster."""
    spec = dict(SPECS[name])
    if name.startswith("mobilenet"):
        spec["width"] = 0.25
    elif "width" in spec:
        spec["width"] = 4
    elif name == "vgg11":
        spec["hidden"] = [16, 16]
    return spec


def shapes(name: str) -> list[tuple[int, int, int]]:
    return [(3, 32, 32), (1, 28, 28)] + ([(1, 8, 8)] if name != "lenet" else [])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def images(shape: tuple[int, int, int], rows: int = 2) -> Tensor:
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0))


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, KeyedDropout) or super().is_leaf_module(module, name)


# --------------------------------------------------------------------------------------------------
# Published sizes


@pytest.mark.parametrize(
    ("name", "shape", "count", "multiplications"),
    [
        ("cnn", (1, 8, 8), 38_330, 337_536),
        ("cnn", (3, 32, 32), 136_922, 1_753_728),
        ("lenet", (1, 28, 28), 61_706, 416_520),
        ("lenet", (3, 32, 32), 62_006, 651_720),
        ("vgg5", (3, 32, 32), 582_346, 8_488_192),
        ("vgg8", (3, 32, 32), 1_337_898, 39_683_328),
        ("vgg11", (3, 32, 32), 28_149_514, 171_679_744),
        ("vgg16", (3, 32, 32), 14_728_266, 313_201_664),
        ("resnet32", (3, 32, 32), 464_154, 68_862_592),
        ("resnet18", (3, 32, 32), 11_173_962, 555_422_720),
        ("resnet50", (3, 32, 32), 23_520_842, 1_297_829_888),
        ("mobilenet_v2", (3, 32, 32), 2_236_682, 87_976_448),
        ("mobilenet_v3_small", (3, 32, 32), 1_528_106, 17_507_328),
        ("mobilenet_v3_large", (3, 32, 32), 4_214_842, 66_459_008),
    ],
)
def test_parameters_and_multiplications_are_the_documented_ones(
    name: str, shape: tuple[int, int, int], count: int, multiplications: int
) -> None:
    model = skeleton(SPECS[name], input_shape=shape, num_classes=10)
    assert parameters(model) == count
    assert macs(model, shape) == multiplications


def test_vgg5_spends_its_multiplications_as_fedadapt_lists_them() -> None:
    conv = [32 * 32 * 27 * 32, 16 * 16 * 9 * 32 * 64, 8 * 8 * 9 * 64 * 64]
    linear = [64 * 8 * 8 * 128, 128 * 10]
    assert conv + linear == [884_736, 4_718_592, 2_359_296, 524_288, 1_280]
    model = skeleton(SPECS["vgg5"], input_shape=(3, 32, 32), num_classes=10)
    x = torch.empty(1, 3, 32, 32, device="meta")
    model.eval()
    for unit, expected in zip(model.children(), conv + linear, strict=True):
        with FlopCounterMode(display=False) as counter:
            x = unit(x)
        assert counter.get_total_flops() // 2 == expected


def test_resnet32_has_the_parameters_of_the_papers_closed_form() -> None:
    def stage(inputs: int, width: int, blocks: int = 5) -> int:
        convs = 9 * inputs * width + (2 * blocks - 1) * 9 * width * width
        return convs + 2 * blocks * 2 * width

    closed = 9 * 3 * 16 + 2 * 16 + stage(16, 16) + stage(16, 32) + stage(32, 64) + 64 * 10 + 10
    assert parameters(skeleton(SPECS["resnet32"], input_shape=(3, 32, 32), num_classes=10)) == (
        closed
    )


def test_resnet50_in_its_imagenet_form_has_the_tensors_and_multiplications_of_torchvision() -> None:
    data: dict[str, Any] = {"input_shape": (3, 64, 64), "num_classes": 1000}
    ours = skeleton(SPECS["resnet50"] | {"stem": "imagenet"}, **data)
    theirs = skeleton({"_target_": TORCHVISION, "name": "resnet50"}, **data)
    assert parameters(ours) == 25_557_032
    ours_shapes, their_shapes = (sorted(p.shape for p in m.parameters()) for m in (ours, theirs))
    assert ours_shapes == their_shapes
    assert macs(ours, (3, 64, 64)) == macs(theirs, (3, 64, 64))


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "resnet18"]
)
def test_imagenet_forms_compute_what_torchvision_computes_from_the_same_weights(name: str) -> None:
    data: dict[str, Any] = {"input_shape": (3, 64, 64), "num_classes": 10}
    ours = build(SPECS[name] | {"stem": "imagenet"}, **data, seed=1)
    theirs = skeleton({"_target_": TORCHVISION, "name": name}, **data)
    values = ours.state_dict().values()
    state = dict(zip(theirs.state_dict(), values, strict=True))
    theirs.load_state_dict(state, assign=True)
    x = images((3, 64, 64))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# --------------------------------------------------------------------------------------------------
# Every model of the configuration


def test_every_named_model_has_norm_and_init() -> None:
    assert len(SPECS) == 14
    for name, spec in SPECS.items():
        assert (spec["norm"], spec["init"]) == ("batch", None), name


@pytest.mark.parametrize("name", OWN)
def test_each_model_trains_on_each_shape_and_every_parameter_gets_a_gradient(name: str) -> None:
    for shape in shapes(name):
        model = build(small(name), input_shape=shape, num_classes=7, seed=1)
        with drawing(Address(1), 0, 2):
            out = model(images(shape))
        assert out.shape == (2, 7)
        nn.functional.cross_entropy(out, torch.arange(2)).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", OWN)
def test_each_model_traces_in_training_mode(name: str) -> None:
    shape = (3, 32, 32)
    model = build(small(name), input_shape=shape, num_classes=10, seed=1)
    assert model.training
    traced = torch.fx.GraphModule(model, LeafTracer().trace(model))
    x = images(shape)
    with torch.no_grad(), drawing(Address(1), 0, 2):
        expected = model(x)
    with torch.no_grad(), drawing(Address(1), 0, 2):
        assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("name", OWN)
def test_each_constructor_traces_with_plain_fx_in_training_mode(name: str) -> None:
    arguments = {k: v for k, v in small(name).items() if k not in ("_target_", "norm", "init")}
    constructor = pkgutil.resolve_name(SPECS[name]["_target_"])
    with torch.device("meta"):
        model = constructor((3, 32, 32), 10, **arguments).train()
    traced = torch.fx.symbolic_trace(model)
    assert traced(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", OWN)
def test_each_model_is_a_chain_of_units_without_shared_or_in_place_modules(name: str) -> None:
    model = skeleton(SPECS[name], input_shape=(3, 32, 32), num_classes=10)
    assert isinstance(model, nn.Sequential)
    assert len(list(model.named_modules(remove_duplicate=False))) == len(list(model.modules()))
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    called = [n.target for n in LeafTracer().trace(model).nodes if n.op == "call_module"]
    assert len(called) == len(set(called))


@pytest.mark.parametrize(
    ("name", "units"),
    [("vgg5", 5), ("vgg8", 8), ("vgg11", 11), ("resnet18", 10), ("resnet50", 18), ("resnet32", 17)],
)
def test_models_have_as_many_units_as_the_papers_have_layers_to_cut_between(
    name: str, units: int
) -> None:
    assert len(skeleton(SPECS[name], input_shape=(3, 32, 32), num_classes=10)) == units


@pytest.mark.parametrize("name", OWN)
def test_no_model_draws_from_the_process_wide_generator(name: str) -> None:
    check_keyed(
        build(small(name), input_shape=(3, 32, 32), num_classes=10, seed=1), images((3, 32, 32))
    )


@pytest.mark.parametrize("name", OWN)
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = (
        build(small(name), input_shape=(3, 32, 32), num_classes=10, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_module_that_draws_when_it_is_imported_changes_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first model of a process had other weights than the next, so split training differed.

    The module of the model was imported between the seed and the first draw of the weights.
    """
    source = (
        "import torch\nTABLE = torch.randn(3)\n\n\ndef net():\n    return torch.nn.Linear(4, 2)\n"
    )
    (tmp_path / "draws_at_import.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"_target_": "draws_at_import.net"}
    first, second = (build(spec, input_shape=(1, 2, 2), num_classes=2, seed=3) for _ in range(2))
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name])


@pytest.mark.parametrize("name", OWN)
def test_making_a_skeleton_draws_nothing_and_leaves_torchvision_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **kwargs or {})

    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it now fails
    with Record():
        skeleton(SPECS[name], input_shape=(3, 32, 32), num_classes=10)
    assert called and not [op for op in called if "normal" in op or "uniform" in op]


@pytest.mark.parametrize("norm", ["batch", "deferred", "group", "none"])
@pytest.mark.parametrize("name", OWN)
def test_a_skeleton_has_names_shapes_types_and_mode_of_the_model(name: str, norm: str) -> None:
    spec = small(name) | {"norm": norm, "init": "/ignored"}
    before = torch.random.get_rng_state()
    bare = skeleton(spec, input_shape=(3, 32, 32), num_classes=10)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    assert bare.training
    full = build(spec | {"init": None}, input_shape=(3, 32, 32), num_classes=10, seed=1)

    def kinds(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]

    assert kinds(bare) == kinds(full)
    assert [type(m) for m in bare.modules()] == [type(m) for m in full.modules()]
    bare.load_state_dict(full.state_dict(), assign=True)
    assert all(p.requires_grad for p in bare.parameters())
    x = images((3, 32, 32))
    with torch.no_grad():
        assert torch.equal(bare.eval()(x), full.eval()(x))
    keeps = norm in ("batch", "deferred")
    assert keeps or not any(isinstance(m, _BatchNorm) for m in full.modules())


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet32", "mobilenet_v3_small"])
def test_models_without_batch_norm_still_train(name: str) -> None:
    for norm in ("group", "none"):
        spec = small(name) | {"norm": norm}
        model = build(spec, input_shape=(3, 32, 32), num_classes=10, seed=1)
        with drawing(Address(1), 0, 2):
            out = model(images((3, 32, 32)))
        assert out.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Normalisation


@given(st.integers(1, 4096))
@settings(deadline=None, max_examples=200)
def test_groups_divide_the_channels_within_their_bounds(channels: int) -> None:
    groups = groups_for(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4


def test_common_widths_get_common_groups() -> None:
    assert [groups_for(c) for c in (3, 16, 24, 32, 64, 128, 512, 1280)] == [
        1, 4, 6, 8, 16, 32, 32, 32,
    ]  # fmt: skip


def test_conversion_keeps_names_scale_and_epsilon_and_reaches_shared_layers() -> None:
    shared = nn.BatchNorm1d(8, eps=0.5)
    nn.init.constant_(shared.weight, 3.0)
    model = nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared)
    model.eval()
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    convert_norm(model, "group")
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    assert model[1] is model[3]
    assert isinstance(model[1], nn.GroupNorm) and not model[1].training
    assert model[1].eps == 0.5 and (model[1].weight == 3.0).all()
    assert isinstance(convert_norm(nn.BatchNorm2d(4), "none"), nn.Identity)


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    modules = list(model.modules())
    assert list(convert_norm(model, "none").modules()) == modules


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm=grup: must be one of .*'group'"):
        build(SPECS["cnn"] | {"norm": "grup"}, input_shape=(1, 8, 8), num_classes=10, seed=1)


# --------------------------------------------------------------------------------------------------
# The user's own model


class Users(nn.Module):
    """Has a buffer that is not part of the state, and a tensor as plain attribute."""

    def __init__(self, num_classes: int, depth: int = 1) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.shift = torch.ones(1)
        self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
        self.top = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.layers(x.flatten(1)) * self.scale + self.shift)


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(int(torch.ones(3).sum()))])


def keywords_only(**kwargs: int) -> nn.Module:
    return Users(**kwargs)


def lacks_width(**kwargs: int) -> nn.Module:
    def make(width: int, num_classes: int) -> nn.Module:
        return Users(num_classes, width)

    return make(**kwargs)


def not_a_model(input_shape: tuple[int, int, int]) -> str:
    return f"{input_shape}"


def fails(width: int) -> nn.Module:
    raise TypeError(f"'width' cannot be {width}")


def of(name: str, **keys: object) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{name}", **keys}


DATA: dict[str, Any] = {"input_shape": (1, 2, 2), "num_classes": 3}


def test_a_users_model_gets_only_the_arguments_that_it_names() -> None:
    model = build(of("Users", depth=2), **DATA, seed=1)
    assert len(model.layers) == 2 and model(torch.ones(2, 1, 2, 2)).shape == (2, 3)
    assert build(of("keywords_only", num_classes=5), **DATA, seed=1).top.out_features == 5
    assert build(of("keywords_only"), **DATA, seed=1).top.out_features == 3  # as of the data
    assert build({"_target_": "torch.nn.Identity"}, **DATA, seed=1).training


def test_a_skeleton_keeps_the_values_that_no_state_brings() -> None:
    full = build(of("Users"), **DATA, seed=1)
    bare = skeleton(of("Users"), **DATA)
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    bare.load_state_dict(full.state_dict(), assign=True)
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(bare(x), full(x))


def test_a_skeleton_works_for_constructors_that_compute_with_tensors() -> None:
    bare = skeleton(of("ReadsValues"), **DATA)
    assert len(bare.layers) == 3
    assert all(tensor.is_meta for tensor in bare.state_dict().values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"model\._target_='': must be the dotted path"),
        ({"_target_": "vgg5"}, r"model\._target_='vgg5': must be the dotted path"),
        ({"_target_": "no_such.vgg5"}, r"importing no_such failed: ModuleNotFoundError"),
        ({"_target_": "fedsys.models.vgg.vgg6"}, r"must name a callable .*did you mean 'vgg\d+'"),
        (of("not_a_model"), r"must return a torch\.nn\.Module, and it returned a str"),
        (of("fails", width=3), r"model\.width=3: must suit .*\.fails, which says: 'width'"),
        (of("lacks_width"), r"model\._target_=.*\.lacks_width: must suit .*missing"),
        (of("keywords_only", num_classes=2, dept=1), r"model\.dept=1: must suit .*unexpected"),
        (SPECS["cnn"] | {"dropuot": 0.5}, r"model\.dropuot=0\.5: .*did you mean 'dropout'"),
        (SPECS["cnn"] | {"zzzz": 1}, r"model\.zzzz=1: must be .*it has width, hidden, dropout"),
        (SPECS["cnn"] | {"dropout": 1.5}, r"model\.dropout=1\.5: must be a number from 0 to 1"),
        (SPECS["cnn"] | {"dropout": "much"}, r"model\.dropout=much: must be a number from 0 to 1"),
        (SPECS["cnn"] | {"width": 0}, r"model\.width=0: must be a whole number above 0"),
        (SPECS["cnn"] | {"width": 1.5}, r"model\.width=1\.5: must be a whole number above 0"),
        (SPECS["lenet"], r"model=lenet: must get images of at least 12x12 pixels"),
        (SPECS["vgg5"] | {"hidden": [0]}, r"model\.hidden=0: must be a whole number above 0"),
        (SPECS["vgg5"] | {"hidden": 128}, r"model\.hidden=128: must be a list of widths"),
        (SPECS["mobilenet_v2"] | {"width": -1}, r"model\.width=-1: must be a number above 0"),
        (SPECS["resnet18"] | {"stem": "cifer"}, r"model\.stem=cifer: .*did you mean 'cifar'"),
        (SPECS["resnet32"] | {"shortcut": "a"}, r"model\.shortcut=a: must be one of pad, project"),
    ],
)
def test_a_wrong_specification_is_named_by_its_key(spec: dict[str, Any], message: str) -> None:
    for make in (lambda: build(spec, **DATA, seed=1), lambda: skeleton(spec, **DATA)):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_file_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model_file.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="broken_model_file failed: ZeroDivisionError"):
        build({"_target_": "broken_model_file.Net"}, **DATA, seed=1)


def test_projection_shortcuts_add_exactly_their_convolutions() -> None:
    pad, project = (
        parameters(
            skeleton(
                SPECS["resnet32"] | {"shortcut": kind}, input_shape=(3, 32, 32), num_classes=10
            )
        )
        for kind in ("pad", "project")
    )
    assert project - pad == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


# --------------------------------------------------------------------------------------------------
# Starting from a file


def test_a_model_starts_from_its_own_state(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}
    first = build(SPECS["cnn"], **shape, seed=1)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    spec = SPECS["cnn"] | {"init": str(tmp_path / "model.safetensors")}
    second = build(spec, **shape, seed=2)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert all(p.requires_grad for p in second.parameters())


def test_every_difference_of_an_init_file_is_named(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}
    state = build(SPECS["cnn"], **shape, seed=1).state_dict()
    del state["conv1.norm.weight"], state["conv1.norm.num_batches_tracked"]
    state["extra"] = torch.zeros(3)
    state["fc2.linear.weight"] = torch.zeros(7, 64)
    state["conv2.norm.num_batches_tracked"] = torch.tensor(0.5)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        build(SPECS["cnn"] | {"init": tmp_path / "other.safetensors"}, **shape, seed=1)
    assert str(caught.value).splitlines() == [
        f"model.init={tmp_path}/other.safetensors: does not fit the model, in 5 places:",
        "  conv1.norm.weight: missing, 16 float32",
        "  conv1.norm.num_batches_tracked: missing, scalar int64",
        "  extra: unexpected, 3 float32",
        "  conv2.norm.num_batches_tracked: the model has scalar int64, the file scalar float32",
        "  fc2.linear.weight: the model has 10x64 float32, the file 7x64 float32",
    ]


def test_an_init_file_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}
    absent, damaged = tmp_path / "absent.safetensors", tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=re.escape(f"model.init={absent}: must be")):
        build(SPECS["cnn"] | {"init": absent}, **shape, seed=1)
    with pytest.raises(ModelError, match=re.escape(f"model.init={damaged}: not a readable")):
        build(SPECS["cnn"] | {"init": damaged}, **shape, seed=1)


# --------------------------------------------------------------------------------------------------
# torchvision


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("alexnet", 63),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("efficientnet_b0", 32),
        ("googlenet", 32),
        ("inception_v3", 75),
        ("maxvit_t", 224),
        ("mnasnet0_5", 32),
        ("mobilenet_v3_small", 32),
        ("regnet_x_400mf", 32),
        ("resnet18", 8),
        ("shufflenet_v2_x0_5", 32),
        ("squeezenet1_1", 32),
        ("swin_t", 224),
        ("vgg11_bn", 32),
        ("vit_b_16", 32),
    ],
)
def test_each_family_of_torchvision_gives_one_tensor_in_training(name: str, side: int) -> None:
    spec = {"_target_": TORCHVISION, "name": name}
    model = skeleton(spec, input_shape=(1, side, side), num_classes=7)
    assert model.training
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.p = 0.0  # masks are drawn on the CPU, this model has no values
    out = model(torch.empty(2, 1, side, side, device="meta"))
    assert out.shape == (2, 7)


def test_every_name_of_torchvision_is_known() -> None:
    assert len(torchvision_names()) >= 80
    assert {"resnet18", "vit_b_16", "efficientnet_b0"} <= set(torchvision_names())


def test_a_torchvision_model_repeats_with_the_seed_and_has_keyed_randomness() -> None:
    spec = {"_target_": TORCHVISION, "name": "efficientnet_b0", "stochastic_depth_prob": 0.5}
    before = torch.random.get_rng_state()
    one, two = (build(spec, input_shape=(1, 16, 16), num_classes=3, seed=1) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    check_keyed(one, images((1, 16, 16)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet19", (3, 32, 32), r"model\.name=resnet19: .*did you mean 'resnet1[08]"),
        ("zzzz", (3, 32, 32), r"model\.name=zzzz: .*it knows alexnet, convnext"),
        ("alexnet", (3, 32, 32), r"model\.name=alexnet: must suit images of 32x32 pixels"),
        ("inception_v3", (3, 32, 32), r"model\.name=inception_v3: must suit images of 32x32"),
        ("vit_b_16", (3, 40, 40), r"model\.name=vit_b_16: must suit images of 40x40"),
        ("vit_b_16", (3, 32, 48), r"model\.name=vit_b_16: .*square images only"),
        ("maxvit_t", (3, 32, 32), r"model\.name=maxvit_t: must suit images of 32x32"),
    ],
)
def test_a_torchvision_model_that_does_not_fit_is_named(
    name: str, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        torchvision_classifier(name, num_classes=10, input_shape=shape)


def test_a_model_for_images_says_what_takes_examples_that_are_none() -> None:
    """A table met model=cnn, which said that it had not enough values to unpack, and no more."""
    spec = {"_target_": "fedsys.models.small.cnn"}
    for shape in ((10,), (("int64", 12), ("bool", 12))):
        with pytest.raises(ConfigError, match="no images: model=mlp takes numbers of any shape"):
            build(spec, input_shape=shape, num_classes=2, seed=0)


def test_an_argument_that_torchvision_refuses_is_named() -> None:
    spec = {"_target_": TORCHVISION, "name": "resnet18", "widht": 3}
    with pytest.raises(ConfigError, match=r"model\.widht=3: must suit"):
        build(spec, input_shape=(3, 32, 32), num_classes=10, seed=1)


class Tied(nn.Module):
    """Embedding and head of one weight, and a table that is no part of the state."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.table = nn.Buffer(torch.arange(3.0), persistent=False)


def test_a_model_without_values_shares_what_the_model_shares():
    """Each name had a tensor of its own, and a cut between layers of one weight trained two."""
    spec = {"_target_": f"{__name__}.Tied"}
    made = skeleton(spec, input_shape=(3,), num_classes=7)
    assert made.head.weight is made.words.weight and made.head.weight.is_meta
    assert made.table.tolist() == [0, 1, 2]
