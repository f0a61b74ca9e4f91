"""Where the gradient at zeros of an activation changes nothing, and where it would."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsys.models.blocks import chain
from fedsys.models.fused import building, fuse, fusion_of
from fedsys.models.layers import layered, split
from fedsys.models.rectified import is_rectified


class Functional(nn.Module):
    """A ReLU as a function or a method, with what comes behind it."""

    def __init__(self, behind):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 6, 3, padding=1), nn.LazyLinear(3)
        self.behind = behind

    def forward(self, x):
        return self.fc(self.behind(self.conv(x)).flatten(1))


class Residual(nn.Module):
    """A sum, with a ReLU behind it or in front."""

    def __init__(self, last):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc, self.last = nn.LazyLinear(3), last

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.conv(x) + x) if self.last else F.relu(self.conv(x)) + x
        return self.fc(x.flatten(1))


def behind_conv(*modules):
    return chain(
        [("conv", nn.Conv2d(2, 6, 3, padding=1))]
        + [(f"m{i}", module) for i, module in enumerate(modules)]
        + [("flat", nn.Flatten()), ("fc", nn.LazyLinear(3))]
    )


NORM = nn.BatchNorm2d(6)
RECTIFIED = {
    "ReLU": behind_conv(nn.ReLU()),
    "in place": behind_conv(NORM, nn.ReLU(inplace=True)),
    "ReLU6": behind_conv(NORM, nn.ReLU6()),
    "pooled": behind_conv(NORM, nn.ReLU(), nn.MaxPool2d(2)),
    "pooled, overlapping": behind_conv(nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
    "ReLU6, pooled": behind_conv(NORM, nn.ReLU6(), nn.MaxPool2d(2)),
    "pooled first": behind_conv(nn.MaxPool2d(2), nn.ReLU()),
    "twice": behind_conv(nn.ReLU(), nn.Identity(), nn.ReLU(), nn.Identity()),
    "F.relu": Functional(F.relu),
    "torch.relu": Functional(torch.relu),
    "method": Functional(lambda x: x.relu()),
    "reshaped": Functional(lambda x: x.relu().reshape(x.shape[0], 3, -1)),
    "residual": Residual(last=True),
}
NOT = {
    "nothing": behind_conv(),
    "norm behind": behind_conv(nn.ReLU(), NORM),
    "norm": behind_conv(NORM),
    "leaky": behind_conv(nn.LeakyReLU()),
    "GELU": behind_conv(nn.GELU()),
    "hardswish": behind_conv(nn.Hardswish()),
    "average": behind_conv(nn.ReLU(), nn.AvgPool2d(2)),
    "dropout": behind_conv(nn.ReLU(), nn.Dropout(0.5)),
    "pool alone": behind_conv(nn.MaxPool2d(2)),
    "shifted": Functional(lambda x: x.relu() - 0.5),
    "residual in front": Residual(last=False),
}


def ready(model):
    model(torch.zeros(2, 2, 8, 8))
    return model


def last_cut(layers):
    return len(layers) - 1


@pytest.mark.parametrize("name", RECTIFIED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_whatever_comes_for_zeros_leaves_the_same_bits(name, layout, kernels):
    model = ready(copy.deepcopy(RECTIFIED[name]))
    layers = layered(model, (2, 8, 8))
    cut = last_cut(layers)
    assert is_rectified(layers, cut)
    front, _ = split(layers, cut)
    front.to(memory_format=layout)
    if kernels == "fused":
        if not building.compiler():
            pytest.skip("there is no C compiler")
        fuse(front, fusion_of(layers))
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    z = front(x * 3)
    gradient = torch.randn_like(z)
    assert 0 < int((z == 0).sum()) < z.numel()

    def left(came):
        wanted = [x, *front.parameters()]
        return [g.view(torch.int32) for g in torch.autograd.grad(z, wanted, came, True)]

    whole = left(gradient)
    for other in (0.0, -7.0, math.nan, math.inf):
        got = left(torch.where(z == 0, other, gradient))
        assert all(map(torch.equal, got, whole))


@pytest.mark.parametrize("name", NOT)
def test_behind_anything_else_zeros_need_a_gradient(name):
    layers = layered(ready(copy.deepcopy(NOT[name])), (2, 8, 8))
    assert not is_rectified(layers, last_cut(layers))


def test_neither_an_input_nor_the_output_is_rectified():
    layers = layered(ready(copy.deepcopy(RECTIFIED["pooled"])), (2, 8, 8))
    assert not is_rectified(layers, 0)
    assert not is_rectified(layers, len(layers))
