"""Labels under differential privacy: randomised response, once for each example of a run.

Warner 1965, for k classes as in Kairouz, Oh and Viswanath, "Extremal Mechanisms for Local
Differential Privacy", NeurIPS 2014: the true label with probability e^ε / (e^ε + k - 1), else
one of the others, each as likely. It is pure (δ = 0), and neighbours are any two labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsys.randomness import Address

PURPOSE = "label-response"


def truth_probability(epsilon: float, classes: int) -> float:
    """Return the probability with which the true label is told.

    >>> round(truth_probability(1.0, 2), 4)
    0.7311
    """
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def randomised(
    labels: Tensor, epsilon: float, classes: int, address: Address,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Return the labels that are told instead of the true ones.

    Args:
        labels: ``(N,)``, in ``[0, classes)``.
        epsilon: Of each label; infinite: the truth.
        classes: Number of classes k.
        address: Of the draws; the same address tells the same labels again.
        generator: Draws instead.
    """
    if math.isinf(epsilon) or classes < 2:
        return labels
    draw = generator or address.torch(PURPOSE)
    lies = torch.rand(len(labels), generator=draw, dtype=torch.float64)
    others = torch.randint(1, classes, (len(labels),), generator=draw)
    lying = lies >= truth_probability(epsilon, classes)
    return torch.where(lying, (labels + others) % classes, labels)
