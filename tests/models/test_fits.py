"""What does not fit the data is said in one sentence before training, and lazy layers just work.

``_target_: torchvision.models.resnet18`` takes the number of classes in its ``**kwargs``; it was
not passed, and a model of 1,000 outputs was trained, pruned and served for ten classes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys import models
from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.models.fits import check_fits
from fedsys.models.layers import layered
from fedsys.models.text import Gpt
from fedsys.transport.several import Several
from tests import own_work

HERE = "tests.models.test_fits"
SHAPE = (1, 8, 8)


class Base(nn.Module):
    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class Lazy(nn.Module):
    """Sizes come from the first images; the BatchNorm is one that ``model.norm`` may exchange."""

    def __init__(self, *, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()
        self.drop, self.fc = nn.Dropout(dropout), nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.norm(self.conv(x))).flatten(1)))


class LazyLeftOut(Lazy):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).flatten(1)


class TwoInputs(Base):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class WrongSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(400, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class WrongChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Named(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x), "features": x}


class Auxiliary(Base):
    """Two outputs in training only, as Inception."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = super().forward(x)
        return (out, out) if self.training else out


class Map(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, None, None]


class Chosen(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round().long()


def fixed_head(outputs: int = 1000) -> nn.Module:
    return Base(num_classes=outputs)


def passed_on(**kwargs: int) -> nn.Module:
    return Base(**kwargs)


def not_passed_on(**kwargs: int) -> nn.Module:
    return fixed_head(**kwargs)


def swallowed(**_: int) -> nn.Module:
    return fixed_head()


def built(name: str, num_classes: int = 10, **arguments: object) -> nn.Module:
    spec = {"_target_": f"{HERE}.{name}", **arguments}
    return models.build(spec, input_shape=SHAPE, num_classes=num_classes, seed=0)


def example() -> Tensor:
    return torch.linspace(-1, 1, 2 * 64).reshape(2, *SHAPE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("TwoInputs", r"model=TwoInputs: must take one tensor.*\(x, scale\); give scale a default"),
        ("WrongSize", r"model=WrongSize: must accept images of shape \(1, 8, 8\).*400.*data.size"),
        ("WrongChannels", r"must accept images of shape \(1, 8, 8\).*3 channels.*data.channels"),
        ("Named", "returns a dict; return one entry of it: it has logits, features"),
        ("Auxiliary", "returns a tuple of 2; return its first element alone, and switch aux"),
        ("Map", r"has 4 dimensions: \(2, 10, 1, 1\); pool and flatten it"),
        ("Chosen", "returns torch.int64; return the logits"),
        ("fixed_head", r"\(batch, 10\).*has 1000 outputs; .* model.<argument>=10"),
        ("swallowed", "has 1000 outputs"),
        ("not_passed_on", "has 1000 outputs"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(name: str, says: str) -> None:
    model = built(name)
    with pytest.raises(ConfigError, match=says) as refused:
        check_fits(model, example(), (10,))
    assert "\n" not in str(refused.value)


TOKENS = torch.arange(22).reshape(2, 11)
GPT = Gpt((8,), 30, width=8, depth=1, heads=2)


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        # were told of images, channels and pixels
        (nn.Embedding(9, 3), TOKENS, r"tokens of shape \(11,\), here up to 21, .*num_classes rows"),
        (
            Gpt((8,), 30, width=8, depth=1, heads=2),
            TOKENS,
            r"tokens of shape \(11,\).*and places for",
        ),
        (nn.Linear(3, 2), torch.zeros(2, 4), r"must accept examples of shape \(4,\).*its layers"),
        (own_work.Masked(2), Several((TOKENS, TOKENS)), r"must accept inputs 11 \(int64\) and 11"),
    ],
)
def test_what_other_models_cannot_take_is_called_what_it_is(
    model: nn.Module, given: Tensor | Several, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_fits(model, given, (2,))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Base", {}), ("passed_on", {}), ("fixed_head", {"outputs": 10}), ("Lazy", {})],
)
def test_what_fits_is_accepted_and_left_as_it_was(name: str, arguments: dict[str, object]) -> None:
    model = built(name, **arguments)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_fits(model, example(), (10,))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_constructors_of_torchvision_by_dotted_path_get_the_number_of_classes() -> None:
    for spec in (
        {"_target_": "torchvision.models.squeezenet1_1"},
        {"_target_": "torchvision.models.get_model", "name": "squeezenet1_1"},
    ):
        shape = (3, 32, 32)
        model = models.build(spec, input_shape=shape, num_classes=10, seed=0)
        check_fits(model, torch.zeros(2, *shape), (10,))
        skeleton = models.skeleton(spec, input_shape=shape, num_classes=10)
        assert skeleton.get_parameter("classifier.1.weight").shape[0] == 10


def test_a_model_that_does_not_fit_ends_the_command_before_training(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    made = ("model=lenet", f"model._target_={HERE}.WithDropout", f"run.dir={run}")
    assert main(["train", *made, "data=synthetic", "num_clients=2", "rounds=1"]) == 2
    assert "has 1000 outputs" in capsys.readouterr().err
    assert not (run / "metrics.csv").exists()


def WithDropout(dropout: float) -> nn.Module:
    return fixed_head()


# --------------------------------------------------------------------------------------------------
# Lazy layers


@pytest.mark.parametrize("norm", ["batch", "deferred", "group"])
def test_lazy_layers_have_the_same_sizes_and_names_with_values_and_without(norm: str) -> None:
    model = built("Lazy", norm=norm)
    spec = {"_target_": f"{HERE}.Lazy", "norm": norm}
    skeleton = models.skeleton(spec, input_shape=SHAPE, num_classes=10)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    shapes = {name: value.shape for name, value in skeleton.state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
    assert shapes["fc.weight"] == (10, 8 * 6 * 6)
    again = built("Lazy", norm=norm)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(layered(skeleton, SHAPE)) == 2


def test_a_lazy_layer_that_no_image_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves out fc.weight"):
        built("LazyLeftOut")
