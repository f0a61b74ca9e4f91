"""ResNet for small images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The ``cifar`` stem keeps the
size of the image (3x3, stride 1); the ``imagenet`` stem quarters it (7x7 with stride 2, then
max-pooling), which PiPar and DNNShifter use on 32x32 and 64x64 as well. A unit is the stem, a
residual block or the head.

Parameters and multiply-accumulates (MACs) of one 3x32x32 image with 10 classes, ``cifar`` stem:

========  ==========  =============
model     parameters  MACs
========  ==========  =============
resnet32     464,154     68,862,592
resnet18  11,173,962    555,422,720
resnet50  23,520,842  1,297,829,888
========  ==========  =============
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fedsys.models.blocks import (
    PadShortcut,
    Residual,
    Shape,
    chain,
    check_choice,
    check_positive,
    conv_norm,
    dropout_or_none,
    initialise,
)

Shortcut = Callable[[int, int, int], nn.Module]
"""Makes a shortcut from (input channels, output channels, stride)."""

Block = Callable[[int, int, int, Shortcut], tuple[nn.Module, int]]
"""Makes (block, its output channels) from (input channels, width, stride, shortcut)."""


def resnet18(
    input_shape: Shape,
    num_classes: int,
    *,
    width: int = 64,
    stem: str = "cifar",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return ResNet-18: four stages of two basic blocks (section 4.1, table 1).

    Args:
        input_shape: Channels, height and width.
        num_classes: Number of outputs.
        width: Channels of the first stage; each further stage has twice as many.
        stem: ``"cifar"`` or ``"imagenet"``.
        dropout: Probability of dropping an input of the last layer.
    """
    return _resnet(_basic, (2, 2, 2, 2), _project, input_shape, num_classes, width, stem, dropout)


def resnet50(
    input_shape: Shape,
    num_classes: int,
    *,
    width: int = 64,
    stem: str = "cifar",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return ResNet-50: stages of 3, 4, 6 and 3 bottleneck blocks; the 3x3 convolution strides.

    Arguments as for `resnet18`.
    """
    return _resnet(
        _bottleneck, (3, 4, 6, 3), _project, input_shape, num_classes, width, stem, dropout
    )


def resnet32(
    input_shape: Shape,
    num_classes: int,
    *,
    width: int = 16,
    shortcut: str = "pad",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return ResNet-32 for CIFAR-10: ``6 n + 2`` layers with n = 5 (section 4.2).

    Args:
        input_shape: Channels, height and width.
        num_classes: Number of outputs.
        width: Channels of the first stage; each further stage has twice as many.
        shortcut: Where a stage begins: ``"pad"`` without parameters as in the paper (option A), or
            ``"project"`` by a 1x1 convolution (option B), which structured pruning can follow.
        dropout: Probability of dropping an input of the last layer.
    """
    check_choice("model.shortcut", shortcut, ("pad", "project"))
    link = PadShortcut if shortcut == "pad" else _project
    return _resnet(_basic, (5, 5, 5), link, input_shape, num_classes, width, "cifar", dropout)


def _resnet(
    block: Block,
    stages: Sequence[int],
    shortcut: Shortcut,
    input_shape: Shape,
    num_classes: int,
    width: int,
    stem: str,
    dropout: float,
) -> nn.Sequential:
    check_positive("model.width", width)
    check_choice("model.stem", stem, ("cifar", "imagenet"))
    if stem == "cifar":
        first = conv_norm(input_shape[0], width, 3)
    else:
        first = conv_norm(input_shape[0], width, 7, stride=2, pool=nn.MaxPool2d(3, 2, padding=1))
    units: list[tuple[str, nn.Module | None]] = [("stem", first)]
    channels = width
    for stage, repeats in enumerate(stages):
        for repeat in range(repeats):
            stride = 2 if stage > 0 and repeat == 0 else 1
            unit, channels = block(channels, width * 2**stage, stride, shortcut)
            units.append((f"block{len(units)}", unit))
    head = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("dropout", dropout_or_none(dropout)),
        ("linear", nn.Linear(channels, num_classes)),
    ]
    model = chain([*units, ("head", chain(head))])
    initialise(model, "fan_out")
    return model


def _project(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return chain([("conv", conv), ("norm", nn.BatchNorm2d(outputs))])


def _basic(inputs: int, width: int, stride: int, shortcut: Shortcut) -> tuple[nn.Module, int]:
    body = chain(
        [
            ("conv1", nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)),
            ("norm1", nn.BatchNorm2d(width)),
            ("relu1", nn.ReLU()),
            ("conv2", nn.Conv2d(width, width, 3, padding=1, bias=False)),
            ("norm2", nn.BatchNorm2d(width)),
        ]
    )
    return _residual(body, inputs, width, stride, shortcut), width


def _bottleneck(inputs: int, width: int, stride: int, shortcut: Shortcut) -> tuple[nn.Module, int]:
    outputs = 4 * width
    body = chain(
        [
            ("conv1", nn.Conv2d(inputs, width, 1, bias=False)),
            ("norm1", nn.BatchNorm2d(width)),
            ("relu1", nn.ReLU()),
            ("conv2", nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)),
            ("norm2", nn.BatchNorm2d(width)),
            ("relu2", nn.ReLU()),
            ("conv3", nn.Conv2d(width, outputs, 1, bias=False)),
            ("norm3", nn.BatchNorm2d(outputs)),
        ]
    )
    return _residual(body, inputs, outputs, stride, shortcut), outputs


def _residual(
    body: nn.Module, inputs: int, outputs: int, stride: int, shortcut: Shortcut
) -> Residual:
    same = stride == 1 and inputs == outputs
    return Residual(body, None if same else shortcut(inputs, outputs, stride), nn.ReLU())
