"""What the models are made of: chains of named units, residual blocks, checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.errors import ConfigError, did_you_mean, is_number

Shape = tuple[int, int, int]
"""Channels, height and width of one image."""


def chain(units: Sequence[tuple[str, nn.Module | None]]) -> nn.Sequential:
    """Return the units that are not None as one `nn.Sequential` with these names."""
    model = nn.Sequential()
    for name, unit in units:
        if unit is not None:
            model.add_module(name, unit)
    return model


def dropout_or_none(p: float) -> nn.Dropout | None:
    """Return a dropout, or None where nothing would be dropped."""
    check_probability("model.dropout", p)
    return nn.Dropout(p) if p > 0.0 else None


def conv_norm(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, pool: nn.Module | None = None
) -> nn.Sequential:
    """Return convolution without bias, BatchNorm, ReLU and, if given, a pooling."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return chain(
        [("conv", conv), ("norm", nn.BatchNorm2d(outputs)), ("relu", nn.ReLU()), ("pool", pool)]
    )


class Residual(nn.Module):
    """``after(body(x) + shortcut(x))``, the block of ResNet and, without the rest, of MobileNet.

    Args:
        body: The residual branch.
        shortcut: Carries the input past the branch; the identity if None.
        after: What follows the addition; nothing if None.
    """

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for `x` of shape ``(rows, channels, height, width)``."""
        out: Tensor = self.after(self.body(x) + self.shortcut(x))
        return out


class PadShortcut(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, missing channels filled with zeros.

    Option A of He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 3.3.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.behind = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, inputs, height, width)`` to ``(rows, outputs, height/s, width/s)``."""
        return F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind)
        )


def check_probability(argument: str, value: float) -> None:
    """Raise a ConfigError unless `value` is a number in [0, 1]."""
    if not is_number(value) or not 0.0 <= value <= 1.0:
        raise ConfigError.of(argument, value, "must be a number from 0 to 1")


def check_positive(argument: str, value: float, *, whole: bool = True) -> None:
    """Raise a ConfigError unless `value` is a number above 0, and a whole one if `whole`."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        raise ConfigError.of(argument, value, f"must be a {'whole ' * whole}number above 0")


def check_choice(argument: str, value: str, known: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of `known`."""
    if value not in known:
        hint = did_you_mean(str(value), known).strip()
        raise ConfigError.of(argument, value, f"must be one of {', '.join(known)}", hint)


def check_side(model: str, input_shape: Shape, least: int) -> None:
    """Raise a ConfigError unless both sides of the image have `least` pixels."""
    _, height, width = input_shape
    if min(height, width) < least:
        raise ConfigError.of(
            "model",
            model,
            f"must get images of at least {least}x{least} pixels, and these have {height}x{width}",
            "choose a smaller model such as model=cnn, or larger images",
        )


def initialise(model: nn.Module, mode: str) -> None:
    """Draw convolutions from He's normal distribution and set their biases to zero.

    He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10 (`mode` ``"fan_in"``: the
    variance is kept forwards) or 14 (``"fan_out"``: backwards). Other layers keep PyTorch's.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
