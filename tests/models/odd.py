"""A model with every kind of tensor that a state may have, and one that only trains as a whole.

Importable by name (``_target_: tests.models.odd.Odd``), so that runs can be made of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """Two convolutions and a linear layer, with placeholders, tables, a counter and a shared scale.

    Args:
        input_shape: Of an image.
        num_classes: Number of outputs.
        dropout: Probability in front of the last layer.
        shared: Let the first and the last unit share a parameter, which leaves no cut.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        dropout: float = 0.0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(input_shape[0], 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, num_classes)
        self.scale = nn.Parameter(torch.tensor(1.5))  # 0-d
        self.shared = shared
        self.placeholder = nn.Parameter(torch.zeros(0))
        self.empty_rows = nn.Parameter(torch.zeros(0, 4))
        self.empty_columns = nn.Parameter(torch.zeros(3, 0))
        self.register_parameter("absent", None)
        for name, value in {
            "anchors": torch.zeros(0),
            "no_index": torch.zeros(0, dtype=torch.int64),
            "no_mask": torch.zeros(2, 0, dtype=torch.bool),
            "no_half": torch.zeros(0, 3, dtype=torch.float16),
            "mask": torch.tensor([True, False] * 4),
            "order": torch.arange(7, -1, -1),
            "bytes": torch.tensor([250, 3], dtype=torch.uint8),
            "wide": torch.tensor(1.5, dtype=torch.float64),
            "narrow": torch.ones(2, dtype=torch.float16),
            "absent_buffer": None,
        }.items():
            self.register_buffer(name, value)
        self.register_buffer("hidden", torch.full((1,), 0.5), persistent=False)
        self.register_buffer("hidden_empty", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x))) * self.scale
        x = self.second(x)[:, self.order] * self.mask.view(1, -1, 1, 1)
        x = self.drop(F.relu(x + self.hidden).mean((2, 3))) + self.anchors.sum()
        x = x + self.placeholder.sum() + self.empty_rows.sum()
        return self.fc(x) * (self.scale if self.shared else 1.0)


class Forked(nn.Module):
    """A linear layer whose path depends on the values of tensors: it cannot be traced.

    Args:
        input_shape: Of an image.
        num_classes: Number of outputs.
    """

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.flatten(1))
        return x if x.sum() > 0 else 2 * x
