"""VGG for small images, in the forms of FedAdapt, PiPar and DNNShifter.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, with a BatchNorm after each convolution. A unit is a convolution with all that follows it up
to the next one, or a linear layer: these are the offloading points of the papers.

Parameters and multiply-accumulates (MACs) of one 3x32x32 image with 10 classes:

======  ==========  ===========  ==================================================
model   parameters  MACs         published with
======  ==========  ===========  ==================================================
vgg5       582,346    8,488,192  FedAdapt (Wu et al., IEEE IoT-J 2022), FedFly, PiPar
vgg8     1,337,898   39,683,328  FedAdapt, PiPar (Zhang et al., JPDC 2024)
vgg11   28,149,514  171,679,744  PiPar
vgg16   14,728,266  313,201,664  DNNShifter (Eccles et al., FGCS 2024)
======  ==========  ===========  ==================================================

Maps of odd size are rounded up when they are halved, so every image size works; at 32x32 this is
the papers' arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import nn

from fedsys.errors import ConfigError
from fedsys.models.blocks import Shape, chain, check_positive, dropout_or_none, initialise

_VGG5 = (32, "M", 64, "M", 64)
_VGG8 = (32, 32, "M", 64, 64, "M", 128, 128)
_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
_VGG16 = (64, 64, "M", 128, 128, "M", *3 * (256,), "M", *3 * (512,), "M", *3 * (512,), "A")


def vgg5(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: Sequence[int] = (128,),
    fc_relu: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return VGG-5: three convolutions and two linear layers without a ReLU between them.

    Args:
        input_shape: Channels, height and width.
        num_classes: Number of outputs.
        hidden: Outputs of the linear layers before the last.
        fc_relu: Put a ReLU behind each of these.
        dropout: Probability of dropping an output of each of these.
    """
    return _vgg(_VGG5, input_shape, num_classes, hidden, fc_relu, dropout)


def vgg8(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: Sequence[int] = (128,),
    fc_relu: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return VGG-8: six convolutions and two linear layers. Arguments as for `vgg5`."""
    return _vgg(_VGG8, input_shape, num_classes, hidden, fc_relu, dropout)


def vgg11(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: Sequence[int] = (4096, 4096),
    fc_relu: bool = True,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Return VGG-11: eight convolutions and three linear layers. Arguments as for `vgg5`.

    PiPar's released code leaves out the ReLUs between the linear layers, the VGG paper has them.
    """
    return _vgg(_VGG11, input_shape, num_classes, hidden, fc_relu, dropout)


def vgg16(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: Sequence[int] = (),
    fc_relu: bool = True,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return VGG-16: 13 convolutions, an average over the map, one linear layer.

    PiPar's form has ``hidden=(4096, 4096)`` and ``dropout=0.5`` instead. Arguments as for `vgg5`.
    """
    return _vgg(_VGG16, input_shape, num_classes, hidden, fc_relu, dropout)


def _vgg(
    plan: Sequence[int | str],
    input_shape: Shape,
    num_classes: int,
    hidden: Sequence[int],
    fc_relu: bool,
    dropout: float,
) -> nn.Sequential:
    """Return the chain of `plan`: a width is a convolution, M a halving, A an average over all."""
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ConfigError.of("model.hidden", hidden, "must be a list of widths, for instance [128]")
    units: list[tuple[str, nn.Module | None]] = []
    channels, height, width = input_shape
    for index, item in enumerate(plan):
        if isinstance(item, str):
            continue
        after = plan[index + 1] if index + 1 < len(plan) else 0
        pool: nn.Module | None = None
        if after == "M":
            pool = nn.MaxPool2d(2, ceil_mode=True)
            height, width = -(-height // 2), -(-width // 2)
        elif after == "A":
            pool = nn.AdaptiveAvgPool2d(1)
            height = width = 1
        conv = nn.Conv2d(channels, item, 3, padding=1)
        norm = nn.BatchNorm2d(item)
        layers = [("conv", conv), ("norm", norm), ("relu", nn.ReLU()), ("pool", pool)]
        units.append((f"conv{len(units) + 1}", chain(layers)))
        channels = item
    widths = (channels * height * width, *hidden, num_classes)
    model = chain([*units, *_linear(widths, fc_relu, dropout)])
    initialise(model, "fan_in")
    return model


def _linear(
    widths: Sequence[int], fc_relu: bool, dropout: float
) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield the linear units of some widths, from that of the features to that of the classes."""
    for position, (features, outputs) in enumerate(pairwise(widths), start=1):
        check_positive("model.hidden", outputs)
        last = position == len(widths) - 1
        layers = [
            ("flatten", nn.Flatten() if position == 1 else None),
            ("linear", nn.Linear(features, outputs)),
            ("relu", nn.ReLU() if fc_relu and not last else None),
            ("dropout", None if last else dropout_or_none(dropout)),
        ]
        yield f"fc{position}", chain(layers)
