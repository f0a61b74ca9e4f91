"""Labels from activation gradients: what is told by a gradient that crosses a cut.

With a label-private cut the labels stay on the device, and the gradients that it sends back depend
on them: Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022. There
are two classes there and a direction tells them apart; here are several, and the attacker knows
the labels of a few examples of each. It believes in the class whose known gradients point most in
the direction of the one that it sees.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.privacy.audit_metrics import one_against_rest
from fedsys.training.part import keep_gradient, safe_input

KNOWN = 5
"""Examples of each class whose labels the attacker knows."""


def gradients_of(back: nn.Module, z: Tensor, labels: Tensor, *, batch: int = 100) -> Tensor:
    """Return the gradient of each example's activation, as it crosses the cut in training.

    Args:
        back: The units after the cut.
        z: Activations ``(N, …)``.
        labels: ``(N,)``.
        batch: Examples of a mini-batch, over which the loss is a mean.
    """
    found = []
    for rows in torch.split(torch.arange(len(labels)), batch):
        part = z[rows].detach().clone()
        kept = keep_gradient(part)
        loss = F.cross_entropy(back(safe_input(back, part)), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        found.append(kept[0].detach())
    back.zero_grad(set_to_none=True)
    return torch.cat(found)


def infer_labels(seen: Tensor, labels: NDArray[np.int64], classes: int) -> float:
    """Return how well labels are told by what is seen: mean area of one class against the rest.

    Args:
        seen: What the attacker has of each example, ``(N, …)``.
        labels: The truth, ``(N,)``; the first `KNOWN` examples of each class are known to it, and
            do not count.
        classes: Number of classes.
    """
    directions = F.normalize(seen.flatten(1).double(), dim=1)
    known = np.zeros(len(labels), dtype=bool)
    towards = torch.zeros(classes, directions.shape[1], dtype=torch.float64)
    for k in range(classes):
        own = np.flatnonzero(labels == k)[:KNOWN]
        known[own] = True
        if len(own):
            towards[k] = directions[torch.from_numpy(own)].mean(0)
    # The direction that all gradients share tells nothing of one of them
    towards = F.normalize(towards - towards.mean(0), dim=1)
    scores = (directions[torch.from_numpy(~known)] @ towards.T).numpy()
    return one_against_rest(scores, labels[~known])
