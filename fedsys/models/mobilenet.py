"""MobileNet for small images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2, and
Howard et al., "Searching for MobileNetV3", ICCV 2019, tables 1 and 2. The ``cifar`` form leaves out
the first two of the five halvings, so that a 32x32 image ends in a 4x4 map instead of one pixel;
the ``imagenet`` form has all five, as PiPar does. Parameters do not depend on it. A unit is the
stem, an inverted residual block, the last convolution with its pooling, or the classifier.

Parameters and multiply-accumulates (MACs) of one 3x32x32 image with 10 classes, ``cifar`` form:

==================  ==========  ==========
model               parameters  MACs
==================  ==========  ==========
mobilenet_v2         2,236,682  87,976,448
mobilenet_v3_small   1,528,106  17,507,328
mobilenet_v3_large   4,214,842  66,459,008
==================  ==========  ==========

BatchNorm in V3 has the paper's epsilon and PyTorch's momentum of 0.1 rather than 0.01: the few
steps of a federated round would hardly move its statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fedsys.models.blocks import (
    Residual,
    Shape,
    chain,
    check_choice,
    check_positive,
    dropout_or_none,
    initialise,
)

Layer = Callable[..., nn.Module]


class _Block(NamedTuple):
    """One row of the papers' tables; all widths in channels."""

    kernel: int
    expanded: int
    outputs: int
    excite: bool
    activation: Layer
    stride: int


_RE, _HS, _R6 = nn.ReLU, nn.Hardswish, nn.ReLU6

_V3_SMALL = (
    _Block(3, 16, 16, True, _RE, 2),
    _Block(3, 72, 24, False, _RE, 2),
    _Block(3, 88, 24, False, _RE, 1),
    _Block(5, 96, 40, True, _HS, 2),
    _Block(5, 240, 40, True, _HS, 1),
    _Block(5, 240, 40, True, _HS, 1),
    _Block(5, 120, 48, True, _HS, 1),
    _Block(5, 144, 48, True, _HS, 1),
    _Block(5, 288, 96, True, _HS, 2),
    _Block(5, 576, 96, True, _HS, 1),
    _Block(5, 576, 96, True, _HS, 1),
)

_V3_LARGE = (
    _Block(3, 16, 16, False, _RE, 1),
    _Block(3, 64, 24, False, _RE, 2),
    _Block(3, 72, 24, False, _RE, 1),
    _Block(5, 72, 40, True, _RE, 2),
    _Block(5, 120, 40, True, _RE, 1),
    _Block(5, 120, 40, True, _RE, 1),
    _Block(3, 240, 80, False, _HS, 2),
    _Block(3, 200, 80, False, _HS, 1),
    _Block(3, 184, 80, False, _HS, 1),
    _Block(3, 184, 80, False, _HS, 1),
    _Block(3, 480, 112, True, _HS, 1),
    _Block(3, 672, 112, True, _HS, 1),
    _Block(5, 672, 160, True, _HS, 2),
    _Block(5, 960, 160, True, _HS, 1),
    _Block(5, 960, 160, True, _HS, 1),
)

# (expansion factor, output channels, repeats, stride of the first repeat)
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    input_shape: Shape,
    num_classes: int,
    *,
    width: float = 1.0,
    stem: str = "cifar",
    dropout: float = 0.2,
) -> nn.Sequential:
    """Return MobileNetV2.

    Args:
        input_shape: Channels, height and width.
        num_classes: Number of outputs.
        width: Factor on all numbers of channels; they are rounded to multiples of eight.
        stem: ``"cifar"`` or ``"imagenet"``, see above.
        dropout: Probability of dropping an input of the last layer.
    """
    check_positive("model.width", width, whole=False)
    blocks: list[_Block] = []
    channels = _eights(32 * width)
    for factor, outputs, repeats, stride in _V2_STAGES:
        for repeat in range(repeats):
            block = _Block(
                3,
                factor * channels,
                _eights(outputs * width),
                False,
                _R6,
                stride if repeat == 0 else 1,
            )
            blocks.append(block)
            channels = block.outputs
    features = _eights(1280 * max(1.0, width))
    classifier = [
        ("dropout", dropout_or_none(dropout)),
        ("linear", nn.Linear(features, num_classes)),
    ]
    return _mobilenet(
        blocks, _eights(32 * width), features, _R6, nn.BatchNorm2d, input_shape, stem, classifier
    )


def mobilenet_v3_small(
    input_shape: Shape,
    num_classes: int,
    *,
    width: float = 1.0,
    stem: str = "cifar",
    dropout: float = 0.2,
) -> nn.Sequential:
    """Return MobileNetV3-Small. Arguments as for `mobilenet_v2`."""
    return _mobilenet_v3(_V3_SMALL, 1024, input_shape, num_classes, width, stem, dropout)


def mobilenet_v3_large(
    input_shape: Shape,
    num_classes: int,
    *,
    width: float = 1.0,
    stem: str = "cifar",
    dropout: float = 0.2,
) -> nn.Sequential:
    """Return MobileNetV3-Large. Arguments as for `mobilenet_v2`."""
    return _mobilenet_v3(_V3_LARGE, 1280, input_shape, num_classes, width, stem, dropout)


def _mobilenet_v3(
    table: Sequence[_Block],
    last: int,
    input_shape: Shape,
    num_classes: int,
    width: float,
    stem: str,
    dropout: float,
) -> nn.Sequential:
    check_positive("model.width", width, whole=False)
    blocks = [
        row._replace(expanded=_eights(row.expanded * width), outputs=_eights(row.outputs * width))
        for row in table
    ]
    features, hidden = 6 * blocks[-1].outputs, _eights(last * width)
    classifier = [
        ("hidden", nn.Linear(features, hidden)),
        ("activation", nn.Hardswish()),
        ("dropout", dropout_or_none(dropout)),
        ("linear", nn.Linear(hidden, num_classes)),
    ]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return _mobilenet(
        blocks, _eights(16 * width), features, _HS, norm, input_shape, stem, classifier
    )


def _mobilenet(
    blocks: Sequence[_Block],
    first: int,
    features: int,
    activation: Layer,
    norm: Layer,
    input_shape: Shape,
    stem: str,
    classifier: Sequence[tuple[str, nn.Module | None]],
) -> nn.Sequential:
    check_choice("model.stem", stem, ("cifar", "imagenet"))
    to_skip = 2 if stem == "cifar" else 0  # halvings still to leave out, the stem's being the first
    conv = _conv(input_shape[0], first, 3, 1 if to_skip else 2, norm, activation)
    units: list[tuple[str, nn.Module | None]] = [("stem", conv)]
    to_skip -= 1
    channels = first
    for block in blocks:
        stride = block.stride
        if stride == 2 and to_skip > 0:
            stride, to_skip = 1, to_skip - 1
        unit = _inverted_residual(channels, block._replace(stride=stride), norm)
        units.append((f"block{len(units)}", unit))
        channels = block.outputs
    top = [
        ("conv", _conv(channels, features, 1, 1, norm, activation)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    model = chain([*units, ("top", chain(top)), ("classifier", chain(classifier))])
    initialise(model, "fan_out")
    return model


def _inverted_residual(inputs: int, block: _Block, norm: Layer) -> nn.Module:
    wide, act = block.expanded, block.activation
    expand = _conv(inputs, wide, 1, 1, norm, act) if wide != inputs else None
    depthwise = _conv(wide, wide, block.kernel, block.stride, norm, act, groups=wide)
    excite = SqueezeExcite(wide, _eights(wide // 4)) if block.excite else None
    project = _conv(wide, block.outputs, 1, 1, norm, None)
    body = chain(
        [("expand", expand), ("depthwise", depthwise), ("excite", excite), ("project", project)]
    )
    return Residual(body) if block.stride == 1 and inputs == block.outputs else body


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from the averages of all channels.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, section 3, with the hard sigmoid of
    MobileNetV3. Not torchvision's, whose import takes a device's process seconds.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = chain(
            [
                ("pool", nn.AdaptiveAvgPool2d(1)),
                ("squeeze", nn.Conv2d(channels, squeezed, 1)),
                ("relu", nn.ReLU()),
                ("excite", nn.Conv2d(squeezed, channels, 1)),
                ("sigmoid", nn.Hardsigmoid()),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of shape ``(rows, channels, height, width)``, scaled."""
        out: Tensor = x * self.gate(x)
        return out


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    norm: Layer,
    activation: Layer | None,
    groups: int = 1,
) -> nn.Module:
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    after = None if activation is None else activation()
    return chain([("conv", conv), ("norm", norm(outputs)), ("activation", after)])


def _eights(channels: float) -> int:
    """Round to a multiple of eight, at least 8, without going below nine tenths of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
