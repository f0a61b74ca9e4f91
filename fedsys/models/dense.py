"""A perceptron for tables: linear layers with ReLU between them."""

from __future__ import annotations

import math

from torch import nn

from fedsys.models.blocks import check_positive, dropout_or_none


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: int = 64,
    depth: int = 2,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return a perceptron.

    Args:
        input_shape: Of an example; it is flattened if it has several dimensions.
        num_classes: Number of outputs.
        hidden: Numbers in each layer between.
        depth: Layers between.
        dropout: Probability of dropping an activation of them while training.

    Raises:
        ConfigError: A number is not above 0, or a probability none.
    """
    for name, value in (("hidden", hidden), ("depth", depth)):
        check_positive(f"model.{name}", value)
    layers: list[nn.Module] = [] if len(input_shape) == 1 else [nn.Flatten()]
    width = math.prod(input_shape)
    for _ in range(depth):
        between = nn.Linear(width, hidden), nn.ReLU(), dropout_or_none(dropout)
        layers += [layer for layer in between if layer is not None]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, num_classes))
