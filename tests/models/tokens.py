"""A small transformer whose tokens are transposed pixels, as vision transformers have them.

Importable by name (``_target_: tests.models.tokens.Tokens``), so that runs can be made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scaled(nn.Module):
    """A residual branch with a scale for each channel (LayerScale, as in CaiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, ``(batch, tokens, width)``."""
        return x + self.gamma * self.fc(self.norm(x))


class Tokens(nn.Module):
    """Patches, two scaled branches, the mean over tokens, and a linear layer.

    Args:
        input_shape: Of an image.
        num_classes: Number of outputs.
        dropout: Probability in front of the last layer.
        width: Channels of a token.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        dropout: float = 0.0,
        width: int = 24,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(input_shape[0], width, 2, 1)
        self.first, self.second = Scaled(width), Scaled(width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, ``(batch, num_classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.second(self.first(x))
        return self.fc(self.drop(self.norm(x).mean(1)))
