"""Two small models: the default of the main job, and LeNet-5."""

from __future__ import annotations

from torch import nn

from fedsys.models.blocks import (
    Shape,
    chain,
    check_positive,
    check_side,
    conv_norm,
    dropout_or_none,
)


def cnn(
    input_shape: Shape,
    num_classes: int,
    *,
    width: int = 16,
    hidden: int = 64,
    dropout: float = 0.25,
) -> nn.Sequential:
    """Return the default model: two convolutions with BatchNorm, two linear layers with dropout.

    38,330 parameters and 337,536 multiply-accumulates on the 1x8x8 digits; images of 16 pixels and
    more are halved once more, which gives 136,922 and 1,753,728 on 3x32x32.

    Args:
        input_shape: Channels, height and width; at least 2x2 pixels.
        num_classes: Number of outputs.
        width: Channels of the first convolution; the second has twice as many.
        hidden: Outputs of the first linear layer.
        dropout: Probability of dropping an input of the last layer.
    """
    check_positive("model.width", width)
    check_positive("model.hidden", hidden)
    check_side("cnn", input_shape, 2)
    channels, *sides = input_shape
    halve_early = min(sides) >= 16
    shrink = 4 if halve_early else 2
    flat = 2 * width * (sides[0] // shrink) * (sides[1] // shrink)
    fc1 = [("flatten", nn.Flatten()), ("linear", nn.Linear(flat, hidden)), ("relu", nn.ReLU())]
    fc2 = [("dropout", dropout_or_none(dropout)), ("linear", nn.Linear(hidden, num_classes))]
    return chain(
        [
            ("conv1", conv_norm(channels, width, 3, pool=nn.MaxPool2d(2) if halve_early else None)),
            ("conv2", conv_norm(width, 2 * width, 3, pool=nn.MaxPool2d(2))),
            ("fc1", chain(fc1)),
            ("fc2", chain(fc2)),
        ]
    )


def lenet(input_shape: Shape, num_classes: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Return LeNet-5 with ReLU and max-pooling instead of tanh and trained subsampling.

    LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE
    1998, section II.B. Images below 32 pixels are padded by two, as the paper centres 28x28 digits
    in 32x32. 61,706 parameters and 416,520 multiply-accumulates on 1x28x28; 62,006 and 651,720 on
    3x32x32.

    Args:
        input_shape: Channels, height and width; at least 12x12 pixels.
        num_classes: Number of outputs.
        dropout: Probability of dropping an input of the last layer; the paper has none.
    """
    check_side("lenet", input_shape, 12)
    channels, height, width = input_shape
    padding = 2 if min(height, width) < 32 else 0

    def side(pixels: int) -> int:
        return ((pixels + 2 * padding - 4) // 2 - 4) // 2

    def conv(inputs: int, outputs: int, pad: int) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, 5, padding=pad)
        return chain([("conv", layer), ("relu", nn.ReLU()), ("pool", nn.MaxPool2d(2))])

    flat = 16 * side(height) * side(width)
    fc1 = [("flatten", nn.Flatten()), ("linear", nn.Linear(flat, 120)), ("relu", nn.ReLU())]
    fc2 = [("linear", nn.Linear(120, 84)), ("relu", nn.ReLU())]
    fc3 = [("dropout", dropout_or_none(dropout)), ("linear", nn.Linear(84, num_classes))]
    return chain(
        [
            ("conv1", conv(channels, 6, padding)),
            ("conv2", conv(6, 16, 0)),
            ("fc1", chain(fc1)),
            ("fc2", chain(fc2)),
            ("fc3", chain(fc3)),
        ]
    )
