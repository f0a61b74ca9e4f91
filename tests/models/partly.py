"""Models that keep parts of themselves in evaluation while the rest trains, in the ways people do.

Importable by name (``_target_: tests.models.partly.Partly``), so that runs can be made of them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm(nn.BatchNorm2d):
    """Never in training."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        return super().train(False)


class Stem(nn.Module):
    """A part taken from elsewhere: its own train() leaves it in evaluation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(F.relu(self.norm(self.conv(x)))), 0.3, self.training)

    def train(self, mode: bool = True) -> Stem:
        return super().train(False)


KINDS = ("root", "dropout", "stem", "class", "forward", "momentum", "parameters", "none")


class Partly(nn.Module):
    """Two convolutions with BatchNorm, a dropout and a linear layer, frozen in one way.

    Args:
        input_shape: Of an image.
        num_classes: Number of outputs.
        frozen: How: one of `KINDS`; ``"none"`` freezes nothing.
        dropout: Probability in front of the last layer.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        frozen: str = "root",
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        channels = input_shape[0]
        if frozen == "stem":
            self.stem: nn.Module = Stem(channels)
        else:
            self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = FrozenBatchNorm(8) if frozen == "class" else nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.late = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, num_classes)
        if frozen == "parameters":
            self.stem.requires_grad_(False)
            self.late.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen == "forward":
            self.norm.eval()
            self.late.eval()
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.late(self.conv(x)))
        return self.fc(self.drop(x.mean((2, 3))))

    def train(self, mode: bool = True) -> Partly:
        super().train(mode)
        if self.frozen == "root":
            self.norm.eval()
            self.late.eval()
        elif self.frozen == "dropout":
            self.drop.eval()
        elif self.frozen == "momentum":
            self.norm.momentum = 0.02 if mode else 0.1
            self.late.momentum = None if mode else 0.1
        return self
