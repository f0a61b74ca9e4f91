import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsys.models.shapes import module_for, result_of

CASES = [
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4, bias=False), (2, 5, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), bias=False), (2, 4, 8, 9)),
    (nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=4), (2, 4, 9, 9)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    (nn.MaxPool1d(2), (2, 3, 7)),
    (nn.MaxPool2d(3, stride=2, padding=1), (2, 3, 9, 8)),
    (nn.MaxPool2d(2, dilation=2), (2, 3, 9, 8)),
    (nn.MaxPool2d(2, ceil_mode=True), (2, 3, 7, 8)),
    (nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True), (2, 3, 6, 7)),
    (nn.AvgPool2d(2, stride=2, padding=1, ceil_mode=True), (2, 3, 5, 6)),
    (nn.MaxPool3d(2), (2, 3, 4, 5, 6)),
    (nn.AvgPool1d(3, stride=1, padding=1), (2, 3, 8)),
    (nn.AvgPool2d((2, 3)), (2, 3, 8, 9)),
    (nn.AvgPool3d(2), (2, 3, 4, 5, 6)),
    (nn.AdaptiveAvgPool1d(3), (2, 3, 8)),
    (nn.AdaptiveAvgPool2d((None, 2)), (2, 3, 8, 9)),
    (nn.AdaptiveAvgPool2d(1), (2, 3, 8, 9)),
    (nn.AdaptiveMaxPool2d((2, 2)), (2, 3, 8, 9)),
    (nn.AdaptiveAvgPool3d(2), (2, 3, 4, 5, 6)),
]


@pytest.mark.parametrize(("module", "shape"), CASES, ids=lambda value: str(value))
def test_shape_and_work_are_those_that_torch_finds_by_computing(module, shape):
    with FlopCounterMode(display=False) as counter:
        out = module(torch.ones(shape))
    assert result_of(module, shape) == (tuple(out.shape), counter.get_total_flops() // 2)


class Doubled(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Doubled(3, 4), (2, 3)),  # a subclass may do anything
        (nn.Linear(3, 4), (2, 4)),
        (nn.Conv2d(3, 4, 3), (2, 5, 8, 8)),
        (nn.Conv2d(3, 4, 3), (2, 3, 2, 2)),
        (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 8, 8)),
        (nn.Conv2d(3, 4, 3), (3, 8, 8)),  # without a batch
        (nn.MaxPool2d(2, return_indices=True), (2, 3, 8, 8)),
        (nn.MaxPool2d(9), (2, 3, 8, 8)),
        (nn.AdaptiveMaxPool2d(2, return_indices=True), (2, 3, 8, 8)),
        (nn.ReLU(), (2, 3)),
    ],
    ids=str,
)
def test_what_has_no_formula_is_left_to_torch(module, shape):
    assert result_of(module, shape) is None


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (F.max_pool2d, (2,), {}),
        (F.max_pool2d, (3, 2, 1), {}),
        (F.avg_pool2d, (2,), {"stride": 1}),
        (F.adaptive_avg_pool2d, ((1, 2),), {}),
    ],
)
def test_functions_have_the_shapes_of_their_modules(function, args, kwargs):
    module = module_for(function, args, kwargs)
    expected = function(torch.ones(2, 3, 9, 8), *args, **kwargs)
    assert result_of(module, (2, 3, 9, 8)) == (tuple(expected.shape), 0)


def test_an_unknown_function_has_no_module():
    assert module_for(F.relu, (), {}) is None
